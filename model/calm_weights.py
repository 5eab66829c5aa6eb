"""CALM as it is published: tensor names and ``config.json``, one set of names for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from . import calm_autoencoder_weights
from .calm import CALMConfig
from .calm_autoencoder import CALMAutoencoderConfig
from .exchange import (
    Published,
    Rule,
    check_fields,
    compute_dtype,
    object_of,
    rope_theta,
    types_of,
)


def _linear(theirs: str, ours: str, matrix: str = "e d -> d e", vector: str = "e -> e") -> dict:
    return {
        f"{theirs}.weight": (f"{ours}.kernel", matrix),
        f"{theirs}.bias": (f"{ours}.bias", vector),
    }


def _norm(theirs: str, ours: str) -> dict:
    return {
        f"{theirs}.weight": (f"{ours}.scale", "d -> d"),
        f"{theirs}.bias": (f"{ours}.bias", "d -> d"),
    }


# Several vectors of one map, one after the other in the published tensor.
_SEVERAL = ("(c e) d -> d c e", "(c e) -> c e")

# name inside a block of the transformer -> (path inside ours, layout)
_BLOCK = {
    "input_layernorm.weight": ("input_norm.scale", "d -> d"),
    "self_attn.q_proj.weight": ("mixer.q_proj.kernel", "(n k) d -> d n k"),
    "self_attn.k_proj.weight": ("mixer.k_proj.kernel", "(g k) d -> d g k"),
    "self_attn.v_proj.weight": ("mixer.v_proj.kernel", "(g k) d -> d g k"),
    "self_attn.o_proj.weight": ("mixer.o_proj.kernel", "d (n k) -> n k d"),
    "post_attention_layernorm.weight": ("post_norm.scale", "d -> d"),
    "mlp.gate_proj.weight": ("ffn.gate_proj.kernel", "f d -> d f"),
    "mlp.up_proj.weight": ("ffn.up_proj.kernel", "f d -> d f"),
    "mlp.down_proj.weight": ("ffn.down_proj.kernel", "d f -> f d"),
}
_BACKBONE = {
    "transformer.embed_tokens.weight": ("embed.embedding", "v d -> v d"),
    "transformer.norm.weight": ("final_norm.scale", "d -> d"),
    **_linear("embed_proj.0", "compression.up_proj", "f (k d) -> k d f"),
    **_linear("embed_proj.2", "compression.down_proj"),
    **_norm("embed_proj.3", "compression.norm"),
}
_ENERGY = {
    **_linear("noise_embd", "noise_proj"),
    **_norm("norm_noise", "noise_norm"),
    **_linear("hidden_embd", "hidden_proj"),
    **_norm("norm_hidden", "hidden_norm"),
    **_norm("final_layer.in_ln", "final_norm"),
    **_linear("final_layer.linears.0", "final_hidden"),
    **_linear("final_layer.linears.2", "final_proj"),
}
# The first map of a block takes the draw and the condition side by side; here they are two maps.
_ENERGY_BLOCK = {
    **_norm("in_ln", "norm"),
    **_linear("linears.0", "condition_proj", "f (1/2 d) -> d f"),
    **_linear("linears.2", "hidden_proj"),
    **_linear("linears.4", "gate_up_proj", *_SEVERAL),
    **_linear("down_proj", "down_proj"),
}
_ADALN = {
    **_linear("time_embed.mlp.0", "time_in"),
    **_linear("time_embed.mlp.2", "time_out"),
    **_linear("cond_embed", "condition_proj"),
    **_linear("input_proj", "input_proj"),
    **_linear("final_layer.adaLN_modulation.1", "modulation", *_SEVERAL),
    **_linear("final_layer.linear", "output_proj"),
}
_ADALN_BLOCK = {
    **_norm("in_ln", "norm"),
    **_linear("mlp.0", "up_proj"),
    **_linear("mlp.2", "down_proj"),
    **_linear("adaLN_modulation.1", "modulation", *_SEVERAL),
}


def rules(config: CALMConfig) -> list[Rule]:
    """The table for this configuration, its autoencoder included."""
    table = [Rule(name, path, layout) for name, (path, layout) in _BACKBONE.items()]
    table += [
        Rule(f"transformer.layers.{i}.{name}", f"stack.{i}.{path}", layout)
        for i in range(config.num_layers)
        for name, (path, layout) in _BLOCK.items()
    ]
    table += _energy_head(config) if config.head == "energy" else _adaln_head(config)
    return table + calm_autoencoder_weights.rules(config.autoencoder, "ae_model.", "autoencoder.")


def _energy_head(config: CALMConfig) -> list[Rule]:
    def rule(name, path, layout):
        # One module under two names, both of which PyTorch writes.
        names = (f"mlp_generator.{name}", f"generative_head.{name}")
        return Rule(names, f"latent_head.{path}", layout)

    table = [rule(name, path, layout) for name, (path, layout) in _ENERGY.items()]
    for i in range(config.head_layers):
        theirs, ours = f"mlp_blocks.{i}", f"blocks.{i}"
        table.append(
            rule(f"{theirs}.linears.0.weight", f"{ours}.x_proj.kernel", "f (0/2 d) -> d f")
        )
        table += [
            rule(f"{theirs}.{name}", f"{ours}.{path}", layout)
            for name, (path, layout) in _ENERGY_BLOCK.items()
        ]
    return table


def _adaln_head(config: CALMConfig) -> list[Rule]:
    theirs, ours = "generative_head.net", "latent_head.network"
    table = [
        Rule(f"{theirs}.{name}", f"{ours}.{path}", layout)
        for name, (path, layout) in _ADALN.items()
    ]
    return table + [
        Rule(f"{theirs}.res_blocks.{i}.{name}", f"{ours}.blocks.{i}.{path}", layout)
        for i in range(config.head_layers)
        for name, (path, layout) in _ADALN_BLOCK.items()
    ]


_RENAMED = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_mlp_layers": "head_layers",
}
_OPTIONAL = {
    "num_key_value_heads": "num_kv_heads",
    "noise_size": "noise_size",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    # Ours, of diffusion and flow heads: the released code has the numbers in it.
    "head_steps": "head_steps",
}
# Fields that the autoencoder has too, which must have the same value there.
_SHARED = {"vocab_size": "vocab_size", "patch_size": "chunk_size", "latent_size": "latent_size"}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The autoencoder's own ``config.json``: ours, released files have its directory in ``ae_path``.
_AUTOENCODER = "ae_config"
# Of training, or of nothing: there is no head to tie.
_UNUSED = ("ae_path", "beta", "num_samples", "tie_word_embeddings")
# Published options that have one value here; another one is another computation.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_HEADS = {
    "EnergyTransformer": "energy",
    "DiffusionTransformer": "diffusion",
    "FlowTransformer": "flow",
}


def config_from_published(published: Mapping[str, Any]) -> CALMConfig:
    """Our configuration from the contents of a ``config.json`` that :func:`completed` returns.

    Raises:
        InputError: an option that changes the computation and is not implemented, or an autoencoder
            of other chunks, latents or tokens; names it.
    """
    check_fields(
        published,
        types=types_of(CALMConfig, _RENAMED | _OPTIONAL),
        required=(*_RENAMED, *_SHARED, _AUTOENCODER),
        known=(*_OPTIONAL, *_IDS, *_UNUSED, "rope_parameters", "rope_scaling", "rope_theta"),
        fixed={name: (value,) for name, value in _FIXED.items()},
    )
    dtype = {"torch_dtype": compute_dtype(published)}
    theirs = dict(object_of(published, _AUTOENCODER))
    for name in _SHARED:
        if theirs.get(name) != published[name]:
            raise InputError(
                f"config.json: {name}={published[name]}, and its {_AUTOENCODER} has "
                f"{theirs.get(name)}; the two models must have the same"
            )
    ids = {name: published[name] for name in _IDS if name in published}
    names = {**_RENAMED, **_OPTIONAL}
    values = {ours: published[name] for name, ours in names.items() if name in published}
    return CALMConfig(
        **{"num_kv_heads": published["num_attention_heads"]} | values,
        autoencoder=calm_autoencoder_weights.config_from_published(theirs | ids | dtype),
        head=_head(published),
        rope_theta=rope_theta(published, 10000.0),
        dtype=dtype["torch_dtype"],
    )


def _head(published: Mapping[str, Any]) -> str:
    """Which head; files of the released code say it by their class alone."""
    if published.get("model_type"):
        return published["model_type"]
    return next(_HEADS[name] for name in published["architectures"] if name in _HEADS)


def completed(
    published: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """A ``config.json`` with the autoencoder's in it.

    Where it has none, as in released files, sizes are those of the autoencoder's tensors, and what
    they do not show is as released: the epsilon of its norms. Where there are no such tensors
    either, all is, and what is absent is then named by :func:`.exchange.match`.
    """
    if published.get(_AUTOENCODER):
        return dict(published)
    known = CALMAutoencoderConfig.released()
    own = {
        name.removeprefix("ae_model."): shape
        for name, shape in shapes.items()
        if name.startswith("ae_model.")
    }

    def size(name, default):
        return own[name][0] if name in own else default

    def layers(side, default):
        names = [name for name in own if name.startswith(f"{side}.{side}_layers.")]
        return len({name.split(".")[2] for name in names}) if own else default

    gates = [f"{side}.{side}_layers.0.mlp.gate_proj.weight" for side in ("encoder", "decoder")]
    width = size("encoder.norm.weight", known.hidden_size)
    return dict(published) | {
        _AUTOENCODER: {
            **{name: published[name] for name in _SHARED if name in published},
            "hidden_size": width,
            "intermediate_size": size(gates[0], size(gates[1], known.intermediate_size)),
            "num_encoder_layers": layers("encoder", known.num_encoder_layers),
            "num_decoder_layers": layers("decoder", known.num_decoder_layers),
            "rms_norm_eps": known.rms_norm_eps,
        }
    }


def config_to_published(config: CALMConfig) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration."""
    autoencoder = calm_autoencoder_weights.config_to_published(config.autoencoder)
    names = {**_RENAMED, **_OPTIONAL}
    contents = {
        **{name: getattr(config, ours) for name, ours in names.items()},
        **{name: autoencoder[name] for name in (*_SHARED, *_IDS)},
        **_FIXED,
        "model_type": config.head,
        "architectures": [name for name, head in _HEADS.items() if head == config.head],
        "max_position_embeddings": 2048,
        "rope_theta": config.rope_theta,
        _AUTOENCODER: autoencoder,
    }
    if config.head_steps is None:
        del contents["head_steps"]
    return contents


PUBLISHED = Published(
    model_types=tuple(_HEADS.values()),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
    # Buffers of older files.
    ignored=(r"transformer\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    architectures=tuple(_HEADS),
    completed=completed,
)
