"""Peers nobody here wrote, on the same weights: used by the benchmarks and by ``make parity``."""

from __future__ import annotations

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxalope import Model
from jaxalope.model import KimiLinearConfig, build_model
from jaxalope.model.kimi_linear_weights import config_from_published, from_published, to_published
from jaxalope.sharding import abstract

# transformers 5.23 writes (and reads) a dense first layer under the mixture's name.
_DENSE_WRITTEN = "model.layers.0.block_sparse_moe."
_DENSE_PUBLISHED = "model.layers.0.mlp."


def published_config(config: KimiLinearConfig) -> dict:
    """The contents of a published ``config.json`` for this configuration."""
    same = (
        "vocab_size hidden_size num_attention_heads kv_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim intermediate_size moe_intermediate_size num_experts "
        "num_experts_per_token num_shared_experts first_k_dense_replace num_expert_group "
        "topk_group moe_renormalize routed_scaling_factor rms_norm_eps initializer_range "
        "bos_token_id eos_token_id pad_token_id"
    )
    return {
        **{name: getattr(config, name) for name in same.split()},
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_rope_head_dim,
        "q_lora_rank": None,
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "moe_layer_freq": 1,
        "use_grouped_topk": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "model_max_length": 4096,
        "linear_attn_config": {
            "head_dim": config.kda_head_dim,
            "num_heads": config.kda_num_heads,
            "short_conv_kernel_size": config.short_conv_kernel_size,
            "kda_layers": list(config.kda_layers),
            "full_attn_layers": list(config.full_attn_layers),
        },
    }


def to_transformers(model: Model):
    """The ``transformers`` model with this model's weights, float32, on CPU, in eval mode."""
    from transformers import KimiLinearForCausalLM

    tensors = to_published(jax.device_get(model.params), model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(published_config(model.config)))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return KimiLinearForCausalLM.from_pretrained(path).eval()


def from_transformers(peer) -> Model:
    """Our model with the weights of a ``transformers`` model, through the files that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        path = pathlib.Path(folder)
        config = config_from_published(json.loads((path / "config.json").read_text()))
        tensors = {
            name.replace(_DENSE_WRITTEN, _DENSE_PUBLISHED): np.asarray(tensor)
            for name, tensor in load_file(path / "model.safetensors").items()
        }
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    return Model(
        config, graphdef, jax.tree.map(jnp.asarray, from_published(tensors, config, shapes))
    )
