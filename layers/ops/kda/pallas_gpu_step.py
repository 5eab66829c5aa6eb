"""One decoding step of KDA as a Pallas kernel for GPU: the state is read once and written once.

A step moves 2*4*K*V bytes of state a head and little else, for 8*K*V FLOP: a GPU is as fast as its
memory. A program holds some columns of a head's state in registers, decays them, reads what the key
predicts, writes and reads what the query sees; columns never meet, so there is nothing to add up.
The new state takes the memory of the old one where that is not needed again (a donated cache).

No GPU has run or timed this. Source: Kimi Linear report, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from ..optional import check_triton
from ..optional import triton as pltriton
from ..pallas_call import pallas_call
from . import pallas_gpu
from .pallas import check, widen

# Columns of the state a program: 32 heads of 128 then make 128 programs a row of the batch.
_VALUE_BLOCK = 32
_NUM_WARPS = 4


def _kernel(scale, q, k, v, g, beta, state, o, after):
    q, k = q[...].astype(jnp.float32), k[...].astype(jnp.float32)
    decayed = jnp.exp(g[...])[:, None] * state[...]
    delta = beta[...] * (v[...].astype(jnp.float32) - jnp.sum(k[:, None] * decayed, axis=0))
    written = decayed + k[:, None] * delta[None, :]
    after[...] = written
    o[...] = (scale * jnp.sum(q[:, None] * written, axis=0)).astype(o.dtype)


def kda_step_pallas_gpu(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B Hv V"],
    g: Float[Array, "B Hv K"],
    beta: Float[Array, "B Hv"],
    state: Float[Array, "B Hv K V"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B Hv V"], Float[Array, "B Hv K V"]]:
    """Advances the state by one token and reads it; arguments and results as of `kda_step`.

    Widths that are not powers of two are padded, which copies the state. `interpret` runs the
    kernel on any platform, slowly, for tests.

    Raises:
      InputError: q, k or v neither float32 nor bfloat16, or heads wider than 256; when lowered,
        another platform than CUDA.
    """
    check_triton("pallas_gpu")
    check("pallas_gpu", q, k, v, g)
    (batch, heads, width), key_width = v.shape, q.shape[-1]
    key, value = (pallas_gpu.power_of_two(x) for x in (key_width, width))
    block, group = min(_VALUE_BLOCK, value), heads // q.shape[1]

    def shared(c, h, b):
        return b, h if group == 1 else jax.lax.div(h, jnp.int32(group)), 0

    keys = pl.BlockSpec((None, None, key), lambda c, h, b: (b, h, 0))
    values = pl.BlockSpec((None, None, block), lambda c, h, b: (b, h, c))
    states = pl.BlockSpec((None, None, key, block), lambda c, h, b: (b, h, 0, c))
    state = widen(state.astype(jnp.float32), key, value)
    o, after = pallas_call(
        functools.partial(_kernel, scale),
        grid=(value // block, heads, batch),
        in_specs=[
            *[pl.BlockSpec((None, None, key), shared)] * 2,
            values,
            keys,
            pl.BlockSpec((None, None), lambda c, h, b: (b, h)),
            states,
        ],
        out_specs=[values, states],
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, value), v.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
        ],
        input_output_aliases={5: 1},
        compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="kda_step",
    )(
        widen(q if interpret else pallas_gpu.on_gpu(q), key),
        widen(k, key),
        widen(v, value),
        widen(g, key),
        beta.astype(jnp.float32),
        state,
    )
    return o[..., :width], after[:, :, :key_width, :width]
