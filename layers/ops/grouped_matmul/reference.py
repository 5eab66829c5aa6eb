"""The oracle of the grouped product: every expert on every row, then each row keeps its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    x: Float[Array, "M D"], w: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """``E`` dense products in float32, selected by the group of each row."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]
    owner = (row >= ends - group_sizes) & (row < ends)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum(
        "me,md,edf->mf",
        owner.astype(dtype),
        x.astype(dtype),
        w.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y.astype(x.dtype)


def grouped_swiglu_reference(
    x: Float[Array, "M D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    group_sizes: Int[Array, "E"],
) -> Float[Array, "M D"]:
    """``down(silu(gate(x)) * up(x))`` by three oracle products, all in float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    hidden = jax.nn.silu(grouped_matmul_reference(wide, gate, group_sizes))
    hidden = hidden * grouped_matmul_reference(wide, up, group_sizes)
    return grouped_matmul_reference(hidden, down, group_sizes).astype(x.dtype)
