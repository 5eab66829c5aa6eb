"""The published tensor names of Kimi Linear, and where each lies in our parameters.

One table serves both directions. Names are those of the released 48B-A3B safetensors; a published
matrix is ``[out, in]`` where ours is ``[in, out]`` with heads kept apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..errors import InputError
from ..layers.stack import plan, restack, unstack
from .kimi_linear import KimiLinearConfig

_KDA = {
    "q_proj.weight": ("q_proj.kernel", "linear"),
    "k_proj.weight": ("k_proj.kernel", "linear"),
    "v_proj.weight": ("v_proj.kernel", "linear"),
    "q_conv1d.weight": ("q_conv", "conv"),
    "k_conv1d.weight": ("k_conv", "conv"),
    "v_conv1d.weight": ("v_conv", "conv"),
    "A_log": ("A_log", "per_head"),
    "dt_bias": ("dt_bias", "flat"),
    "f_a_proj.weight": ("f_a_proj.kernel", "linear"),
    "f_b_proj.weight": ("f_b_proj.kernel", "linear"),
    "b_proj.weight": ("b_proj.kernel", "linear"),
    "g_a_proj.weight": ("g_a_proj.kernel", "linear"),
    "g_b_proj.weight": ("g_b_proj.kernel", "linear"),
    "o_norm.weight": ("o_norm.scale", "flat"),
    "o_proj.weight": ("o_proj.kernel", "linear_from_heads"),
}
_MLA = {
    "q_proj.weight": ("q_proj.kernel", "linear"),
    "kv_a_proj_with_mqa.weight": ("kv_a_proj.kernel", "linear"),
    "kv_a_layernorm.weight": ("kv_a_norm.scale", "flat"),
    "kv_b_proj.weight": ("kv_b_proj.kernel", "linear"),
    "o_proj.weight": ("o_proj.kernel", "linear_from_heads"),
}
_DENSE = {
    f"mlp.{name}_proj.weight": (f"{name}_proj.kernel", "linear") for name in ("gate", "up", "down")
}
_MOE = {
    "block_sparse_moe.gate.weight": ("router.kernel", "linear"),
    "block_sparse_moe.gate.e_score_correction_bias": ("router.bias", "flat"),
    "block_sparse_moe.experts.{e}.w1.weight": ("experts.gate", "experts"),
    "block_sparse_moe.experts.{e}.w3.weight": ("experts.up", "experts"),
    "block_sparse_moe.experts.{e}.w2.weight": ("experts.down", "experts"),
    **{
        f"block_sparse_moe.shared_experts.{name}_proj.weight": (
            f"shared.{name}_proj.kernel",
            "linear",
        )
        for name in ("gate", "up", "down")
    },
}


@dataclasses.dataclass(frozen=True)
class WeightRule:
    """One of our parameters and the published tensor it is (``{e}`` in the name: one an expert)."""

    name: str
    path: str
    rule: str
    block: int | None = None


def weight_rules(config: KimiLinearConfig) -> list[WeightRule]:
    """The table for this configuration; a ``path`` is inside its ``block`` (0-based), if any."""
    rules = [
        WeightRule("model.embed_tokens.weight", "embed.embedding", "flat"),
        WeightRule("model.norm.weight", "final_norm.scale", "flat"),
        WeightRule("lm_head.weight", "lm_head.kernel", "linear"),
    ]
    for i, (mixer, ffn) in enumerate(config.kinds):
        tables = [
            ("self_attn.", "mixer.", _KDA if mixer == "kda" else _MLA),
            ("", "ffn.", _DENSE if ffn == "dense" else _MOE),
        ]
        rules += [
            WeightRule(f"model.layers.{i}.{ours}.weight", path, "flat", i)
            for ours, path in (
                ("input_layernorm", "input_norm.scale"),
                ("post_attention_layernorm", "post_norm.scale"),
            )
        ]
        for prefix, target, table in tables:
            if ffn == "moe" and not config.num_shared_experts:
                table = {k: v for k, v in table.items() if "shared" not in k}
            rules += [
                WeightRule(f"model.layers.{i}.{prefix}{name}", target + path, rule, i)
                for name, (path, rule) in table.items()
            ]
    return rules


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
# Published options that have one value here; another one is another computation.
_FIXED = {
    "q_lora_rank": None,
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def config_from_published(published: Mapping[str, Any]) -> KimiLinearConfig:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented; names it.
    """
    for name, value in _FIXED.items():
        if published.get(name, value) != value:
            raise InputError(
                f"config.json: {name}={published[name]!r} is not supported; only {value!r} is"
            )
    linear = published["linear_attn_config"]
    return KimiLinearConfig(
        **{name: published[name] for name in _SAME_FIELDS if name in published},
        num_layers=published["num_hidden_layers"],
        kda_layers=tuple(linear["kda_layers"]),
        full_attn_layers=tuple(linear["full_attn_layers"]),
        kda_num_heads=linear["num_heads"],
        kda_head_dim=linear["head_dim"],
        short_conv_kernel_size=linear["short_conv_kernel_size"],
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


def from_published(
    tensors: Mapping[str, Any], config: KimiLinearConfig, shapes: dict
) -> dict[Any, Any]:
    """Our parameters (float32 NumPy, a nested dict) from published tensors.

    Args:
        tensors: by published name.
        config: of the model.
        shapes: our abstract parameters, as :func:`~jaxalope.sharding.abstract` returns them.

    Raises:
        InputError: tensors that are missing, unknown, or of another shape, all of them by name.
    """
    rules, wanted = weight_rules(config), set()
    layers = plan(config.kinds, config.scan_layers)
    blocks = _unstack_shapes(shapes["stack"], layers)
    out: dict = {"stack": [{} for _ in config.kinds]}
    problems = []
    for rule in rules:
        root = shapes if rule.block is None else blocks[rule.block]
        shape = _get(root, rule.path).shape
        names = _names(rule, config)
        wanted.update(names)
        absent = [name for name in names if name not in tensors]
        if absent:
            problems += [f"missing {name}" for name in absent]
            continue
        try:
            value = _read([np.asarray(tensors[name], np.float32) for name in names], rule, shape)
        except ValueError as error:
            problems.append(f"{names[0]}: {error}")
            continue
        _set(out if rule.block is None else out["stack"][rule.block], rule.path, value)
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    if problems:
        raise InputError("published weights do not fit the configuration: " + "; ".join(problems))
    out["stack"] = restack(out["stack"], layers, np)
    return out


def to_published(params: dict[Any, Any], config: KimiLinearConfig) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_published`: float32 tensors by published name."""
    blocks = unstack(params["stack"], plan(config.kinds, config.scan_layers))
    tensors = {}
    for rule in weight_rules(config):
        value = np.asarray(_get(params if rule.block is None else blocks[rule.block], rule.path))
        for name, tensor in zip(_names(rule, config), _write(value, rule), strict=True):
            tensors[name] = tensor
    return tensors


def _unstack_shapes(tree: dict, layers) -> list:
    """One block's ``ShapeDtypeStruct``s each, from a stack's."""
    return unstack(jax.tree.map(lambda leaf: _Shape(tuple(leaf.shape)), tree), layers)


class _Shape:
    """A shape that can be indexed like the stacked array it stands for."""

    def __init__(self, shape):
        self.shape = shape

    def __getitem__(self, _):
        return _Shape(self.shape[1:])


def _names(rule: WeightRule, config: KimiLinearConfig) -> list[str]:
    if rule.rule != "experts":
        return [rule.name]
    return [rule.name.format(e=e) for e in range(config.num_experts)]


def _read(tensors: list[np.ndarray], rule: WeightRule, shape: tuple[int, ...]) -> np.ndarray:
    value = tensors[0]
    if rule.rule == "experts":
        value = np.stack([tensor.T for tensor in tensors])
    elif rule.rule in ("linear", "linear_from_heads"):
        value = value.T
    elif rule.rule == "per_head":
        # Some shards hold one value a head behind axes of size 1, some pad heads with zeros.
        value = value.reshape(-1)[: shape[0]]
    if value.size != math.prod(shape):
        raise ValueError(f"has shape {tensors[0].shape}, which does not fill ours, {shape}")
    return np.ascontiguousarray(value.reshape(shape))


def _write(value: np.ndarray, rule: WeightRule) -> list[np.ndarray]:
    if rule.rule == "experts":
        return [np.ascontiguousarray(expert.T) for expert in value]
    if rule.rule == "linear":
        value = value.reshape(value.shape[0], -1).T
    elif rule.rule == "linear_from_heads":
        value = value.reshape(-1, value.shape[-1]).T
    elif rule.rule == "conv":
        value = value.reshape(-1, 1, value.shape[-1])
    elif rule.rule == "per_head":
        value = value.reshape(1, 1, -1, 1)
    elif rule.path.endswith("dt_bias"):
        value = value.reshape(-1)
    return [np.ascontiguousarray(value)]


def _get(tree: dict, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _set(tree: dict, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value
