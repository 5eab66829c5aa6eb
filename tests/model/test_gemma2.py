"""Gemma-2: published sizes, names and configurations, and what only this family does."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxalope
from jaxalope import InputError, Model
from jaxalope.model import Gemma2Config, build_model, config_from_dict, config_to_dict
from jaxalope.model.exchange import layout_of_model
from jaxalope.model.gemma2_weights import PUBLISHED, config_from_published, config_to_published
from jaxalope.sharding import abstract, init_params

TINY = Gemma2Config.tiny()
PRESETS = ["gemma2_2b", "gemma2_9b", "gemma2_27b", "tiny"]

# The config.json of google/gemma-2-27b.
PUBLISHED_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def shapes_of(config):
    return abstract(lambda key: build_model(config, key))[1]


@pytest.fixture(scope="module")
def tiny():
    graphdef, params = init_params(lambda key: build_model(TINY, key), jax.random.key(0))
    return Model(TINY, graphdef, jax.tree.map(lambda x: 3 * x, params))


class TestSizes:
    @pytest.mark.parametrize("name", PRESETS)
    def test_count_equals_the_tree(self, name):
        config = getattr(Gemma2Config, name)()
        leaves = jax.tree.leaves(shapes_of(config))
        assert sum(leaf.size for leaf in leaves) == config.num_params()

    def test_published_totals(self):
        totals = [getattr(Gemma2Config, name)().num_params() for name in PRESETS[:3]]
        assert totals == [2_614_341_888, 9_241_705_984, 27_227_128_320]

    def test_flops(self):
        config = Gemma2Config.gemma2_2b()
        matrices = 2 * config.num_params()  # Products with the table, which is the head, included.
        for length, seen in ((4096, 2048 + 2048), (8192, 4096 + 3072)):
            attention = 13 * seen * 4 * 8 * 256
            assert config.flops_per_token(length) == 3 * (matrices + attention)
        assert config.flops_per_token(0) == 3 * matrices


class TestPublished:
    @pytest.mark.parametrize("name", PRESETS)
    def test_every_tensor_has_its_name_and_shape(self, name):
        c = getattr(Gemma2Config, name)()
        d, f, k = c.hidden_size, c.intermediate_size, c.head_dim
        expected = {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
        for i in range(c.num_layers):
            block = {
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
                "pre_feedforward_layernorm": (d,),
                "post_feedforward_layernorm": (d,),
                "self_attn.q_proj": (c.num_attention_heads * k, d),
                "self_attn.k_proj": (c.num_kv_heads * k, d),
                "self_attn.v_proj": (c.num_kv_heads * k, d),
                "self_attn.o_proj": (d, c.num_attention_heads * k),
                "mlp.gate_proj": (f, d),
                "mlp.up_proj": (f, d),
                "mlp.down_proj": (d, f),
            }
            expected |= {f"model.layers.{i}.{n}.weight": shape for n, shape in block.items()}
        leaves = layout_of_model(PUBLISHED, c, shapes_of(c))
        found = {
            piece.name: piece.layout.published_shape(leaf.own_shape)
            for leaf in leaves
            for piece in leaf.pieces
        }
        assert found == expected

    def test_config_of_the_27b_model(self):
        config = config_from_published(PUBLISHED_27B | {"torch_dtype": "bfloat16"})
        assert dataclasses.replace(config, remat="full") == Gemma2Config.gemma2_27b()
        assert config_from_published(PUBLISHED_27B).dtype == "float32"
        written = config_to_published(config)
        for name in written.keys() & PUBLISHED_27B.keys():
            assert written[name] == PUBLISHED_27B[name], name
        assert config_from_published(written) == dataclasses.replace(config, dtype="float32")

    def test_other_computations_are_refused(self):
        for changes, message in (
            ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
            ({"attention_bias": True}, "attention_bias=True"),
            ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
            ({"layer_types": ["full_attention"] * 46}, "another order of layers"),
        ):
            with pytest.raises(InputError, match=message):
                config_from_published(PUBLISHED_27B | changes)
        capless = config_from_published(PUBLISHED_27B | {"attn_logit_softcapping": None})
        assert capless.attn_logit_softcapping is None
        several = PUBLISHED.config(PUBLISHED_27B | {"eos_token_id": [1, 107]}, dict)
        assert several.eos_token_id == 1

    def test_a_directory_goes_out_and_comes_back(self, tiny, tmp_path):
        jaxalope.save(tiny, tmp_path / "gemma2")
        again = jaxalope.load(tmp_path / "gemma2")
        assert again.config == tiny.config
        jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
        (file,) = (tmp_path / "gemma2").glob("*.safetensors")
        tensors = load_file(file)
        kernel = np.asarray(tiny.params["stack"]["body"][1]["mixer"]["k_proj"]["kernel"][1])
        rows = tensors["model.layers.3.self_attn.k_proj.weight"].reshape(2, 16, 32)
        np.testing.assert_array_equal(rows, kernel.transpose(1, 2, 0))
        # A copy of the tied head, as some files have it, holds nothing new, and is kept.
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        again = jaxalope.load(tmp_path / "gemma2")
        jax.tree.map(np.testing.assert_array_equal, again.params, tiny.params)
        jaxalope.save(again, tmp_path / "again")
        assert "lm_head.weight" in load_file(tmp_path / "again/model.safetensors")
        assert json.loads((tmp_path / "gemma2/config.json").read_text())["num_hidden_layers"] == 5


def test_embeddings_are_scaled_by_the_rounded_root(tiny):
    """The root of 2304 is 48; that of 3584, 59.87, is 59.75 in bfloat16."""
    assert float(jnp.asarray(math.sqrt(3584), jnp.bfloat16)) == 59.75
    for width, dtype, root in ((3584, "bfloat16", 59.75), (3584, "float32", math.sqrt(3584))):
        config = dataclasses.replace(TINY, hidden_size=width, vocab_size=4, num_layers=1)
        module = build_model(dataclasses.replace(config, dtype=dtype), jax.random.key(0))
        rows = np.asarray(module.embed.embedding[...].astype(dtype), np.float32)
        found = module.embed_tokens(jnp.arange(4)[None])[0]
        np.testing.assert_array_equal(found, jnp.asarray(rows * np.float32(root), dtype))


def test_logits_are_capped_products_with_the_table(tiny):
    module = tiny.module()
    hidden = 30 * jax.random.normal(jax.random.key(0), (1, 3, 32))
    expected = np.asarray(hidden) @ np.asarray(module.embed.embedding[...]).T
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(module.logits(hidden), 30 * np.tanh(expected / 30), atol=1e-4)
    open_end = dataclasses.replace(TINY, final_logit_softcapping=None)
    module.config = open_end
    np.testing.assert_allclose(module.logits(hidden), expected, atol=1e-4)


def test_what_a_layer_with_a_window_sees(tiny):
    """A change 7 tokens back reaches it, one 8 back does not; the layer after it sees both."""
    module = tiny.unrolled().module()
    x = jax.random.normal(jax.random.key(1), (1, 20, 32))
    sliding, full = module.stack.head[0].mixer, module.stack.head[1].mixer
    for mixer, reach in ((sliding, 8), (full, 20)):
        before, _ = mixer(x)
        after, _ = mixer(x.at[:, 3].add(1.0))
        changed = np.flatnonzero(np.abs(after - before).max((0, 2)))
        assert changed.tolist() == list(range(3, min(3 + reach, 20)))


def test_config_is_json_and_checked():
    values = json.loads(json.dumps(config_to_dict(TINY)))
    assert config_from_dict(values) == TINY
    for changes, message in (
        ({"num_kv_heads": 3}, "num_attention_heads=4 is not a multiple of model.num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"final_logit_softcapping": 0.0}, r"final_logit_softcapping=0\.0 must be positive"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"remat": "some"}, "remat='some'"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(TINY, **changes)
