"""The grouped product by tokamax's ``ragged_dot``: kernels for TPU and GPU, where it is installed.

For TPU, in this host or in the mesh in force, it is the second of its kernels. Without a name
tokamax picks by the kind of this host's default device, and for a TPU the first one, whose sizes of
tiles are chosen for TPU7x alone. Sums over the rows of a group exist only as a gradient there: both
gradients are taken of its product.
"""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp

from .. import optional, tuning
from ..platform import by_platform
from ..precision import as_set
from .products import Products
from .xla import cleared

_ON_TPU = "mosaic_tpu_v2"


def _on_every_platform(run):
    """``run(ragged_dot, *arrays)`` with the product for the platform that is lowered for."""

    def by_name(implementation):
        def call(*arrays):
            library = optional.tokamax("grouped_matmul")
            anywhere = contextlib.nullcontext()
            if implementation is not None:
                # The gradients ask for a TPU in this host, where their product was named or not.
                config = optional.tokamax("grouped_matmul", "tokamax.config")
                anywhere = config.cross_compile(True)

            def ragged_dot(x, w, group_sizes):
                return library.ragged_dot(
                    x,
                    w,
                    group_sizes,
                    precision=as_set(x.dtype),
                    preferred_element_type=x.dtype,
                    implementation=implementation,
                )

            with anywhere:
                return run(ragged_dot, *arrays)

        return call

    forms = {"default": by_name(None)}
    if tuning.device()[0] == "tpu":  # it asks of which kind
        forms["tpu"] = by_name(_ON_TPU)
    return by_platform(forms)


def _forward(x, w, group_sizes):
    run = _on_every_platform(lambda ragged_dot, *arrays: ragged_dot(*arrays))
    return cleared(run(x, w, group_sizes), group_sizes)


def _to_rows(dy, w, group_sizes):
    def gradient(ragged_dot, dy, w, group_sizes):
        x = jnp.zeros((dy.shape[0], w.shape[1]), dy.dtype)  # which no gradient reads
        return jax.vjp(lambda x: ragged_dot(x, w, group_sizes), x)[1](dy)[0]

    return cleared(_on_every_platform(gradient)(dy, w, group_sizes), group_sizes)


def _to_weights(x, dy, group_sizes, dtype):
    shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])

    def gradient(ragged_dot, x, dy, group_sizes):
        w = jnp.zeros(shape, dtype)  # which no gradient reads
        return jax.vjp(lambda w: ragged_dot(x, w, group_sizes), w)[1](dy)[0]

    x, dy = cleared(x, group_sizes), cleared(dy, group_sizes)
    return _on_every_platform(gradient)(x, dy, group_sizes)


PRODUCTS = Products(_forward, _to_rows, _to_weights)
