"""CALM's autoencoder as it is published: tensor names and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .calm_autoencoder import CALMAutoencoderConfig
from .exchange import Published, Rule, check_fields, compute_dtype, types_of

# name inside a layer -> (path inside ours, layout)
_LAYER = {
    "layernorm.weight": ("norm.scale", "d -> d"),
    "mlp.gate_proj.weight": ("ffn.gate_proj.kernel", "f d -> d f"),
    "mlp.up_proj.weight": ("ffn.up_proj.kernel", "f d -> d f"),
    "mlp.down_proj.weight": ("ffn.down_proj.kernel", "d f -> f d"),
}
# A chunk's tokens stand side by side, the first one outermost.
_ENDS = {
    "encoder.squeeze_layer.weight": ("squeeze.kernel", "e (k d) -> k d e"),
    "encoder.squeeze_layer.bias": ("squeeze.bias", "e -> e"),
    "encoder.norm.weight": ("encoder_norm.scale", "d -> d"),
    "encoder.hidden_to_latent.weight": ("to_latent.kernel", "z d -> d z"),
    "encoder.hidden_to_latent.bias": ("to_latent.bias", "z -> z"),
    "decoder.latent_to_hidden.weight": ("from_latent.kernel", "d z -> z d"),
    "decoder.latent_to_hidden.bias": ("from_latent.bias", "d -> d"),
    "decoder.expand_layer.weight": ("expand.kernel", "(k e) d -> d k e"),
    "decoder.expand_layer.bias": ("expand.bias", "(k e) -> k e"),
    "decoder.norm.weight": ("decoder_norm.scale", "d -> d"),
}


def rules(config: CALMAutoencoderConfig, theirs: str = "", ours: str = "") -> list[Rule]:
    """The table for this configuration, of an autoencoder under these prefixes."""
    # The head is the embedding, and stands in most files a second time.
    names = (f"{theirs}encoder.embed_tokens.weight", f"{theirs}decoder.lm_head_weight")
    table = [Rule(names, f"{ours}embed.embedding", "v d -> v d")]
    for side in ("encoder", "decoder"):
        table += [
            Rule(
                f"{theirs}{side}.{side}_layers.{i}.{name}",
                f"{ours}{side}_layers.{i}.{path}",
                layout,
            )
            for i in range(getattr(config, f"num_{side}_layers"))
            for name, (path, layout) in _LAYER.items()
        ]
    return table + [
        Rule(f"{theirs}{name}", f"{ours}{path}", layout) for name, (path, layout) in _ENDS.items()
    ]


_RENAMED = {
    "vocab_size": "vocab_size",
    "patch_size": "chunk_size",
    "latent_size": "latent_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_encoder_layers": "num_encoder_layers",
    "num_decoder_layers": "num_decoder_layers",
}
_OPTIONAL = {
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# Of training, which are the objective's here; the embedding is the head whatever the last one says.
_UNUSED = ("ae_dropout", "kl_clamp", "kl_weight", "tie_word_embeddings")
# Published options that have one value here; another one is another computation.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False}


def config_from_published(published: Mapping[str, Any]) -> CALMAutoencoderConfig:
    """Our configuration from the contents of a published ``config.json``.

    Raises:
        InputError: an option that changes the computation and is not implemented; names it.
    """
    check_fields(
        published,
        types=types_of(CALMAutoencoderConfig, _RENAMED | _OPTIONAL),
        required=tuple(_RENAMED),
        known=(*_OPTIONAL, *_UNUSED),
        fixed={name: (value,) for name, value in _FIXED.items()},
    )
    known = {**_RENAMED, **_OPTIONAL}
    return CALMAutoencoderConfig(
        **{ours: published[name] for name, ours in known.items() if name in published},
        dtype=compute_dtype(published),
    )


def config_to_published(config: CALMAutoencoderConfig) -> dict[str, Any]:
    """The contents of a published ``config.json`` for this configuration."""
    return {
        **{name: getattr(config, ours) for name, ours in {**_RENAMED, **_OPTIONAL}.items()},
        **_FIXED,
        "model_type": "calm_autoencoder",
        "architectures": ["Autoencoder"],
    }


PUBLISHED = Published(
    model_types=("calm_autoencoder",),
    rules=rules,
    config_from=config_from_published,
    config_to=config_to_published,
    architectures=("Autoencoder",),
)
