"""GPT-NeoX: published sizes, names and configurations, and what only this family does."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import InputError, Model
from jaxalope.model import GPTNeoXConfig, build_model, config_from_dict, config_to_dict
from jaxalope.model.exchange import layout_of_model
from jaxalope.model.gpt_neox_weights import PUBLISHED, config_from_published, config_to_published
from jaxalope.sharding import abstract, init_params

TINY = GPTNeoXConfig.tiny()
# name -> all parameters, those without embedding and head: the Pythia paper's table.
PYTHIA = {
    "pythia_70m": (70_426_624, 18_915_328),
    "pythia_160m": (162_322_944, 85_056_000),
    "pythia_410m": (405_334_016, 302_311_424),
    "pythia_1b": (1_011_781_632, 805_736_448),
    "pythia_1_4b": (1_414_647_808, 1_208_602_624),
    "pythia_2_8b": (2_775_208_960, 2_517_652_480),
    "pythia_6_9b": (6_857_302_016, 6_444_163_072),
    "pythia_12b": (11_846_072_320, 11_327_027_200),
}

# The config.json of EleutherAI/pythia-6.9b.
PUBLISHED_6_9B = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 50432,
}


def shapes_of(config):
    return abstract(lambda key: build_model(config, key))[1]


@pytest.fixture(scope="module")
def tiny():
    graphdef, params = init_params(lambda key: build_model(TINY, key), jax.random.key(0))
    leaves, treedef = jax.tree.flatten(params)
    noise = [0.3 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    return Model(TINY, graphdef, jax.tree.unflatten(treedef, noise))


class TestSizes:
    @pytest.mark.parametrize("name", [*PYTHIA, "tiny"])
    def test_count_equals_the_tree(self, name):
        config = getattr(GPTNeoXConfig, name)()
        leaves = jax.tree.leaves(shapes_of(config))
        assert sum(leaf.size for leaf in leaves) == config.num_params()

    @pytest.mark.parametrize("name", PYTHIA)
    def test_published_totals(self, name):
        config = getattr(GPTNeoXConfig, name)()
        without = config.num_params(embedding=False, head=False)
        assert (config.num_params(), without) == PYTHIA[name]

    def test_rotary_dimensions(self):
        names = ("pythia_160m", "pythia_1b", "pythia_2_8b", "pythia_6_9b")
        assert [getattr(GPTNeoXConfig, n)().rotary_dim for n in names] == [16, 64, 20, 32]

    def test_flops(self):
        config = GPTNeoXConfig.pythia_1b()
        matrices = 2 * config.num_params(embedding=False)
        attention = 16 * 1024 * 4 * 2048  # layers, tokens seen, two products, width
        assert config.flops_per_token(2048) == 3 * (matrices + attention)


class TestPublished:
    @pytest.mark.parametrize("name", ["pythia_410m", "pythia_6_9b", "tiny"])
    def test_every_tensor_has_its_name_and_shape(self, name):
        c = getattr(GPTNeoXConfig, name)()
        d, f = c.hidden_size, c.intermediate_size
        expected = {
            "gpt_neox.embed_in.weight": (c.vocab_size, d),
            "gpt_neox.final_layer_norm.weight": (d,),
            "gpt_neox.final_layer_norm.bias": (d,),
            "embed_out.weight": (c.vocab_size, d),
        }
        for i in range(c.num_layers):
            block = {
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
                "attention.query_key_value": (3 * d, d),
                "attention.dense": (d, d),
                "mlp.dense_h_to_4h": (f, d),
                "mlp.dense_4h_to_h": (d, f),
            }
            for part, shape in block.items():
                expected[f"gpt_neox.layers.{i}.{part}.weight"] = shape
                expected[f"gpt_neox.layers.{i}.{part}.bias"] = shape[:1]
        leaves = layout_of_model(PUBLISHED, c, shapes_of(c))
        found = {
            piece.name: piece.layout.published_shape(leaf.own_shape)
            for leaf in leaves
            for piece in leaf.pieces
        }
        assert found == expected

    def test_config_of_the_6_9b_model(self):
        config = config_from_published(PUBLISHED_6_9B)
        assert dataclasses.replace(config, remat="full") == GPTNeoXConfig.pythia_6_9b()
        written = config_to_published(config)
        for name in written.keys() & PUBLISHED_6_9B.keys():
            assert written[name] == PUBLISHED_6_9B[name], name
        assert config_from_published(written) == dataclasses.replace(config, dtype="float32")

    def test_newer_files_keep_positions_elsewhere(self):
        old = {k: v for k, v in PUBLISHED_6_9B.items() if not k.startswith("rotary")}
        rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
        config = config_from_published(old | {"rope_parameters": rope})
        assert (config.rope_theta, config.rotary_pct) == (500.0, 0.5)
        assert config_from_published(old).rotary_pct == 0.25

    def test_other_computations_are_refused(self):
        for changes, message in (
            ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'"),
            ({"attention_bias": False}, "attention_bias=False"),
            ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ):
            with pytest.raises(InputError, match=message):
                config_from_published(PUBLISHED_6_9B | changes)

    def test_a_directory_goes_out_and_comes_back(self, tiny, tmp_path):
        jaxalope.save(tiny, tmp_path / "neox")
        again = jaxalope.load(tmp_path / "neox")
        assert again.config == tiny.config
        jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
        # A head's query, key and value stand together.
        (file,) = (tmp_path / "neox").glob("*.safetensors")
        tensors = load_file(file)
        fused = tensors["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(2, 3, 16, 32)
        biases = tensors["gpt_neox.layers.1.attention.query_key_value.bias"].reshape(2, 3, 16)
        mixer = tiny.params["stack"]["body"][0]["mixer"]
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            np.testing.assert_array_equal(fused[:, j].transpose(2, 0, 1), mixer[name]["kernel"][1])
            np.testing.assert_array_equal(biases[:, j], mixer[name]["bias"][1])

    def test_old_buffers_and_the_newer_name_of_the_head(self, tiny, tmp_path):
        jaxalope.save(tiny, tmp_path / "neox")
        (file,) = (tmp_path / "neox").glob("*.safetensors")
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        for i in range(3):
            prefix = f"gpt_neox.layers.{i}.attention."
            tensors[prefix + "bias"] = np.ones((1, 1, 8, 8), bool)
            tensors[prefix + "masked_bias"] = np.full((), -1e9, np.float32)
            tensors[prefix + "rotary_emb.inv_freq"] = np.ones(2, np.float32)
        save_file(tensors, file, metadata={"format": "pt"})
        again = jaxalope.load(tmp_path / "neox")
        jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)


@pytest.mark.parametrize("parallel", [True, False])
def test_residuals(tiny, parallel):
    """Both norms read the block's input, or the second what attention left."""
    config = dataclasses.replace(TINY, use_parallel_residual=parallel, scan_layers=False)
    block = build_model(config, jax.random.key(1)).stack.head[0]
    x = jax.random.normal(jax.random.key(2), (1, 5, 32))
    mixed, _ = block.mixer(block.input_norm(x))
    read = x if parallel else x + mixed
    expected = x + mixed + block.ffn(block.post_norm(read))
    np.testing.assert_allclose(block(x)[0], expected, atol=1e-5)
    other = x + mixed + block.ffn(block.post_norm(x + mixed if parallel else x))
    assert jnp.abs(other - expected).max() > 1e-4


def test_there_is_no_longest_text(tiny):
    """Positions beyond those of training are read as any other: a shift of all changes nothing."""
    ids = np.arange(12, dtype=np.int32)[None]
    far, _ = tiny(ids, positions=np.arange(12, dtype=np.int32)[None] + 5000)
    np.testing.assert_allclose(far, tiny(ids)[0], atol=2e-2)


def test_config_is_json_and_checked():
    values = json.loads(json.dumps(config_to_dict(TINY)))
    assert config_from_dict(values) == TINY
    for changes, message in (
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple"),
        ({"rotary_pct": 1.5}, r"rotary_pct=1\.5 must lie in 0\.\.1"),
        ({"rotary_pct": 0.2}, "an even number of a head's 16 dimensions"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0 must be positive"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(TINY, **changes)
    assert build_model(dataclasses.replace(TINY, rotary_pct=0.0), jax.random.key(0))
