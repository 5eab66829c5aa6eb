"""Models converted while others write, stopped and taken up again, an array at a time."""

import json
import os
import shutil
import subprocess
import sys
import weakref

import jax
import numpy as np
import pytest

import jaxalope
from jaxalope import InputError, Model
from jaxalope.model import Gemma2Config, GPTNeoXConfig, KimiLinearConfig, build_model
from jaxalope.model.checkpoint import CheckpointStore
from jaxalope.model.exchange import Lazy
from jaxalope.model.load import open_lazily, pinned
from jaxalope.model.published import sources_of
from jaxalope.model.registry import config_to_dict
from jaxalope.model.unfinished import TAG, describe
from jaxalope.sharding import abstract, split

CONFIG = GPTNeoXConfig.tiny()
DOCUMENTS = {
    "experiment": {"model": config_to_dict(CONFIG), "retrofits": [], "data": {"add_bos": False}}
}


@pytest.fixture(scope="module")
def module():
    return split(build_model(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def filled(module):
    """``filled(value)``: a model whose every number is ``value``."""
    graphdef, params = module
    return lambda value: Model(CONFIG, graphdef, jax.tree.map(lambda x: x * 0 + value, params))


@pytest.fixture
def store(tmp_path, filled):
    """A run's checkpoints; there is step 1, of ones, with an average of tens."""
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        checkpoint(store, 1, filled)
        yield store


def checkpoint(store, step, filled):
    trees = {"params": filled(float(step)).params, "ema": filled(10.0 * step).params}
    store.save(step, trees, DOCUMENTS)
    store.wait()


def values(path):
    """All different numbers of a model on disk."""
    return set(np.concatenate([np.ravel(x) for x in jax.tree.leaves(jaxalope.load(path).params)]))


class Stopped(Exception):
    pass


def stop_after(count):
    """A ``progress`` that lets so many tensors pass."""
    calls = iter(range(count))

    def progress(_):
        if next(calls, None) is None:
            raise Stopped

    return progress


def begin(source, path, tensors=20, **options):
    """A conversion that stops after so many tensors; returns what it left."""
    with pytest.raises(Stopped):
        convert(source, path, progress=stop_after(tensors), **options)
    unfinished = path.parent / f"{path.name}.partial"
    return sorted(p.name for p in unfinished.glob("*")) if unfinished.exists() else []


def convert(source, path, form="hf", *, step=None, ema=False, shard_size=30_000, **options):
    """What the command line does."""
    source = pinned(source, step=step, ema=ema)
    jaxalope.save(
        open_lazily(source, ema=ema),
        path,
        form,
        shard_size=shard_size,
        source=describe(source, ema=ema),
        **options,
    )


class TestOneStep:
    def test_a_run_that_saves_meanwhile_changes_nothing(self, store, tmp_path, filled):
        calls = []

        def progress(_):
            calls.append(None)
            if len(calls) == 5:
                checkpoint(store, 2, filled)

        convert(tmp_path / "run", tmp_path / "out", progress=progress)
        assert values(tmp_path / "out") == {1.0}
        convert(tmp_path / "run", tmp_path / "after")
        assert values(tmp_path / "after") == {2.0}

    def test_a_step_that_is_deleted_meanwhile_is_said(self, store, tmp_path, filled):
        checkpoint(store, 2, filled)
        lazy = open_lazily(tmp_path / "run").params
        assert np.all(lazy["lm_head"]["kernel"].load() == 2)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        with pytest.raises(InputError, match=r"of step=2 cannot be read.*there are \[1\].*another"):
            lazy["lm_head"]["kernel"].load()

    def test_an_average_that_was_not_kept_is_said(self, filled, tmp_path):
        jaxalope.save(filled(1.0), tmp_path / "w", "orbax")
        for read in (jaxalope.load, open_lazily):
            with pytest.raises(InputError, match=r"ema=True: .* kept no moving average"):
                read(tmp_path / "w", ema=True)

    def test_a_published_model_has_one_set_of_weights(self, filled, tmp_path):
        jaxalope.save(filled(1.0), tmp_path / "m")
        assert pinned(tmp_path / "m") == tmp_path / "m"
        with pytest.raises(InputError, match=r"step=3, ema=False: .* one set of weights"):
            open_lazily(tmp_path / "m", step=3)


class TestParts:
    def test_of_the_same_source_are_taken_over(self, store, tmp_path):
        left = begin(tmp_path / "run", tmp_path / "out")
        first = tmp_path / "out.partial" / left[0]
        assert first.suffix == ".safetensors" and TAG in left
        written = first.stat().st_mtime_ns
        convert(tmp_path / "run", tmp_path / "out")
        assert (tmp_path / "out" / left[0]).stat().st_mtime_ns == written
        assert values(tmp_path / "out") == {1.0}
        assert not list((tmp_path / "out").glob(TAG))
        assert not (tmp_path / "out.partial").exists()

    def test_of_another_step_or_average_are_not(self, store, tmp_path, filled):
        checkpoint(store, 2, filled)
        for other, value in (({"step": 2}, 2.0), ({"step": 1, "ema": True}, 10.0)):
            assert begin(tmp_path / "run", tmp_path / f"{value}", step=1)
            convert(tmp_path / "run", tmp_path / f"{value}", **other)
            assert values(tmp_path / f"{value}") == {value}

    def test_of_another_model_or_of_its_earlier_state_are_not(self, filled, tmp_path):
        for name, value in (("base", 1.0), ("instruct", 2.0)):
            jaxalope.save(filled(value), tmp_path / name)
        assert begin(tmp_path / "base", tmp_path / "out")
        convert(tmp_path / "instruct", tmp_path / "out")
        assert values(tmp_path / "out") == {2.0}
        # The same names and sizes, written anew.
        assert begin(tmp_path / "base", tmp_path / "other")
        shutil.copy(tmp_path / "instruct/model.safetensors", tmp_path / "base/model.safetensors")
        convert(tmp_path / "base", tmp_path / "other")
        assert values(tmp_path / "other") == {2.0}

    def test_of_another_size_leave_neither_files_nor_index(self, store, tmp_path):
        convert(tmp_path / "run", tmp_path / "out")
        # As if it had been killed just before it was done.
        os.rename(tmp_path / "out", tmp_path / "out.partial")
        convert(tmp_path / "run", tmp_path / "out", shard_size="1GB")
        assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]

    @pytest.mark.parametrize("tag", [None, "{", "{}"])
    def test_without_a_readable_tag_are_not(self, tag, store, tmp_path):
        left = begin(tmp_path / "run", tmp_path / "out")
        (tmp_path / "out.partial" / TAG).unlink()
        if tag is not None:
            (tmp_path / "out.partial" / TAG).write_text(tag)
        part = tmp_path / "out.partial" / left[0]
        part.write_bytes(part.read_bytes()[:-4] + b"\0\0\0\0")
        convert(tmp_path / "run", tmp_path / "out")
        assert values(tmp_path / "out") == {1.0}

    def test_of_a_workdir_are_none(self, filled, tmp_path):
        for name, value in (("base", 1.0), ("instruct", 2.0)):
            jaxalope.save(filled(value), tmp_path / name)
        assert begin(tmp_path / "base", tmp_path / "w", 0, form="orbax") == []
        # Nor of what an earlier version of this library left.
        with CheckpointStore(tmp_path / "w.partial" / "checkpoints") as store:
            store.save(0, {"params": filled(1.0).params}, DOCUMENTS)
        convert(tmp_path / "instruct", tmp_path / "w", "orbax")
        assert values(tmp_path / "w") == {2.0}

    def test_a_source_is_its_place_and_its_files(self, store, filled, tmp_path):
        jaxalope.save(filled(1.0), tmp_path / "m")
        source = describe(tmp_path / "m")
        assert [name for name, *_ in source["files"]] == ["config.json", "model.safetensors"]
        (tmp_path / "m" / "README.md").write_text("words")
        assert describe(tmp_path / "m") == source == json.loads(json.dumps(source))
        checkpoint = pinned(tmp_path / "run")
        assert describe(checkpoint) != describe(checkpoint, ema=True)
        assert len(describe(checkpoint)["files"]) > 5


@pytest.mark.parametrize(
    "config",
    [GPTNeoXConfig.tiny(), Gemma2Config.tiny(), KimiLinearConfig.tiny()],
    ids=["gpt_neox", "gemma2", "kimi"],
)
def test_an_export_reads_each_array_once_and_holds_those_of_one_tensor(config, tmp_path):
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    reads, alive, most = {}, {}, 0

    def lazy(path, x):
        name = jax.tree_util.keystr(path)

        def load():
            nonlocal most
            array = np.array(x)
            reads[name] = reads.get(name, 0) + 1
            alive[name] = weakref.ref(array)
            most = max(most, sum(one() is not None for one in alive.values()))
            return array

        return Lazy(x.shape, np.dtype(x.dtype), load)

    model = Model(config, graphdef, jax.tree.map_with_path(lazy, params))
    together = max(len(parts) for parts in sources_of(model)._parts.values())
    jaxalope.save(model, tmp_path / "out", shard_size="50KB")
    assert set(reads.values()) == {1} and len(reads) == len(jax.tree.leaves(params))
    assert most == together
    jax.tree.map(np.testing.assert_array_equal, jaxalope.load(tmp_path / "out").params, params)


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_weights_are_cast_to_floating_dtypes_alone(dtype, tmp_path, filled):
    """Others would cut weights off or have no name: said before anything is written."""
    refused = rf"dtype={dtype!r} is no dtype of weights; use one of float32, bfloat16, float16"
    model = filled(0.5)
    for form in ("hf", "orbax"):
        jaxalope.save(model, tmp_path / form, form)
        with pytest.raises(InputError, match=f"param_{refused}"):
            jaxalope.load(tmp_path / form, param_dtype=dtype)
        with pytest.raises(InputError, match=refused):
            jaxalope.save(model, tmp_path / "out", form, dtype=dtype)
    # In a process of its own, as flags are a process's.
    command = [sys.executable, "-m", "jaxalope.model.convert", f"--from={tmp_path / 'hf'}"]
    command += [f"--to={tmp_path / 'out'}", f"--dtype={dtype}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"error: --dtype={dtype!r} is no dtype" in done.stderr
    assert not list(tmp_path.glob("out*"))
