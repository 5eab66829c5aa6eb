"""Gemma-2 as it is published: tensor names and ``config.json`` of the released models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .exchange import Published, Rule, check_fields, compute_dtype, rope_theta, types_of
from .gemma2 import Gemma2Config

# name inside a block -> (path inside ours, layout)
_BLOCK = {
    "input_layernorm.weight": ("input_norm.scale", "d -> d"),
    "self_attn.q_proj.weight": ("mixer.q_proj.kernel", "(n k) d -> d n k"),
    "self_attn.k_proj.weight": ("mixer.k_proj.kernel", "(g k) d -> d g k"),
    "self_attn.v_proj.weight": ("mixer.v_proj.kernel", "(g k) d -> d g k"),
    "self_attn.o_proj.weight": ("mixer.o_proj.kernel", "d (n k) -> n k d"),
    "post_attention_layernorm.weight": ("post_mixer_norm.scale", "d -> d"),
    "pre_feedforward_layernorm.weight": ("pre_ffn_norm.scale", "d -> d"),
    **{
        f"mlp.{x}_proj.weight": (f"ffn.{x}_proj.kernel", "f d -> d f")
        for x in ("gate", "up", "down")
    },
    "post_feedforward_layernorm.weight": ("post_ffn_norm.scale", "d -> d"),
}


def rules(config: Gemma2Config) -> list[Rule]:
    """The table for this configuration."""
    table = [
        # The head is the embedding; some files have it a second time.
        Rule(("model.embed_tokens.weight", "lm_head.weight"), "embed.embedding", "v d -> v d"),
        Rule("model.norm.weight", "final_norm.scale", "d -> d"),
    ]
    table += [
        Rule(f"model.layers.{i}.{name}", f"stack.{i}.{path}", layout)
        for i in range(config.num_layers)
        for name, (path, layout) in _BLOCK.items()
    ]
    return table


# Fields that a published configuration has under the same name, with what absent ones are.
_SAME_FIELDS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "num_attention_heads": 8,
    "head_dim": 256,
    "intermediate_size": 9216,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_RENAMED = {"num_hidden_layers": "num_layers", "num_key_value_heads": "num_kv_heads"}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
# Where positions are told, and what does nothing here.
_READ_ELSEWHERE = ("layer_types", "rope_parameters", "rope_scaling", "rope_theta")
_UNUSED = ("attention_dropout", "cache_implementation", "sliding_window_size")
_LAYER_TYPES = {"sliding": "sliding_attention", "full": "full_attention"}


def config_from_published(published: Mapping[str, Any]) -> Gemma2Config:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented; names it.
    """
    check_fields(
        published,
        types=types_of(Gemma2Config, {name: name for name in _SAME_FIELDS} | _RENAMED),
        required=_REQUIRED,
        known=(*_SAME_FIELDS, *_READ_ELSEWHERE, *_UNUSED),
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "hidden_act": ("gelu_pytorch_tanh", None),
            "attention_bias": (False,),
            "tie_word_embeddings": (True,),
            "use_bidirectional_attention": (False, None),
        },
    )
    values = {name: published.get(name, default) for name, default in _SAME_FIELDS.items()}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        values[name] = None if values[name] is None else float(values[name])
    config = Gemma2Config(
        **values,
        **{ours: published[name] for name, ours in _RENAMED.items()},
        rope_theta=rope_theta(published, 10000.0),
        dtype=compute_dtype(published),
    )
    layer_types = published.get("layer_types")
    if layer_types is not None and layer_types != _layer_types(config):
        raise InputError(
            f"config.json: layer_types={layer_types} is another order of layers, which is not "
            "implemented; only 'sliding_attention' and 'full_attention' in turn are"
        )
    return config


def config_to_published(config: Gemma2Config) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration."""
    return {
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        **{name: getattr(config, ours) for name, ours in _RENAMED.items()},
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": _layer_types(config),
        "max_position_embeddings": 8192,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
    }


def _layer_types(config: Gemma2Config) -> list[str]:
    return [_LAYER_TYPES[kind] for kind in config.kinds]


PUBLISHED = Published(
    model_types=("gemma2",),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
    # Buffers of older files.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
