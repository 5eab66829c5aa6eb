"""LLaDA as it is published: tensor names and ``config.json``, which have the names of OLMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .exchange import Published, Rule, check_fields, compute_dtype, rope_theta, types_of
from .llada import LLaDAConfig

# name inside a block -> (path inside ours, layout)
_BLOCK = {
    "attn_norm.weight": ("input_norm.scale", "d -> d"),
    "q_proj.weight": ("mixer.q_proj.kernel", "(n k) d -> d n k"),
    "k_proj.weight": ("mixer.k_proj.kernel", "(g k) d -> d g k"),
    "v_proj.weight": ("mixer.v_proj.kernel", "(g k) d -> d g k"),
    "attn_out.weight": ("mixer.o_proj.kernel", "d (n k) -> n k d"),
    "ff_norm.weight": ("post_norm.scale", "d -> d"),
    "ff_proj.weight": ("ffn.gate_proj.kernel", "f d -> d f"),
    "up_proj.weight": ("ffn.up_proj.kernel", "f d -> d f"),
    "ff_out.weight": ("ffn.down_proj.kernel", "d f -> f d"),
}


def rules(config: LLaDAConfig) -> list[Rule]:
    """The table for this configuration. ``ff_out`` is the head, and in a block the map down."""
    embedding, head = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    # A tied head is the embedding; some files have it a second time.
    names = (embedding, head) if config.tie_word_embeddings else embedding
    table = [
        Rule(names, "embed.embedding", "v d -> v d"),
        Rule("model.transformer.ln_f.weight", "final_norm.scale", "d -> d"),
    ]
    if not config.tie_word_embeddings:
        table.append(Rule(head, "lm_head.kernel", "v d -> d v"))
    table += [
        Rule(f"model.transformer.blocks.{i}.{name}", f"stack.{i}.{path}", layout)
        for i in range(config.num_layers)
        for name, (path, layout) in _BLOCK.items()
    ]
    return table


_RENAMED = {
    "d_model": "hidden_size",
    "n_layers": "num_layers",
    "n_heads": "num_attention_heads",
    "weight_tying": "tie_word_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
}
_REQUIRED = ("d_model", "n_layers", "n_heads", "vocab_size")
# Read with a default of their own.
_READ_ELSEWHERE = (
    "embedding_size",
    "mlp_hidden_size",
    "mlp_ratio",
    "multi_query_attention",
    "init_fn",
    "n_kv_heads",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    # Ours: no published model has them.
    "block_size",
    "logit_shift",
)
_UNUSED = (
    "alibi_bias_max",
    "attention_layer_norm_with_affine",
    "embedding_dropout",
    "flash_attention",
    "init_cutoff_factor",
    "init_device",
    "max_sequence_length",
    "precision",
    "residual_dropout",
)
# Published options that have one value here; another one is another computation.
_FIXED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
# Ids of the released vocabulary, for a config.json that leaves some of them out.
_KNOWN_VOCAB = 126464
_KNOWN_IDS = {
    "mask_token_id": 126336,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
}


def config_from_published(published: Mapping[str, Any]) -> LLaDAConfig:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented, or no mask id
            where the vocabulary is not LLaDA's; names it.
    """
    null = ("bias_for_layer_norm", "include_qkv_bias")  # Absent and null mean no biases.
    own = {name: name for name in ("vocab_size", "block_size", "logit_shift")}
    nullable = ("embedding_size", "mask_token_id", "mlp_hidden_size", "mlp_ratio", "n_kv_heads")
    check_fields(
        published,
        types=types_of(LLaDAConfig, _RENAMED | own) | dict.fromkeys(nullable, int | None),
        required=_REQUIRED,
        known=(*_RENAMED, *_READ_ELSEWHERE, *_UNUSED),
        fixed={name: (v, *(None,) * (name in null)) for name, v in _FIXED.items()},
    )
    width, heads = published["d_model"], published["n_heads"]
    vocab_size = published.get("embedding_size") or published["vocab_size"]
    values = _KNOWN_IDS if published["vocab_size"] == _KNOWN_VOCAB else {}
    values = values | {
        ours: published[name] for name, ours in _RENAMED.items() if name in published
    }
    if values.get("mask_token_id") is None:
        raise InputError(
            f"config.json has no mask_token_id, and vocab_size={published['vocab_size']} is not "
            f"LLaDA's {_KNOWN_VOCAB}, whose mask is {_KNOWN_IDS['mask_token_id']}; add the id of "
            "the token that stands for hidden ones"
        )
    kv_heads = 1 if published.get("multi_query_attention") else published.get("n_kv_heads")
    return LLaDAConfig(
        **values,
        vocab_size=vocab_size,
        num_kv_heads=kv_heads or heads,
        intermediate_size=published.get("mlp_hidden_size") or published.get("mlp_ratio", 4) * width,
        block_size=published.get("block_size"),
        logit_shift=published.get("logit_shift", False),
        # Of fresh weights alone; other names (full_megatron, ...) are normal here.
        initialization="mitchell" if published.get("init_fn") == "mitchell" else "normal",
        rope_theta=rope_theta(published, 10000.0),
        dtype=compute_dtype(published),
    )


def config_to_published(config: LLaDAConfig) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration."""
    contents = {
        **{name: getattr(config, ours) for name, ours in _RENAMED.items()},
        **_FIXED,
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "n_kv_heads": config.num_kv_heads,
        "mlp_hidden_size": config.intermediate_size,
        "max_sequence_length": 4096,
        "rope_theta": config.rope_theta,
        "block_size": config.block_size,
        "logit_shift": config.logit_shift,
        "init_fn": config.initialization,
    }
    # What published files do not have is written where it says something.
    quiet = {"bos_token_id": None, "block_size": None, "logit_shift": False, "init_fn": "normal"}
    return {k: v for k, v in contents.items() if k not in quiet or v != quiet[k]}


PUBLISHED = Published(
    model_types=("llada",),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
)
