"""Checkpoints: round trips, other meshes, retention, damage, a full disk, a kill in mid-save."""

import errno
import json
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import types
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxalope.errors import InputError
from jaxalope.model import checkpoint
from jaxalope.model.checkpoint import CheckpointStore, SaveError
from jaxalope.model.step_folders import list_steps


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def params(value: float = 0.0) -> dict:
    return {
        "stack": {0: {"kernel": jnp.arange(32.0).reshape(8, 4) + value}, 1: {"A_log": jnp.ones(3)}},
        "embed": {"embedding": jnp.full((16, 8), value, jnp.bfloat16)},
    }


def state(value: float = 0.0) -> dict:
    p = params(value)
    return {"params": p, "optimizer": (Moments(jnp.int32(7), p), ())}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def save(store, *steps, metric=None, wait=True):
    for step in steps:
        store.save(step, state(step), {"experiment": {"name": "toy"}}, metric=metric)
    if wait:
        store.wait()


def test_round_trip_keeps_structure_dtypes_documents_and_files(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints") as store:
        trees = state(0.5)
        assert store.save(
            3,
            trees,
            {"experiment": {"name": "toy"}},
            process_documents={"data": {"position": [1, 2]}},
            files={"tokenizer/vocab.bin": b"\x00\xff"},
        )
        assert store.save(3, trees, {}) is False
        restored = store.restore(abstract(trees))
    assert restored.step == 3 and store.steps() == [3]
    assert_same(restored.trees, trees)
    assert list(restored.trees["params"]["stack"]) == [0, 1]  # integers, not strings
    assert restored.documents == {"experiment": {"name": "toy"}}
    assert restored.process_documents == {"data": [{"position": [1, 2]}]}
    assert checkpoint.read_document(tmp_path, "experiment") == {"name": "toy"}
    assert (checkpoint.document_dir(tmp_path) / "tokenizer/vocab.bin").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/2"])
def test_params_alone_from_a_workdir_its_checkpoints_or_one_of_them(tmp_path, where):
    with CheckpointStore(tmp_path / "checkpoints") as store:
        save(store, 1, 2)
    loaded = checkpoint.restore_params(tmp_path / where, abstract(params()))
    assert_same(loaded, params(2))
    if where != "checkpoints/2":
        assert_same(
            checkpoint.restore_params(tmp_path / where, abstract(params()), step=1), params(1)
        )
    with pytest.raises(InputError, match="not 'ema'"):
        checkpoint.restore_params(tmp_path / where, abstract(params()), ema=True)
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params())
    leaves = jax.tree.leaves(checkpoint.restore_params(tmp_path, cast))
    assert {x.dtype for x in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_a_relative_path_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore("run/checkpoints") as store:
        save(store, 1)
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
    assert_same(checkpoint.restore_params("run", abstract(params())), params(1))


@pytest.mark.parametrize("saved, wanted", [((8, 1), (2, 4)), ((2, 4), (1, 1)), ((1, 1), (4, 2))])
def test_restores_onto_another_mesh(tmp_path, saved, wanted):
    def on(mesh_shape):
        mesh = jax.make_mesh(
            mesh_shape,
            ("fsdp", "tensor"),
            axis_types=(AxisType.Explicit,) * 2,
            devices=jax.devices()[: mesh_shape[0] * mesh_shape[1]],
        )
        place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
        return {"w": jax.device_put(x, place)}

    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": on(saved)}, {})
        target = on(wanted)
        want = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
        )
        loaded = store.restore({"params": want}).trees["params"]
    assert loaded["w"].sharding == target["w"].sharding
    np.testing.assert_array_equal(loaded["w"], target["w"])


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jnp.arange(2.0**20)
    expected = np.array(x)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": {"x": x}}, {})
        for _ in range(3):
            x = overwrite(x)
        loaded = store.restore({"params": abstract({"x": x})}).trees["params"]["x"]
    np.testing.assert_array_equal(loaded, expected)


def test_keeps_the_last_and_the_best(tmp_path):
    with CheckpointStore(tmp_path, keep_last=2, keep_best=2) as store:
        for step, metric in [(1, 5.0), (2, 1.0), (3, 4.0), (4, float("nan")), (5, None), (6, 2.0)]:
            save(store, step, metric=metric)
        assert store.steps() == [2, 5, 6]  # 2 and 6 are best, 5 and 6 last
        save(store, 7)
        assert store.steps() == [2, 6, 7]
    assert {p.name for p in tmp_path.iterdir()} == {"2", "6", "7"}


