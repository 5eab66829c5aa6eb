"""The exchange, shown on Kimi Linear: every form, every mesh, every way to be wrong."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import InputError
from jaxalope.data.tokenizers import ByteTokenizer
from jaxalope.errors import SaveError
from jaxalope.model import KimiLinearConfig, Model, build_model
from jaxalope.model.exchange import files, read, write
from jaxalope.model.exchange.files import Stored, encode_header
from jaxalope.model.exchange.table import compact
from jaxalope.model.kimi_linear_weights import PUBLISHED
from jaxalope.model.load import open_lazily
from jaxalope.model.published import open_published, published_tensors
from jaxalope.model.save import num_bytes
from jaxalope.sharding import AxisRules, MeshConfig, init_params, make_mesh

TINY = KimiLinearConfig.tiny()
IDS = np.random.default_rng(3).integers(0, TINY.vocab_size, (2, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    graphdef, params = init_params(lambda key: build_model(TINY, key), jax.random.key(0))
    return Model(TINY, graphdef, params)


@pytest.fixture
def folder(tmp_path, fixtures):
    """A published model (bfloat16, but for what the publisher keeps in float32) in three files."""
    tensors = load_file(fixtures / "kimi_linear_tiny/model.safetensors")
    kept = ("A_log", "dt_bias", "e_score_correction_bias")
    tensors = {
        name: x if name.endswith(kept) else x.astype(ml_dtypes.bfloat16)
        for name, x in tensors.items()
    }
    config = json.loads((fixtures / "kimi_linear_tiny/config.json").read_text())
    return publish(tmp_path / "published", tensors, config, parts=3)


def publish(path, tensors, config, parts=1):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = names[part::parts]
        save_file({n: tensors[n] for n in own}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if parts > 1:
        (path / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def rewrite(folder, change):
    """Publish the model of ``folder`` again, with ``change(tensors)`` applied in place."""
    tensors = read_all(folder)
    change(tensors)
    config = json.loads((folder / "config.json").read_text())
    return publish(folder.parent / "changed", tensors, config)


def read_all(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bytes(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


class TestRoundTrips:
    def test_published_to_ours_to_published_is_byte_identical(self, folder, tmp_path):
        model = jaxalope.load(folder)
        assert model.config.dtype == "bfloat16"
        jaxalope.save(model, tmp_path / "again", shard_size="40KB")
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 3
        same_bytes(read_all(folder), read_all(tmp_path / "again"))

    def test_through_a_workdir_too(self, folder, tmp_path):
        jaxalope.save(jaxalope.load(folder), tmp_path / "workdir", "orbax")
        jaxalope.save(jaxalope.load(tmp_path / "workdir"), tmp_path / "again")
        same_bytes(read_all(folder), read_all(tmp_path / "again"))
        folders = (folder, tmp_path / "again")
        theirs, ours = (json.loads((f / "config.json").read_text()) for f in folders)
        assert theirs.items() <= ours.items()

    def test_ours_to_published_to_ours_is_identical(self, model, tmp_path):
        model = dataclasses.replace(model, tokenizer=ByteTokenizer(), add_bos=True)
        for form in ("hf", "orbax"):
            jaxalope.save(model, tmp_path / form, form)
            again = jaxalope.load(tmp_path / form)
            # How many tokens a chunk has is nothing that is published.
            assert dataclasses.replace(again.config, kda_chunk_size=16) == model.config
            jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
            assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
        assert again.tokenizer.fingerprint == model.tokenizer.fingerprint and again.add_bos

    def test_a_model_taken_apart_is_written_alike(self, model):
        same_bytes(published_tensors(model), published_tensors(model.unrolled()))

    def test_unknown_fields_are_named_ignored_and_kept(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "flux_capacitor": 1.21}))
        with pytest.warns(UserWarning, match="flux_capacitor is unknown here and ignored"):
            model = jaxalope.load(folder)
        jaxalope.save(model, tmp_path / "again")
        assert json.loads((tmp_path / "again/config.json").read_text())["flux_capacitor"] == 1.21

    def test_what_changed_since_is_written_and_nothing_else(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        read = {**config, "rope_theta": 77.0, "rms_norm_eps": 1e-5}
        (folder / "config.json").write_text(json.dumps(read))
        model = jaxalope.load(folder)
        changed = dataclasses.replace(model.config, routed_scaling_factor=3.5)
        jaxalope.save(dataclasses.replace(model, config=changed), tmp_path / "again")
        written = json.loads((tmp_path / "again/config.json").read_text())
        assert {n: v for n, v in written.items() if read.get(n) != v} == {
            "routed_scaling_factor": 3.5
        }

    def test_another_dtype_on_request(self, folder, tmp_path):
        model = jaxalope.load(folder, dtype="float32", param_dtype="float32")
        assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"float32"}
        jaxalope.save(model, tmp_path / "wide")
        wide, narrow = read_all(tmp_path / "wide"), read_all(folder)
        for name, x in narrow.items():
            np.testing.assert_array_equal(wide[name], x.astype(np.float32))
        jaxalope.save(model, tmp_path / "half", dtype="bfloat16")
        half = read_all(tmp_path / "half")
        assert {str(x.dtype) for x in half.values()} == {"bfloat16"}
        assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


class TestForms:
    def test_head_gains_flat_padded_or_behind_axes(self, folder):
        expected = jaxalope.load(folder)
        for form in (lambda x: x.reshape(-1), lambda x: np.pad(x.reshape(-1), (0, 3))):

            def change(tensors, form=form):
                for name in tensors:
                    if name.endswith("A_log"):
                        tensors[name] = form(tensors[name])

            changed = rewrite(folder, change)
            model = jaxalope.load(changed)
            jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
            same_bytes(published_tensors(model), read_all(changed))
            for file in changed.iterdir():
                file.unlink()
            changed.rmdir()

    def test_names_that_transformers_writes(self, folder):
        def change(tensors):
            for name in list(tensors):
                if ".mlp." in name:
                    tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)

        changed = rewrite(folder, change)
        same_bytes(published_tensors(jaxalope.load(changed)), read_all(changed))

    def test_layers_of_several_dtypes_are_kept_in_the_widest(self, folder):
        name = "model.layers.2.self_attn.q_proj.weight"

        def change(tensors):
            tensors[name] = tensors[name].astype(np.float32)

        changed = rewrite(folder, change)
        same_bytes(published_tensors(jaxalope.load(changed)), read_all(changed))


@pytest.mark.long
class TestMeshes:
    @pytest.mark.parametrize("explicit", [True, False])
    def test_sharded_is_one_device(self, model, tmp_path, explicit, monkeypatch):
        if explicit:  # Transposed on the devices, as large arrays are.
            monkeypatch.setattr(read, "SMALL", 0)
            monkeypatch.setattr(write, "SMALL", 0)
        jaxalope.save(model, tmp_path / "m")
        mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2, explicit=explicit))
        sharded = jaxalope.load(tmp_path / "m", mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, sharded.params, model.params)
        placed = {x.sharding.spec for x in jax.tree.leaves(sharded.params)}
        assert len(placed) > 3
        np.testing.assert_allclose(sharded(IDS)[0], model(IDS)[0], atol=1e-4)
        same_bytes(published_tensors(sharded), published_tensors(model))

    def test_no_more_than_a_shard_is_read_at_once(self, model, tmp_path, monkeypatch):
        jaxalope.save(model, tmp_path / "m")
        mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
        seen = []

        def counted(self, index=None, original=Stored.read):
            found = original(self, index)
            seen.append((self, found.nbytes))
            return found

        monkeypatch.setattr(Stored, "read", counted)
        jaxalope.load(tmp_path / "m", mesh=mesh)
        # 8 ways over the embedding: no read of it is larger than its shard.
        embed = [n for stored, n in seen if stored.shape == (TINY.vocab_size, TINY.hidden_size)]
        assert max(embed) == TINY.vocab_size * TINY.hidden_size * 4 // 8
        # What is replicated is read once, not once a device.
        norms = [n for stored, n in seen if stored.shape == (TINY.hidden_size,)]
        assert len(norms) <= 4 * (2 * TINY.num_layers + 1)

    def test_a_mesh_that_does_not_fit(self, model, tmp_path):
        jaxalope.save(model, tmp_path / "m")
        mesh = make_mesh(MeshConfig(data=1, tensor=8))
        with pytest.raises(InputError, match="does not divide mesh axis `tensor`=8"):
            jaxalope.load(tmp_path / "m", mesh=mesh, rules=AxisRules())


class TestThe48B:
    """The released model's headers over sparse files: the plan is real, the numbers are zeros."""

    @pytest.fixture(scope="class")
    @staticmethod
    def sparse(tmp_path_factory):
        path = tmp_path_factory.mktemp("48b")
        names = published_names_of_the_48b()
        config = PUBLISHED.config_to(KimiLinearConfig.kimi_linear_48b())
        (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
        listed, weight_map = list(names.items()), {}
        for part in range(20):
            own = dict(listed[part::20])
            header = encode_header(own)
            size = sum(d.itemsize * int(np.prod(s)) for d, s in own.values())
            file = path / f"model-{part + 1:05d}-of-00020.safetensors"
            file.write_bytes(header)
            os.truncate(file, len(header) + size)
            weight_map |= dict.fromkeys(own, file.name)
        (path / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return path

    def test_the_table_covers_every_published_tensor(self, sparse):
        opened = open_published(epath.Path(sparse))
        assert opened.plan.num_params == KimiLinearConfig.kimi_linear_48b().num_params()
        assert 98.0e9 < opened.plan.stored_bytes < 98.6e9
        assert "49.12" in opened.plan.summary()
        pieces = [piece.name for leaf in opened.plan.leaves for piece in leaf.pieces]
        assert sorted(pieces) == sorted(published_names_of_the_48b())

    def test_its_plan_fits_a_pod(self, sparse):
        mesh = make_mesh(MeshConfig(data=1, expert=8))
        opened = open_published(epath.Path(sparse), mesh=mesh)
        assert sum(opened.plan.shard_bytes) < 16e9
        # One array of it, read for real: an expert shard's worth of a stacked tensor.
        lazy = opened.plan.lazily()
        path = next(p for p in lazy if "router" in p and "bias" in p)
        assert not np.asarray(lazy[path].load()).any()


def published_names_of_the_48b():
    """``{name: (dtype, shape)}`` of the released shards, written down from the report alone."""
    bf16, f32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    names = {
        "model.embed_tokens.weight": (bf16, (163840, 2304)),
        "lm_head.weight": (bf16, (163840, 2304)),
        "model.norm.weight": (bf16, (2304,)),
    }
    kda = {
        **{f"{x}_proj.weight": (4096, 2304) for x in "qkv"},
        **{f"{x}_conv1d.weight": (4096, 1, 4) for x in "qkv"},
        "A_log": (1, 1, 32, 1),
        "dt_bias": (4096,),
        "f_a_proj.weight": (128, 2304),
        "f_b_proj.weight": (4096, 128),
        "b_proj.weight": (32, 2304),
        "g_a_proj.weight": (128, 2304),
        "g_b_proj.weight": (4096, 128),
        "o_norm.weight": (128,),
        "o_proj.weight": (2304, 4096),
    }
    mla = {
        "q_proj.weight": (6144, 2304),
        "kv_a_proj_with_mqa.weight": (576, 2304),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (8192, 512),
        "o_proj.weight": (2304, 4096),
    }
    dense = {"gate": (9216, 2304), "up": (9216, 2304), "down": (2304, 9216)}
    gated = {"gate": (1024, 2304), "up": (1024, 2304), "down": (2304, 1024)}
    for i in range(27):
        layer = f"model.layers.{i}."
        names[layer + "input_layernorm.weight"] = (bf16, (2304,))
        names[layer + "post_attention_layernorm.weight"] = (bf16, (2304,))
        for name, shape in (mla if i in (3, 7, 11, 15, 19, 23, 26) else kda).items():
            names[f"{layer}self_attn.{name}"] = (
                f32 if name in ("A_log", "dt_bias") else bf16,
                shape,
            )
        if i == 0:
            for name, shape in dense.items():
                names[f"{layer}mlp.{name}_proj.weight"] = (bf16, shape)
            continue
        moe = layer + "block_sparse_moe."
        names[moe + "gate.weight"] = (bf16, (256, 2304))
        names[moe + "gate.e_score_correction_bias"] = (f32, (256,))
        for name, shape in gated.items():
            names[f"{moe}shared_experts.{name}_proj.weight"] = (bf16, shape)
        for e in range(256):
            for name, shape in zip(("w1", "w3", "w2"), gated.values(), strict=True):
                names[f"{moe}experts.{e}.{name}.weight"] = (bf16, shape)
    return names


class TestBadInput:
    def test_everything_that_does_not_fit_is_named_at_once(self, folder):
        def change(tensors):
            del tensors["model.norm.weight"]
            for i in (1, 2):
                name = f"model.layers.{i}.self_attn.q_proj.weight"
                tensors[name.replace("q_proj", "q_projection")] = tensors.pop(name)
            tensors["lm_head.weight"] = np.zeros((4, 4), np.float32)
            embed = "model.embed_tokens.weight"
            tensors[embed] = tensors[embed].astype(np.int8)

        with pytest.raises(InputError) as error:
            jaxalope.load(rewrite(folder, change))
        message = str(error.value)
        assert "missing model.norm.weight" in message
        assert (
            "missing model.layers.{1-2}.self_attn.q_proj.weight (is it "
            "model.layers.{1-2}.self_attn.q_projection.weight?)"
        ) in message
        assert "unknown model.layers.{1-2}.self_attn.q_projection.weight" in message
        assert "lm_head.weight has shape (4, 4), this model needs (97, 48)" in message
        assert "model.embed_tokens.weight has dtype int8" in message

    def test_another_family_and_options_that_are_not_here(self, folder):
        config = json.loads((folder / "config.json").read_text())
        for change, words in [
            ({"model_type": "mamba"}, "model_type='mamba' is no family that is here"),
            ({"q_lora_rank": 8}, "q_lora_rank=8 is another computation"),
            ({"hidden_size": 64}, "do not fit its configuration"),
        ]:
            (folder / "config.json").write_text(json.dumps({**config, **change}))
            with pytest.raises(InputError, match=words):
                jaxalope.load(folder)
        del config["kv_lora_rank"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"config\.json has no kv_lora_rank"):
            jaxalope.load(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(InputError, match=r"config\.json is no JSON"):
            jaxalope.load(folder)

    def test_nothing_there_or_no_network(self, tmp_path, monkeypatch):
        with pytest.raises(InputError, match="does not exist; give the workdir"):
            jaxalope.load(tmp_path / "nowhere")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match=r"the hub could not be asked.*hf download nobody"):
            jaxalope.load("nobody/none")

    def test_a_published_model_has_no_steps(self, folder):
        with pytest.raises(InputError, match="one set of weights"):
            jaxalope.load(folder, step=3)

    @pytest.mark.parametrize("size", ["0", "much", "-1GB"])
    def test_shard_sizes(self, size):
        with pytest.raises(InputError, match="shard_size="):
            num_bytes(size)
        assert num_bytes("1.5MB") == 1_500_000
        assert num_bytes("2GB") == 2 * 10**9 == num_bytes(2 * 10**9)

    def test_a_place_that_is_taken(self, model, tmp_path):
        (tmp_path / "m").mkdir()
        jaxalope.save(model, tmp_path / "m")  # Empty: fine.
        with pytest.raises(InputError, match="is there already"):
            jaxalope.save(model, tmp_path / "m")
        with pytest.raises(InputError, match="format='gguf'"):
            jaxalope.save(model, tmp_path / "n", "gguf")

    def test_parts_that_were_added_have_no_published_name(self, model, tmp_path):
        fitted = jaxalope.model.add_decoding_heads(model, jax.random.key(0), width=4)
        with pytest.raises(InputError, match=r"no name for decoding_heads.*format='orbax'"):
            jaxalope.save(fitted, tmp_path / "m")
        assert not list(tmp_path.iterdir())
        jaxalope.save(fitted, tmp_path / "m", "orbax")
        again = jaxalope.load(tmp_path / "m")
        jax.tree.map(np.testing.assert_array_equal, again.params, fitted.params)


class TestFailures:
    @pytest.fixture
    def full_disk(self, monkeypatch):
        """A disk that is full after so many tensors."""
        left = {"tensors": 30}

        def write_file(file, header, tensors, original=files.write_file):
            def until_full():
                for tensor in tensors:
                    if not left["tensors"]:
                        raise OSError(28, "No space left on device")
                    left["tensors"] -= 1
                    yield tensor

            original(file, header, until_full())

        monkeypatch.setattr(write, "write_file", write_file)
        return left

    def test_nothing_is_left_under_any_name(self, model, tmp_path, full_disk):
        with pytest.raises(SaveError, match=r"No space left.*nothing is left.*Free space"):
            jaxalope.save(model, tmp_path / "m", shard_size="20KB")
        assert not list(tmp_path.iterdir())

    def test_a_conversion_goes_on_where_it_stopped(self, model, tmp_path, full_disk):
        with pytest.raises(SaveError, match=r"m\.partial"):
            jaxalope.save(model, tmp_path / "m", shard_size="20KB", source={"path": "here"})
        assert not (tmp_path / "m").exists()
        kept = (tmp_path / "m.partial").glob("*.safetensors")
        done = {path.name: path.stat().st_mtime_ns for path in kept}
        assert done
        full_disk["tensors"] = 10**6
        jaxalope.save(model, tmp_path / "m", shard_size="20KB", source={"path": "here"})
        assert not (tmp_path / "m.partial").exists()
        after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "m").glob("*.safetensors")}
        assert done.items() < after.items()
        assert not list((tmp_path / "m").glob("*.partial"))
        same_bytes(read_all(tmp_path / "m"), published_tensors(model))


