"""Kimi Linear as it is published: tensor names and ``config.json`` of the released 48B-A3B.

A published matrix is ``[out, in]`` where ours is ``[in, out]`` with heads kept apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .exchange import (
    Published,
    Rule,
    check_fields,
    check_types,
    compute_dtype,
    object_of,
    types_of,
)
from .kimi_linear import KimiLinearConfig

_LINEAR = "f d -> d f"
_TO_HEADS = "(n k) d -> d n k"
_FROM_HEADS = "d (n k) -> n k d"
_CONV = "(n k) 1 w -> n k w"
_VECTOR = "d -> d"

# name inside a block -> (path inside ours, layout)
_KDA = {
    **{f"{x}_proj.weight": (f"{x}_proj.kernel", _TO_HEADS) for x in "qkv"},
    **{f"{x}_conv1d.weight": (f"{x}_conv", _CONV) for x in "qkv"},
    # One value a head behind axes of size 1, or flat, there sometimes with zeros behind the heads.
    "A_log": ("A_log", ("1 1 h 1 -> h", "h* -> h")),
    "dt_bias": ("dt_bias", "(n k) -> n k"),
    "f_a_proj.weight": ("f_a_proj.kernel", _LINEAR),
    "f_b_proj.weight": ("f_b_proj.kernel", _TO_HEADS),
    "b_proj.weight": ("b_proj.kernel", _LINEAR),
    "g_a_proj.weight": ("g_a_proj.kernel", _LINEAR),
    "g_b_proj.weight": ("g_b_proj.kernel", _TO_HEADS),
    "o_norm.weight": ("o_norm.scale", _VECTOR),
    "o_proj.weight": ("o_proj.kernel", _FROM_HEADS),
}
_MLA = {
    "q_proj.weight": ("q_proj.kernel", _TO_HEADS),
    "kv_a_proj_with_mqa.weight": ("kv_a_proj.kernel", _LINEAR),
    "kv_a_layernorm.weight": ("kv_a_norm.scale", _VECTOR),
    "kv_b_proj.weight": ("kv_b_proj.kernel", _TO_HEADS),
    "o_proj.weight": ("o_proj.kernel", _FROM_HEADS),
}
_GATED = ("gate", "up", "down")


def rules(config: KimiLinearConfig) -> list[Rule]:
    """The table for this configuration."""
    table = [
        Rule("model.embed_tokens.weight", "embed.embedding", "v d -> v d"),
        Rule("model.norm.weight", "final_norm.scale", _VECTOR),
        Rule("lm_head.weight", "lm_head.kernel", _LINEAR),
    ]
    for i, (mixer, ffn) in enumerate(config.kinds):
        theirs, ours = f"model.layers.{i}.", f"stack.{i}."
        table += [
            Rule(theirs + "input_layernorm.weight", ours + "input_norm.scale", _VECTOR),
            Rule(theirs + "post_attention_layernorm.weight", ours + "post_norm.scale", _VECTOR),
        ]
        table += [
            Rule(f"{theirs}self_attn.{name}", f"{ours}mixer.{path}", layout)
            for name, (path, layout) in (_KDA if mixer == "kda" else _MLA).items()
        ]
        table += (_dense if ffn == "dense" else _moe)(theirs, ours + "ffn.", config)
    return table


def _dense(theirs: str, ours: str, config: KimiLinearConfig) -> list[Rule]:
    del config
    # transformers writes these under the mixture's name.
    return [
        Rule(
            (f"{theirs}mlp.{x}_proj.weight", f"{theirs}block_sparse_moe.{x}_proj.weight"),
            f"{ours}{x}_proj.kernel",
            _LINEAR,
        )
        for x in _GATED
    ]


def _moe(theirs: str, ours: str, config: KimiLinearConfig) -> list[Rule]:
    theirs += "block_sparse_moe."
    table = [
        Rule(theirs + "gate.weight", ours + "router.kernel", _LINEAR),
        Rule(theirs + "gate.e_score_correction_bias", ours + "router.bias", "e -> e"),
        Rule(theirs + "experts.{e}.w1.weight", ours + "experts.gate", "f d -> e d f"),
        Rule(theirs + "experts.{e}.w3.weight", ours + "experts.up", "f d -> e d f"),
        Rule(theirs + "experts.{e}.w2.weight", ours + "experts.down", "d f -> e f d"),
    ]
    if config.num_shared_experts:
        table += [
            Rule(
                f"{theirs}shared_experts.{x}_proj.weight", f"{ours}shared.{x}_proj.kernel", _LINEAR
            )
            for x in _GATED
        ]
    return table


# Fields that a published configuration names as ours does.
_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_token",
    "num_shared_experts",
    "first_k_dense_replace",
    "num_expert_group",
    "topk_group",
    "moe_renormalize",
    "routed_scaling_factor",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_RENAMED = {"num_hidden_layers": "num_layers"}
# Of its `linear_attn_config`.
_LINEAR_ATTN = {
    "kda_layers": "kda_layers",
    "full_attn_layers": "full_attn_layers",
    "num_heads": "kda_num_heads",
    "head_dim": "kda_head_dim",
    "short_conv_kernel_size": "short_conv_kernel_size",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "linear_attn_config",
)
# Published options that have one value here; another one is another computation.
_FIXED: dict[str, Any] = {
    "q_lora_rank": None,
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Fields without a meaning for these models, whose positions are not rotated and heads not grouped,
# and what transformers says a second time.
_UNUSED = (
    "head_dim",
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_head_dim",
    "linear_num_heads",
    "mlp_layer_types",
    "num_key_value_heads",
    "qk_head_dim",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_grouped_topk",
)


def config_from_published(published: Mapping[str, Any]) -> KimiLinearConfig:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented; names it.
    """
    check_fields(
        published,
        types=types_of(KimiLinearConfig, {name: name for name in _SAME_FIELDS} | _RENAMED),
        required=_REQUIRED,
        known=(*_SAME_FIELDS, *_UNUSED),
        fixed={
            **{name: (value,) for name, value in _FIXED.items()},
            "attention_bias": (False,),
            "num_nextn_predict_layers": (0, None),
        },
    )
    linear = object_of(published, "linear_attn_config")
    absent = [name for name in _LINEAR_ATTN if name not in linear]
    if absent:
        raise InputError(f"config.json: linear_attn_config has no {', '.join(absent)}")
    check_types(linear, types_of(KimiLinearConfig, _LINEAR_ATTN), "config.json: linear_attn_config")
    return KimiLinearConfig(
        **{name: published[name] for name in _SAME_FIELDS if name in published},
        num_layers=published["num_hidden_layers"],
        kda_layers=tuple(linear["kda_layers"]),
        full_attn_layers=tuple(linear["full_attn_layers"]),
        kda_num_heads=linear["num_heads"],
        kda_head_dim=linear["head_dim"],
        short_conv_kernel_size=linear["short_conv_kernel_size"],
        dtype=compute_dtype(published),
    )


def config_to_published(config: KimiLinearConfig) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration.

    Raises:
        InputError: a field that published configurations have no name for.
    """
    if config.kda_num_value_heads not in (None, config.kda_num_heads):
        unnamed = "kda_num_value_heads"
    elif config.kda_gate_lower_bound is not None:
        unnamed = "kda_gate_lower_bound"
    else:
        unnamed = None
    if unnamed is not None:
        raise InputError(
            f"model.{unnamed}={getattr(config, unnamed)} has no place in a published config.json"
        )
    return {
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        **_FIXED,
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_attention_heads,
        "use_grouped_topk": True,
        "linear_attn_config": {
            "head_dim": config.kda_head_dim,
            "num_heads": config.kda_num_heads,
            "short_conv_kernel_size": config.short_conv_kernel_size,
            "kda_layers": list(config.kda_layers),
            "full_attn_layers": list(config.full_attn_layers),
        },
    }


PUBLISHED = Published(
    model_types=("kimi_linear",),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
)
