"""Peers nobody here wrote, on the same weights: used by the benchmarks and by ``make parity``."""

from __future__ import annotations

import pathlib
import tempfile

import jaxalope


def to_transformers(model: jaxalope.Model):
    """The ``transformers`` model with this model's weights, float32, on CPU, in eval mode."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        jaxalope.save(model, path)
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def from_transformers(peer) -> jaxalope.Model:
    """Our model with the weights of a ``transformers`` model, through the files that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return jaxalope.load(folder)