def test_another_model_is_an_error_that_names_the_tensor_and_never_a_fallback(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 1, 2)
        other = abstract(params())
        other["stack"][0]["kernel"] = jax.ShapeDtypeStruct((8, 5), jnp.float32)
        del other["stack"][1]["A_log"]
        with pytest.raises(InputError) as error:
            store.restore({"params": other})
        message = str(error.value)
        assert "stack.0.kernel: the checkpoint has (8, 4), the model (8, 5)" in message
        assert "stack.1.A_log: the checkpoint has (3,), the model no such tensor" in message
        assert store.steps() == [1, 2]


def test_no_checkpoint_is_an_error_that_names_the_directory(tmp_path):
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path}"):
        checkpoint.restore_params(tmp_path, abstract(params()))
    with CheckpointStore(tmp_path) as store:
        save(store, 4)
        with pytest.raises(InputError, match=r"there are \[4\]"):
            store.restore(abstract(state()), step=3)


def cut(path: pathlib.Path):
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size // 2)


def test_any_truncated_file_falls_back_to_the_previous_checkpoint_or_changes_nothing(tmp_path):
    with CheckpointStore(tmp_path / "a") as store:
        store.save(1, state(1), {"experiment": {}}, process_documents={"data": {"at": [1, 2, 3]}})
        store.save(2, state(2), {"experiment": {}}, process_documents={"data": {"at": [1, 2, 3]}})
    newest = tmp_path / "a" / "2"
    files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 1]
    assert len(files) > 5
    fell_back = 0
    for path in files:
        content = path.read_bytes()
        cut(path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored, damaged = checkpoint._read_newest(
                checkpoint.epath.Path(tmp_path / "a"), abstract(state()), None
            )
        told = [str(w.message) for w in caught if "cannot be read" in str(w.message)]
        assert_same(restored.trees, state(restored.step))
        assert restored.process_documents == {"data": [{"at": [1, 2, 3]}]}
        if restored.step == 1:
            fell_back += 1
            assert damaged == [2]
            assert "step 2" in told[0] and "using that of step 1 instead" in told[0], path
        path.write_bytes(content)
    assert fell_back >= len(files) // 2


@pytest.mark.parametrize(
    "victim", ["params/manifest.ocdbt", "documents/checkpoint.json", "_CHECKPOINT_METADATA"]
)
def test_a_lost_file_falls_back_says_so_and_sets_the_damaged_one_aside(tmp_path, victim):
    with CheckpointStore(tmp_path) as store:
        save(store, 1, 2)
    (tmp_path / "2" / victim).unlink()
    with CheckpointStore(tmp_path) as store:
        with pytest.warns(UserWarning, match=r"step 2 .* cannot be read .*; using that of step 1"):
            restored = store.restore(abstract(state()))
        assert restored.step == 1
        assert_same(restored.trees, state(1))
        assert (tmp_path / "2.unreadable").is_dir() and store.steps() == [1]
        save(store, 2)  # the number is free again
        assert_same(store.restore(abstract(state())).trees, state(2))


def test_none_readable_is_one_error_with_every_reason(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 1, 2)
        for step in (1, 2):
            cut(tmp_path / str(step) / "documents" / "checkpoint.json")
        with pytest.raises(InputError, match=r"no readable checkpoint.*step 2: .*step 1: "):
            store.restore(abstract(state()))
    assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_a_newer_format_is_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    header = tmp_path / "1" / "documents" / "checkpoint.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        checkpoint.restore_params(tmp_path, abstract(params()))


def test_disk_full_keeps_the_last_good_checkpoint_and_says_what_to_do(tmp_path):
    """A real write error: no file of this process may grow beyond 64 KiB."""
    big = {"params": {"x": jnp.asarray(np.random.default_rng(0).normal(size=2**17), jnp.float32)}}
    store = CheckpointStore(tmp_path)
    store.save(1, big, {})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(SaveError) as error:
            store.save(2, big, {})
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    message = str(error.value)
    assert "step 2" in message and str(tmp_path) in message
    assert "the last good one is step 1" in message and "Free space" in message
    assert "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["1"]  # no leftovers
    np.testing.assert_array_equal(
        store.restore(abstract(big)).trees["params"]["x"], big["params"]["x"]
    )
    assert store.save(2, big, {})  # there is room again
    store.close()
    assert store.steps() == [1, 2]


def test_an_unwritable_directory_is_a_save_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"there is no earlier one\. Make that path writable"):
        store = CheckpointStore(tmp_path / "file" / "checkpoints")
        store.save(1, state(), {})
        store.wait()


