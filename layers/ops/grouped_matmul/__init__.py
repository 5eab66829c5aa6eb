"""Products of sorted rows with the weights of their group: the arithmetic of a mixture of experts.

Implementations: ``reference`` (dense, float32), ``xla`` (``jax.lax.ragged_dot``, for TPU: elsewhere
XLA runs it as one dense product a group, over all rows), ``blocked`` (for CPU), ``pallas_gpu``
(kernels for NVIDIA GPUs) and, where it is installed, ``tokamax`` (its ``ragged_dot``: kernels for
TPU and GPU). Under a mesh, call them inside :func:`jaxalope.sharding.kernel_map`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ....errors import InputError
from .. import tuning
from ..platform import by_platform
from . import blocked, pallas_gpu, tokamax
from .reference import grouped_matmul_reference, grouped_swiglu_reference
from .shapes import shape_class
from .xla import PRODUCTS

IMPLEMENTATIONS = ("reference", "xla", "blocked", "pallas_gpu", "tokamax")
_FORMS = {
    "xla": PRODUCTS,
    "blocked": blocked,
    "pallas_gpu": pallas_gpu.products(),
    "tokamax": tokamax.PRODUCTS,
}


def grouped_matmul(
    x: Float[Array, "M D"],
    w: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """``y[m] = x[m] @ w[e]`` where ``e`` is the group that row ``m`` lies in.

    The first ``group_sizes[0]`` rows are group 0's, the next ``group_sizes[1]`` group 1's, and so
    on; groups may be empty, and rows past the last one give zero. Differentiable (in reverse) in
    ``x`` and ``w``.

    Args:
        x: rows sorted by group; float32 or bfloat16.
        w: one matrix a group. They are multiplied in the dtype of ``x``; the gradient has their
            own, and is not rounded to another on its way.
        group_sizes: rows of each group, int32, of sum at most ``M``.
        implementation: one of ``IMPLEMENTATIONS``; None picks, where the code is lowered for CPU,
            ``blocked``, for CUDA ``pallas_gpu`` (``blocked`` for other dtypes than float32 and
            bfloat16), elsewhere ``xla``; or what :mod:`..tuning` knows to be faster.

    Returns:
        The products, accumulated in float32, in the dtype of ``x``.

    Raises:
        InputError: an unknown implementation or one that is not installed, or shapes that do not
            fit.
    """
    _check(x, {"w": w}, group_sizes, implementation)
    if implementation == "reference":
        return grouped_matmul_reference(x, w, group_sizes)
    return _product(implementation, x, w, group_sizes)


def grouped_swiglu(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """``y[m] = (silu(x[m] @ gate[e]) * (x[m] @ up[e])) @ down[e]``: each row through its expert.

    Groups, dtypes, implementations and errors are those of :func:`grouped_matmul`. One operator
    rather than three products, because the ``blocked`` form then visits each row once.
    """
    _check(x, {"gate": gate, "up": up}, group_sizes, implementation)
    if down.shape != (gate.shape[0], gate.shape[2], x.shape[1]) or up.shape != gate.shape:
        raise InputError(
            f"gate {gate.shape}, up {up.shape} and down {down.shape} do not fit together; "
            "give [E, D, F], [E, D, F] and [E, F, D]"
        )
    if implementation == "reference":
        return grouped_swiglu_reference(x, gate, up, down, group_sizes)
    return _swiglu(implementation, x, gate, up, down, group_sizes)


def _check(x, weights: dict[str, jax.Array], group_sizes, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}")
    for name, w in weights.items():
        if x.ndim != 2 or w.ndim != 3 or w.shape[:2] != (*group_sizes.shape, x.shape[1]):
            raise InputError(
                f"x {x.shape}, {name} {w.shape} and group_sizes {group_sizes.shape} do not fit "
                "together; give [M, D], [E, D, F] and [E]"
            )


def _dispatch(implementation: str | None, function: str, *args: jax.Array, **static) -> Any:
    """Run ``function`` of the named form, or of the one for the platform that is lowered for."""
    if implementation is not None:
        return getattr(_FORMS[implementation], function)(*args, **static)
    weight = args[1].shape
    tuned = tuning.chosen_implementation("grouped_matmul", shape_class(weight[0], weight))
    # On a GPU, XLA's form does E times the work, and with E copies of the rows: the kernels are the
    # default there without having been timed.
    cuda = "pallas_gpu" if pallas_gpu.takes(args[0]) else "blocked"
    names = {"default": "xla", "cpu": "blocked", "cuda": cuda} | tuned
    forms = {p: getattr(_FORMS[n], function) for p, n in names.items()}
    return by_platform(forms)(*args, **static)


# The choice of a platform is made inside the forward and inside the backward rule: both forms keep
# the same residuals, so neither pays for the other's.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, x, w, group_sizes):
    return _dispatch(implementation, "product", x, w.astype(x.dtype), group_sizes)


def _product_fwd(implementation, x, w, group_sizes):
    return _product(implementation, x, w, group_sizes), (x, w, group_sizes)


def _product_bwd(implementation, residuals, dy):
    x, w, group_sizes = residuals
    inputs = (x, w.astype(x.dtype), group_sizes, dy)
    dx, dw = _dispatch(implementation, "product_vjp", *inputs, weight_dtype=w.dtype)
    return dx, dw, _no_gradient(group_sizes)


_product.defvjp(_product_fwd, _product_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(implementation, x, gate, up, down, group_sizes):
    return _swiglu_fwd(implementation, x, gate, up, down, group_sizes)[0]


def _swiglu_fwd(implementation, x, gate, up, down, group_sizes):
    narrow = (w.astype(x.dtype) for w in (gate, up, down))
    y, g, u = _dispatch(implementation, "swiglu", x, *narrow, group_sizes)
    return y, (x, gate, up, down, group_sizes, g, u)


def _swiglu_bwd(implementation, residuals, dy):
    x, gate, up, down, *rest = residuals
    # Cast again rather than kept: a copy of all experts.
    narrow = (w.astype(x.dtype) for w in (gate, up, down))
    inputs = (x, *narrow, *rest, dy)
    gradients = _dispatch(implementation, "swiglu_vjp", *inputs, weight_dtype=gate.dtype)
    return *gradients, _no_gradient(rest[0])


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _no_gradient(integers: jax.Array) -> np.ndarray:
    return np.zeros(integers.shape, jax.dtypes.float0)