@pytest.mark.long
class TestCommandLine:
    def convert(self, *arguments):
        command = [sys.executable, "-m", "jaxalope.model.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_there_and_back(self, folder, tmp_path):
        assert "197 tensors of 3 files" in self.convert(f"--from={folder}", "--plan").stdout
        done = self.convert(f"--from={folder}", f"--to={tmp_path}/w", "--verify")
        assert done.returncode == 0
        assert "largest difference of the outputs: 0 " in done.stdout
        self.convert(f"--from={tmp_path}/w", f"--to={tmp_path}/back")
        same_bytes(read_all(folder), read_all(tmp_path / "back"))
        self.convert(f"--from={folder}", f"--to={tmp_path}/wide", "--format=hf", "--dtype=float32")
        assert {str(x.dtype) for x in read_all(tmp_path / "wide").values()} == {"float32"}

    def test_errors_end_with_a_line_and_a_status(self, tmp_path):
        done = self.convert(f"--from={tmp_path}/nowhere", f"--to={tmp_path}/x")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: model=")


def test_lazy_models_read_an_array_when_it_is_asked_for(model, tmp_path):
    for form in ("hf", "orbax"):
        jaxalope.save(model, tmp_path / form, form)
        lazy = open_lazily(tmp_path / form)
        found = jax.tree.map(lambda x: x.load(), lazy.params)
        jax.tree.map(np.testing.assert_array_equal, found, model.params)


def test_names_that_differ_in_numbers_are_one():
    names = [f"layers.{i}.experts.{e}.w1" for i in (0, 1, 2, 5) for e in (3, 4)] + ["norm.weight"]
    assert compact(names) == ["layers.{0-2,5}.experts.{3-4}.w1", "norm.weight"]
    assert compact(["block.7.w"]) == ["block.7.w"]


def test_bfloat16_parameters_compute_what_float32_ones_do(folder):
    """Stored in 16 bits and cast at use is the same as cast at loading."""
    narrow = jaxalope.load(folder, dtype="float32")
    wide = jaxalope.load(folder, dtype="float32", param_dtype="float32")
    assert jnp.dtype(jnp.bfloat16) in {x.dtype for x in jax.tree.leaves(narrow.params)}
    ids = IDS % narrow.config.vocab_size
    np.testing.assert_allclose(narrow(ids)[0], wide(ids)[0], atol=1e-5)
