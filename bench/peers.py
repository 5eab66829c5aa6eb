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
from jaxalope.model import build_model
from jaxalope.model.kimi_linear_weights import (
    config_from_published,
    config_to_published,
    from_published,
    to_published,
)
from jaxalope.sharding import abstract

# transformers 5.23 writes (and reads) a dense first layer under the mixture's name.
_DENSE_WRITTEN = "model.layers.0.block_sparse_moe."
_DENSE_PUBLISHED = "model.layers.0.mlp."


def to_transformers(model: Model):
    """The ``transformers`` model with this model's weights, float32, on CPU, in eval mode."""
    from transformers import KimiLinearForCausalLM

    tensors = to_published(jax.device_get(model.params), model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "config.json").write_text(json.dumps(config_to_published(model.config)))
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
