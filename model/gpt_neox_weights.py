"""GPT-NeoX as it is published: tensor names and ``config.json`` of the released Pythia models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .exchange import (
    Published,
    Rule,
    check_fields,
    check_types,
    compute_dtype,
    object_of,
    rope_theta,
    types_of,
)
from .gpt_neox import GPTNeoXConfig


def _linear(theirs: str, ours: str, matrix: str, vector: str = "d -> d") -> dict:
    return {
        f"{theirs}.weight": (f"{ours}.kernel", matrix),
        f"{theirs}.bias": (f"{ours}.bias", vector),
    }


def _norm(theirs: str, ours: str) -> dict:
    return {
        f"{theirs}.weight": (f"{ours}.scale", "d -> d"),
        f"{theirs}.bias": (f"{ours}.bias", "d -> d"),
    }


# name inside a block -> (path inside ours, layout)
_BLOCK = {
    **_norm("input_layernorm", "input_norm"),
    **_linear("attention.dense", "mixer.o_proj", "d (n k) -> n k d"),
    **_norm("post_attention_layernorm", "post_norm"),
    **_linear("mlp.dense_h_to_4h", "ffn.up_proj", "f d -> d f"),
    **_linear("mlp.dense_4h_to_h", "ffn.down_proj", "f d -> d f"),
}


def _fused(i: int) -> list[Rule]:
    """Query, key and value of block ``i``: one published map, in which each head has all three."""
    theirs, ours = f"gpt_neox.layers.{i}.attention.query_key_value", f"stack.{i}.mixer"
    table = []
    for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
        table += [
            Rule(f"{theirs}.weight", f"{ours}.{name}.kernel", f"(n {j}/3 k) d -> d n k"),
            Rule(f"{theirs}.bias", f"{ours}.{name}.bias", f"(n {j}/3 k) -> n k"),
        ]
    return table


def rules(config: GPTNeoXConfig) -> list[Rule]:
    """The table for this configuration."""
    table = [
        Rule("gpt_neox.embed_in.weight", "embed.embedding", "v d -> v d"),
        Rule("gpt_neox.final_layer_norm.weight", "final_norm.scale", "d -> d"),
        Rule("gpt_neox.final_layer_norm.bias", "final_norm.bias", "d -> d"),
        Rule(("embed_out.weight", "lm_head.weight"), "lm_head.kernel", "v d -> d v"),
    ]
    for i in range(config.num_layers):
        table += _fused(i)
        table += [
            Rule(f"gpt_neox.layers.{i}.{name}", f"stack.{i}.{path}", layout)
            for name, (path, layout) in _BLOCK.items()
        ]
    return table


# Fields that a published configuration has under the same name, with what absent ones are.
_SAME_FIELDS: dict[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_POSITIONS = (
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
)
_ROTARY = {"partial_rotary_factor": "rotary_pct", "rotary_pct": "rotary_pct"}
_NAMES = {name: name for name in _SAME_FIELDS} | {"num_hidden_layers": "num_layers"} | _ROTARY
_UNUSED = ("attention_dropout", "classifier_dropout", "gradient_checkpointing", "hidden_dropout")
# Published options that have one value here; another one is another computation.
_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": False,
}


def config_from_published(published: Mapping[str, Any]) -> GPTNeoXConfig:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented; names it.
    """
    check_fields(
        published,
        types=types_of(GPTNeoXConfig, _NAMES),
        required=_REQUIRED,
        known=(*_SAME_FIELDS, *_POSITIONS, *_UNUSED),
        fixed={name: (value,) for name, value in _FIXED.items()},
    )
    rope = object_of(published, "rope_parameters")
    check_types(rope, types_of(GPTNeoXConfig, _ROTARY), "config.json: rope_parameters")
    places = (rope, published)
    told = [place[name] for place in places for name in _ROTARY if name in place]
    return GPTNeoXConfig(
        **{name: published.get(name, default) for name, default in _SAME_FIELDS.items()},
        num_layers=published["num_hidden_layers"],
        rotary_pct=told[0] if told else 0.25,
        rope_theta=rope_theta(published, 10000.0),
        dtype=compute_dtype(published),
    )


def config_to_published(config: GPTNeoXConfig) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration."""
    return {
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        **_FIXED,
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "max_position_embeddings": 2048,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_pct,
    }


PUBLISHED = Published(
    model_types=("gpt_neox",),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
    # Buffers of older files.
    ignored=(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
