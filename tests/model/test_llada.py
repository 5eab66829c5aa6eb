"""LLaDA: published sizes, names, configurations and numbers; every way of reading a canvas."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import InputError, Model
from jaxalope.layers.stack import plan, restack, unstack
from jaxalope.model import (
    Gemma2Config,
    LLaDAConfig,
    build_model,
    config_from_dict,
    config_to_dict,
    decoding_of,
)
from jaxalope.model.exchange import layout_of_model
from jaxalope.model.llada_weights import PUBLISHED, config_from_published, config_to_published
from jaxalope.sharding import AxisRules, MeshConfig, abstract, init_params, make_mesh, use_mesh

TINY = LLaDAConfig.tiny()
PRESETS = ["llada_8b", "llada_1b", "tiny", "demo"]

# The config.json of GSAI-ML/LLaDA-8B-Base.
PUBLISHED_8B = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def shapes_of(config):
    return abstract(lambda key: build_model(config, key))[1]


def random_model(config, seed=0):
    """A model whose weights are large enough for every layer to matter."""
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        leaf + jax.random.normal(k, leaf.shape) / np.sqrt(leaf.shape[-1])
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return Model(config, graphdef, jax.tree.unflatten(treedef, leaves))


def tokens_of(shape, seed=3):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)


@pytest.fixture(scope="module", params=[None, 4], ids=["one block", "blocks of 4"])
def model(request):
    return random_model(dataclasses.replace(TINY, block_size=request.param))


class TestSizes:
    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("tied", [False, True])
    def test_count_equals_the_tree(self, name, tied):
        config = dataclasses.replace(getattr(LLaDAConfig, name)(), tie_word_embeddings=tied)
        shapes = shapes_of(config)
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert count == config.num_params()
        assert ("lm_head" in shapes) != tied
        table = config.vocab_size * config.hidden_size
        assert config.num_params(embedding=False, head=False) == count - table * (2 - tied)
        assert config.num_params(embedding=False) == count - table * (not tied)

    def test_published_totals(self):
        config = LLaDAConfig.llada_8b()
        assert config.num_params() == 8_015_581_184
        assert round(config.num_params(embedding=False, head=False) / 1e9, 2) == 6.98
        assert round(LLaDAConfig.llada_1b().num_params() / 1e9, 2) == 1.49

    def test_flops(self):
        """Every token sees every other; in blocks, half of them and half a block."""
        config = LLaDAConfig.llada_8b()
        matrices = 2 * config.num_params(embedding=False)
        one = 32 * 4 * 4096
        assert config.flops_per_token(4096) == 3 * (matrices + one * 4096)
        blocks = dataclasses.replace(config, block_size=32)
        assert blocks.flops_per_token(4096) == 3 * (matrices + one * 2064)
        assert blocks.flops_per_token(8) == 3 * (matrices + one * 8)


class TestPublished:
    def test_logits_are_the_published_models(self, fixtures):
        """A float32 forward of the public code; left padding is hidden and shifts nothing."""
        folder = fixtures / "llada_tiny"
        model, golden = jaxalope.load(folder), np.load(folder / "io.npz")
        ids, kept = golden["input_ids"].astype(np.int32), golden["attention_mask"].astype(np.int32)
        assert not kept.all()
        np.testing.assert_allclose(model(ids)[0], golden["logits"], atol=1e-3)
        places = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
        for positions in (places, None):
            logits, _ = model(ids, segment_ids=kept, positions=positions)
            valid = kept == 1
            np.testing.assert_allclose(logits[valid], golden["logits_padmask"][valid], atol=1e-3)

    def test_a_directory_comes_out_as_it_went_in(self, fixtures, tmp_path):
        folder = fixtures / "llada_tiny"
        jaxalope.save(jaxalope.load(folder), tmp_path / "out")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        before, after = load_file(folder / "model.safetensors"), load_file(file)
        assert before.keys() == after.keys()
        assert all(before[n].tobytes() == after[n].tobytes() for n in before)
        theirs = json.loads((folder / "config.json").read_text())
        ours = json.loads((tmp_path / "out/config.json").read_text())
        assert {n: v for n, v in ours.items() if n != "torch_dtype"} == theirs

    @pytest.mark.parametrize(
        "changes",
        [{}, {"block_size": 4, "logit_shift": True, "bos_token_id": 257}, {"num_kv_heads": 4}],
    )
    def test_ours_goes_out_and_comes_back(self, changes, tmp_path):
        model = random_model(dataclasses.replace(TINY, **changes))
        jaxalope.save(model, tmp_path / "out")
        again = jaxalope.load(tmp_path / "out")
        assert again.config == model.config
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)

    def test_a_tied_model_has_no_head_and_may_have_a_copy(self, tmp_path):
        model = random_model(dataclasses.replace(TINY, tie_word_embeddings=True))
        jaxalope.save(model, tmp_path / "out")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        tensors = load_file(file)
        assert "model.transformer.ff_out.weight" not in tensors
        ids = jnp.asarray(tokens_of((1, 5)))
        hidden = model.module().hidden_states(ids)[0]
        expected = np.asarray(hidden) @ tensors["model.transformer.wte.weight"].T
        np.testing.assert_allclose(model(ids)[0], expected, atol=1e-3)
        tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        again = jaxalope.load(tmp_path / "out")
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
        tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"] + 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=r"wte\.weight and \S+ff_out\.weight are one tensor"):
            jaxalope.load(tmp_path / "out")

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_tensor_has_its_name_and_shape(self, name):
        c = getattr(LLaDAConfig, name)()
        d, f, kv = c.hidden_size, c.intermediate_size, c.num_kv_heads * c.head_dim
        expected = {"wte": (c.vocab_size, d), "ln_f": (d,), "ff_out": (c.vocab_size, d)}
        for i in range(c.num_layers):
            block = {
                "attn_norm": (d,),
                "ff_norm": (d,),
                "q_proj": (d, d),
                "k_proj": (kv, d),
                "v_proj": (kv, d),
                "attn_out": (d, d),
                "ff_proj": (f, d),
                "up_proj": (f, d),
                "ff_out": (d, f),
            }
            expected |= {f"blocks.{i}.{n}": shape for n, shape in block.items()}
        found = {
            piece.name: piece.layout.published_shape(leaf.own_shape)
            for leaf in layout_of_model(PUBLISHED, c, shapes_of(c))
            for piece in leaf.pieces
        }
        assert found == {f"model.transformer.{n}.weight": shape for n, shape in expected.items()}

    def test_config_of_the_8b_model(self):
        config = config_from_published(PUBLISHED_8B | {"torch_dtype": "bfloat16"})
        assert dataclasses.replace(config, remat="full") == LLaDAConfig.llada_8b()
        written = config_to_published(config)
        for name in written.keys() & PUBLISHED_8B.keys():
            assert written[name] == PUBLISHED_8B[name], name
        assert config_from_published(written) == dataclasses.replace(config, dtype="float32")

    def test_ids_come_from_the_file_or_are_the_known_ones(self):
        """iLLaDA's mask is 5. A file of LLaDA's vocabulary may leave ids out, another may not."""
        other = {"mask_token_id": 5, "eos_token_id": 2, "vocab_size": 50000, "embedding_size": None}
        config = config_from_published(PUBLISHED_8B | other)
        assert (config.mask_token_id, config.eos_token_id, config.bos_token_id) == (5, 2, None)
        assert config.vocab_size == 50000
        padded = config_from_published(PUBLISHED_8B | other | {"embedding_size": 50048})
        assert padded.vocab_size == 50048
        bare = {n: v for n, v in PUBLISHED_8B.items() if not n.endswith("_token_id")}
        known = config_from_published(bare)
        assert (known.mask_token_id, known.eos_token_id) == (126336, 126081)
        with pytest.raises(InputError, match=r"no mask_token_id, and vocab_size=50000 is not"):
            config_from_published(bare | {"vocab_size": 50000})

    def test_other_spellings(self):
        changes = {"mlp_hidden_size": None, "n_kv_heads": None}
        config = config_from_published(PUBLISHED_8B | changes)
        assert (config.intermediate_size, config.num_kv_heads) == (16384, 32)
        one = config_from_published(PUBLISHED_8B | {"multi_query_attention": True})
        assert one.num_kv_heads == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_type": "sequential"}, "block_type='sequential'"),
            ({"include_qkv_bias": True}, "include_qkv_bias=True"),
            ({"layer_norm_type": "default"}, "layer_norm_type='default'"),
            ({"scale_logits": True}, "scale_logits=True"),
            ({"rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        ],
    )
    def test_other_computations_are_refused(self, changes, message):
        with pytest.raises(InputError, match=message):
            config_from_published(PUBLISHED_8B | changes)


class TestCanvas:
    def test_packed_and_padded_equal_separate(self, model):
        ids = tokens_of((2, 22))
        segments = np.ones((2, 22), np.int32)
        segments[:, 13:] = 2
        segments[0, :2] = 0
        segments[1, -3:] = 0
        packed, _ = model(ids, segment_ids=segments)
        for row in range(2):
            for document in (1, 2):
                own = segments[row] == document
                alone, _ = model(ids[row : row + 1, own])
                np.testing.assert_allclose(packed[row, own], alone[0], atol=2e-4)

    def test_scan_equals_unrolled(self, model):
        config = dataclasses.replace(model.config, scan_layers=False)
        graphdef, _, _ = abstract(lambda key: build_model(config, key))
        assert plan(model.config.kinds).repeats == 3
        blocks = unstack(model.params["stack"], plan(model.config.kinds))
        stack = restack(blocks, plan(config.kinds, scan=False))
        other = Model(config, graphdef, {**model.params, "stack": stack})
        ids, positions = tokens_of((2, 12)), np.array([[3, 9], [11, 0]], np.int32)
        rows = np.arange(2)[:, None]
        cache, caches = model.init_cache(2, 16), other.init_cache(2, 16)
        for piece, places in ((ids, None), (ids[rows, positions], positions)):
            expected, cache = model(piece, cache, positions=places)
            found, caches = other(piece, caches, positions=places)
            np.testing.assert_allclose(found, expected, atol=2e-4)
        np.testing.assert_allclose(expected, model(ids)[0][rows, positions], atol=2e-4)

    def test_the_cache_grows_to_the_last_position_and_no_further(self, model):
        """Ragged canvases: each row is as alone, and padding neither writes nor counts."""
        ids, own = tokens_of((2, 12)), np.array([7, 12])
        valid = (np.arange(12) < own[:, None]).astype(np.int32)
        places = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
        for positions in (places, None):
            logits, cache = model(
                ids, model.init_cache(2, 12), segment_ids=valid, positions=positions
            )
            assert cache.length.tolist() == [7, 12]
            for row, n in enumerate(own):
                alone, _ = model(ids[row : row + 1, :n])
                np.testing.assert_allclose(logits[row, :n], alone[0], atol=2e-4)
        logits, cache = model(ids[:, 4:6], cache, positions=places[:, 4:6])
        assert cache.length.tolist() == [7, 12]
        back = dataclasses.replace(cache, length=jnp.array([4, 4]))
        _, back = model(ids[:, 4:6], back, positions=places[:, 4:6])
        assert back.length.tolist() == [6, 6]

    def test_clean_text_beside_a_noisy_one(self, model):
        noisy, clean = (jnp.asarray(tokens_of((1, 10), seed)) for seed in (3, 4))
        module = model.module()
        hidden, none, _ = module.hidden_states(noisy, clean=clean)
        assert none is None and hidden.shape == (1, 10, 32)
        block = model.config.block_size or 10
        for start in range(0, 10, block):
            text = jnp.concatenate([clean[:, :start], noisy[:, start : start + block]], axis=1)
            alone = module.hidden_states(text)[0][:, start:]
            np.testing.assert_allclose(hidden[:, start : start + block], alone, atol=2e-4)
        with pytest.raises(InputError, match="clean= is read without a cache"):
            module.hidden_states(noisy, model.init_cache(1, 10), clean=clean)

    def test_gradients_reach_every_parameter_and_remat_does_not_change_them(self, model):
        def gradients(config):
            graphdef, _, _ = abstract(lambda key: build_model(config, key))

            def loss(params, noisy, clean):
                module = nnx.merge(graphdef, params)
                hidden = module.hidden_states(noisy, clean=clean)[0]
                return jnp.mean(jnp.sin(module.logits(hidden)))

            # All ids, so that every row of the embedding is read.
            noisy, clean = np.arange(320).reshape(8, 40), np.arange(320)[::-1].reshape(8, 40)
            ids = noisy.astype(np.int32), clean.astype(np.int32)
            return jax.jit(jax.grad(loss))(model.params, *ids)

        grads = gradients(model.config)
        for path, grad in jax.tree.leaves_with_path(grads):
            assert np.isfinite(grad).all(), path
            layers = grad if path[1].key == "body" else grad[None]
            assert all(np.abs(layer).max() > 0 for layer in layers), path
        again = gradients(dataclasses.replace(model.config, remat="full"))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), again, grads
        )


MESHES = {
    "split": (MeshConfig(data=2, fsdp=2, tensor=2), AxisRules()),
    "auto, keys whole": (
        MeshConfig(data=2, tensor=4, explicit=False),
        AxisRules(kv_heads=None),
    ),
}


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(name):
    mesh, rules = MESHES[name]
    model = random_model(dataclasses.replace(TINY, block_size=4))
    ids, places = tokens_of((4, 16)), np.tile(np.arange(4, 8, dtype=np.int32), (4, 1))

    def loss(params, noisy, clean):
        module = nnx.merge(model.graphdef, params)
        hidden = module.hidden_states(noisy, clean=clean)[0]
        return jnp.mean(jnp.sin(module.logits(hidden)))

    def run(model, params, ids, places):
        value = jax.jit(jax.value_and_grad(loss))(params, ids, (ids + 1) % 320)
        logits, cache = model(ids, model.init_cache(4, 24))
        return value, logits, model(ids[:, :4], cache, positions=places)[0]

    expected = run(model, model.params, ids, places)
    mesh = make_mesh(mesh)
    sharded = model.on(mesh, rules)
    with use_mesh(mesh, rules):
        rows = jax.NamedSharding(mesh, rules.spec(("batch", "seq")))
        ids, places = jax.device_put(ids, rows), jax.device_put(places, rows)
        found = run(sharded, sharded.params, ids, places)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected
    )


@pytest.mark.parametrize("scan", [True, False])
def test_published_initialization_depends_on_inputs_and_depth(scan):
    """The standard deviation of each matrix, z below 5; nothing beyond three of the nominal one."""
    config = dataclasses.replace(
        LLaDAConfig.tiny(), hidden_size=64, initialization="mitchell", scan_layers=scan
    )
    model = build_model(config, jax.random.key(0))
    d, f = config.hidden_size, config.intermediate_size
    found = {"embed": (model.embed.embedding, d, 1), "head": (model.lm_head.kernel, d, 1)}
    parts = unstack(nnx.to_pure_dict(nnx.split(model.stack)[1]), model.stack.plan)
    for i, block in enumerate(parts):
        for name in ("q_proj", "k_proj", "v_proj"):
            found[f"{name} {i}"] = (block["mixer"][name]["kernel"], d, 1)
        for name in ("gate_proj", "up_proj"):
            found[f"{name} {i}"] = (block["ffn"][name]["kernel"], d, 1)
        found[f"o_proj {i}"] = (block["mixer"]["o_proj"]["kernel"], d, 2 * (i + 1))
        found[f"down_proj {i}"] = (block["ffn"]["down_proj"]["kernel"], f, 2 * (i + 1))
    assert len(found) == 2 + 7 * config.num_layers
    for name, (kernel, inputs, deep) in found.items():
        x = np.asarray(kernel[...]) * math.sqrt(inputs * deep)
        assert np.abs(x).max() <= 3.0001, name
        # A standard normal that is cut at three has this deviation, and a kurtosis below 3.
        assert abs(x.std() / 0.98658 - 1) < 5 / math.sqrt(2 * x.size), name
    with pytest.raises(InputError, match=r"model\.initialization='xavier'"):
        dataclasses.replace(config, initialization="xavier")


def test_config_is_json_and_checked():
    values = json.loads(json.dumps(config_to_dict(TINY)))
    assert config_from_dict(values) == TINY
    assert decoding_of(TINY) == "masked_diffusion" and "decoding" not in values
    assert decoding_of(Gemma2Config.tiny()) == "next_token"
    for changes, message in (
        ({"mask_token_id": 320}, "mask_token_id=320 is outside the vocabulary of 320"),
        ({"mask_token_id": -1}, "mask_token_id=-1 is outside"),
        ({"eos_token_id": 259}, "eos_token_id=259 is model.mask_token_id too"),
        ({"num_kv_heads": 3}, "num_attention_heads=4 is not a multiple of model.num_kv_heads=3"),
        ({"hidden_size": 36, "num_kv_heads": 4}, "= 9 dimensions a head"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of model.num_attention_heads=4"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"rope_theta": 0.0}, r"rope_theta=0\.0 must be positive"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(TINY, **changes)
