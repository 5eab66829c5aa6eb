"""KDA as benchmarks run it: inputs of a named shape, and the two passes over them."""

import jax
import jax.numpy as jnp

from jaxalope.layers.ops.kda import kda, l2norm, softplus_gate
from jaxalope.layers.ops.kda.shapes import KdaShape

# Sizes of the GPU kernels to try, beside what they choose themselves.
GPU_SIZES = (
    *(
        {"value_block": value, "key_block": key}
        for value, key in ((64, 128), (32, 128), (16, 128), (32, 64), (32, 32))
    ),
    *({"carry_warps": warps} for warps in (4, 8)),
    *({"transpose_warps": warps} for warps in (1, 2, 8)),
)


def inputs(s: KdaShape, batch: int, length: int, dtype: str):
    """q, k, v, g, beta, initial state with the unbounded gate at its published initialisation."""
    keys = jax.random.split(jax.random.key(0), 7)
    narrow = (batch, length, s.num_heads, s.key_dim)
    wide = (batch, length, s.num_value_heads, s.key_dim)
    values = (batch, length, s.num_value_heads, s.value_dim)
    rate = jax.random.uniform(keys[5], (s.num_value_heads,), minval=1.0, maxval=16.0)
    q, k = (l2norm(jax.random.normal(key, narrow)).astype(dtype) for key in keys[:2])
    return (
        q,
        k,
        jax.random.normal(keys[2], values).astype(dtype),
        softplus_gate(jax.random.normal(keys[3], wide) - 4.0, jnp.log(rate)),
        jax.nn.sigmoid(jax.random.normal(keys[4], values[:-1])),
        jax.random.normal(keys[6], (batch, s.num_value_heads, s.key_dim, s.value_dim)),
    )


def programs(implementation: str, chunk_size: int, segment_ids=None):
    """The two passes as functions of the inputs."""

    def forward(*arrays):
        *tokens, state = arrays
        return kda(
            *tokens,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=chunk_size,
            # tokamax's kernels are of the bounded gate; what is compiled reads no values.
            gate_lower_bound=-5.0 if implementation == "tokamax" else None,
            implementation=implementation,
        )

    def both(*arrays):
        out, pullback = jax.vjp(forward, *arrays)
        return out, pullback(out)

    return {"forward": forward, "forward+backward": both}