def write_in_place(monkeypatch):
    """Saves as on ``gs://``, where Orbax writes under the final name from the start."""
    everything = types.SimpleNamespace(is_gcs_path=lambda path: True)
    monkeypatch.setattr("orbax.checkpoint._src.path.atomicity_defaults.gcs_utils", everything)


@pytest.mark.parametrize("scheme", ["renamed", "in place"])
@pytest.mark.parametrize("earlier", [[], [1]])
def test_killed_in_mid_save_leaves_the_earlier_checkpoint_and_nothing_visible(
    tmp_path, scheme, earlier
):
    program = textwrap.dedent(
        """
        import os, signal, sys, types
        import jax.numpy as jnp
        from jaxalope.model import checkpoint
        if sys.argv[2] == "in place":
            from orbax.checkpoint._src.path import atomicity_defaults
            atomicity_defaults.gcs_utils = types.SimpleNamespace(is_gcs_path=lambda path: True)
        store = checkpoint.CheckpointStore(sys.argv[1])
        for step in sys.argv[3:]:
            store.save(int(step), {"params": {"x": jnp.ones(8)}}, {})
        store.wait()
        # The last save dies while its documents are being written.
        class Dies(checkpoint._Documents):
            async def save(self, directory):
                async def write():
                    await directory.await_creation()
                    os.kill(os.getpid(), signal.SIGKILL)
                return write()
            def __init__(self, *args): pass
        checkpoint._Documents = Dies
        store.save(2, {"params": {"x": jnp.zeros(8)}}, {})
        store.wait()
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path), scheme, *map(str, earlier)]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = {p.name for p in tmp_path.iterdir()}
    assert "2.saving" in left and ("2" in left) == (scheme == "in place")
    # Who only reads, while the save is under way, is not told of damage.
    assert list_steps(checkpoint.epath.Path(tmp_path), complete=False) == earlier
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == earlier and store.has_any() == bool(earlier)
        assert [p.name for p in tmp_path.iterdir()] == list(map(str, earlier))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(store, 2)
        assert store.restore(abstract(state())).step == 2


@pytest.mark.parametrize("scheme", ["renamed", "in place"])
def test_a_save_that_fails_leaves_nothing_of_its_own(tmp_path, monkeypatch, scheme):
    if scheme == "in place":
        write_in_place(monkeypatch)

    class Fails(checkpoint._Documents):
        async def save(self, directory):
            async def write():
                await directory.await_creation()
                raise OSError(28, "No space left on device")

            return write()

    with CheckpointStore(tmp_path) as store:
        save(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_Documents", Fails)
            with pytest.raises(SaveError, match=r"the last good one is step 1\. Free space"):
                save(store, 2)
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        save(store, 2)
        assert {p.name for p in tmp_path.iterdir()} == {"1", "2"}


def test_killed_between_the_commit_and_the_end_of_its_note_is_whole(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 1)
    (tmp_path / "1.saving").write_text("")
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1] and store.has_any()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_disk_that_cannot_be_looked_at_is_not_an_empty_one(tmp_path, monkeypatch):
    """Else a run would begin anew on top of its own checkpoints, or clear good ones away."""
    with CheckpointStore(tmp_path) as store:
        save(store, 1, 2)

    def stat(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(type(checkpoint.epath.Path(tmp_path)), "stat", stat)
    with pytest.raises(OSError, match="Stale"):
        CheckpointStore(tmp_path)
    monkeypatch.undo()
    assert CheckpointStore(tmp_path).steps() == [1, 2]


def test_old_checkpoints_that_cannot_be_listed_do_not_undo_a_good_save(tmp_path, monkeypatch):
    def prune(self):
        raise OSError(errno.EIO, "Input/output error")

    with CheckpointStore(tmp_path, keep_last=1) as store:
        save(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointStore, "_prune", prune)
            with pytest.warns(UserWarning, match="old checkpoints .* not cleared: .*Input/output"):
                save(store, 2)
        assert store.steps() == [1, 2]
        save(store, 3)
        assert store.steps() == [3]


def test_a_half_deleted_old_checkpoint_is_cleared_and_a_damaged_new_one_is_not(tmp_path):
    with CheckpointStore(tmp_path) as store:
        save(store, 1, 2, 3)
    for step in (1, 3):
        (tmp_path / str(step) / "_CHECKPOINT_METADATA").unlink()
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [2]
    assert {p.name for p in tmp_path.iterdir()} == {"2", "3"}


def test_bad_retention_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint.keep_last=0"):
        CheckpointStore(tmp_path, keep_last=0)
    with pytest.raises(InputError, match=r"checkpoint.keep_best=-1"):
        CheckpointStore(tmp_path, keep_best=-1)
