"""KDA by Pallas kernels for GPU (Triton), forward and backward: chunks in parallel, then in turn.

A pass over a row is sequential and a GPU is wide: one program a head would leave most of an H200's
132 processors idle at 16 to 96 heads. So each pass is cut up. `score` and `solve` take all chunks
of all heads at once and do whatever does not need the state: decays, scores, the inverse. Then
`advance` carries the state from chunk to chunk with few and short products, and splits it by
columns, which never meet, so that about one program a processor runs. Outputs are made there too:
to make them in another parallel kernel would write and read a state a chunk, K*V/C numbers a token.
Backwards, `decay` makes the decays again, `retreat` carries the gradient of the state, `pairs` the
gradients of scores and values, and `transpose` those of all else, some key channels a program. No
sum is shared between programs, so that runs repeat to the bit.

Bytes of the forward pass, a token and head, K=V=128, C=64, bfloat16: inputs 1028, and v and beta
260; L 512 and b 512, written and read; what is handed to `advance` 2320, written and read; outputs
256: 4.9 kB or 1.14 ns at 4.3 TB/s, against 609 kFLOP or 0.77 ns at 790 TFLOP/s, two thirds of them
thrown away. W and U are handed on instead of the inverse and v, 10% more bytes, because that leaves
two products instead of three on the way from state to state. L goes through memory because a kernel
that makes and inverts it needs more than a thread's 255 registers and spills kilobytes. A backward
pass is saved states and writes, 2*K*V/C + 2*V bytes, and P and the inverse, 4*C.

Products run in bfloat16 where q does, sums of decays in two bfloat16 parts, the inverse in three
TF32 parts; with float32 inputs all products are of three parts. Kernels are in
`pallas_gpu_kernels.py`. K and V are padded to powers of two. No GPU has run or timed this: sizes
were chosen by the machine code that XLA makes for an H200 (`bench/gpu_schedule.py`).

Source: Kimi Linear report, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from .. import tuning
from ..optional import check_triton
from ..optional import triton as pltriton
from ..pallas_call import pallas_call
from . import pallas_gpu_kernels as kernels
from .pallas import check, group_sum, only_on, segment_marks, widen
from .pallas_gpu_chunk import sums
from .pallas_gpu_kernels import Plan, Tuning
from .shapes import shape_class

on_gpu = only_on("cuda", "pallas_gpu")
# Longer chunks run as these: a block row of the inverse is unrolled, and lives in registers.
_MAX_CHUNK = 64
# Programs that all but fill an H100 or H200, and columns of the state that one may carry.
_PROGRAMS = 128
_VALUE_BLOCKS = (64, 32, 16)
# Key channels of a program that takes gradients, and bytes of the widest row that is prefetched.
_KEY_BLOCK = 32
_DEEP_ROW = 256


def power_of_two(width: int) -> int:
    """The smallest block that Triton takes for so many numbers."""
    return max(kernels.ROWS, 1 << (width - 1).bit_length())


def plan(q, v, scale: float, chunk: int, interpret: bool) -> Plan:
    """Sizes for these shapes."""
    batch, _, value_heads, width = v.shape
    key, value = power_of_two(q.shape[-1]), power_of_two(width)
    # Two stages of wider rows do not fit into shared memory beside a wide share of the state.
    wide = key * jnp.dtype(q.dtype).itemsize > _DEEP_ROW
    choices = [block for block in _VALUE_BLOCKS[wide:] if block <= value]
    full = [x for x in choices if batch * value_heads * (value // x) >= _PROGRAMS]
    block = full[0] if full else choices[-1]
    tuned = tuning.chosen("kda", shape_class(q.shape[-1], width))
    block = min(tuned.get("value_block", block), value)
    warps = tuned.get("carry_warps", 8 if block > 32 else 4)
    chunk = min(chunk, _MAX_CHUNK)
    # A warp has 16 rows of a product; Hopper's large ones are of four.
    rows = chunk // kernels.ROWS
    return Plan(
        scale=scale,
        chunk=chunk,
        group=value_heads // q.shape[2],
        key=key,
        value=value,
        value_block=block,
        key_block=min(tuned.get("key_block", _KEY_BLOCK), key),
        dtype=jnp.dtype(q.dtype),
        # The third stage of `advance` holds what the next chunk needs while this one's is in use;
        # that of `retreat` would not fit. `score` and `transpose` fetch the next size's sums.
        tuning=Tuning(
            score=(rows, 3),
            solve=(1, 1),
            advance=(warps, 1 if wide else 3),
            decay=(rows, 1),
            retreat=(warps, 1 if wide else 2),
            pairs=(rows, 1),
            transpose=(tuned.get("transpose_warps", rows), 3),
        ),
        interpret=interpret,
    )


# Calls ---------------------------------------------------------------------------------------


def _specs(
    plan: Plan, length: int, steps: int, splits: int, *, whole: bool
) -> dict[str, pl.BlockSpec]:
    """Blocks of every kind of array: a chunk of a head, or its whole row and some values.

    `splits` programs of a chunk take as many parts of the key channels.
    """
    count, key = length // plan.chunk, plan.key // splits

    def part(c):
        return 0 if splits == 1 else jax.lax.rem(c, jnp.int32(splits))

    if whole:
        tokens, width, chunks = length, plan.value_block, count
        chunk, columns, heads = (lambda c: 0), (lambda c: c), (lambda h: h)
    else:
        tokens, width, chunks = plan.chunk, plan.value, None

        def chunk(c):
            return c if steps == count else jax.lax.div(c, jnp.int32(steps // count))

        def columns(c):
            return 0

        def heads(h):
            return h if plan.group == 1 else jax.lax.div(h, jnp.int32(plan.group))

    def by_token(width, heads=lambda h: h, columns=columns):
        """[B, T, H, .]"""
        return pl.BlockSpec(
            (None, tokens, None, width), lambda c, h, b: (b, chunk(c), heads(h), columns(c))
        )

    def by_head(*shape, columns=lambda c: 0):
        """[B, H, T, .]"""
        return pl.BlockSpec((None, None, *shape), lambda c, h, b: (b, h, chunk(c), columns(c)))

    states = pl.BlockSpec(
        (None, None, count if whole else None, key, width),
        lambda c, h, b: (b, h, chunk(c), part(c), columns(c)),
    )
    return {
        "shared": by_token(key, heads, part),
        "key": by_token(key, columns=part),
        "value": by_token(width),
        "beta": pl.BlockSpec((None, None, tokens), lambda c, h, b: (b, h, chunk(c))),
        "dbeta": pl.BlockSpec(
            (None, None, None, tokens), lambda c, h, b: (b, h, part(c), chunk(c))
        ),
        "sums": pl.BlockSpec(sums(plan.chunk).shape, lambda c, h, b: (0, 0, 0)),
        "marks": pl.BlockSpec((None, None, 3, plan.chunk), lambda c, h, b: (b, chunk(c), 0, 0)),
        "keys": by_head(tokens, plan.key),
        "values": by_head(tokens, width, columns=columns),
        "pairs": by_head(tokens, plan.chunk),
        "across": pl.BlockSpec(
            (None, None, chunks, key), lambda c, h, b: (b, h, chunk(c), part(c))
        ),
        "state": pl.BlockSpec((None, None, plan.key, width), lambda c, h, b: (b, h, 0, columns(c))),
        "states": states,
    }


def _call(
    kernel, plan: Plan, shape, ins, outs, *, steps: int, splits: int = 1, whole: bool = False
):
    """Runs a kernel; `ins` and `outs` are (kind of block, array) in the order of its arguments.

    So are the results.
    """
    batch, length, heads = shape
    name = kernel.func.__name__
    num_warps, num_stages = getattr(plan.tuning, name)
    specs = _specs(plan, length, steps, splits, whole=whole)
    made = pallas_call(
        kernel,
        grid=(steps, heads, batch),
        in_specs=[specs[kind] for kind, _ in ins],
        out_specs=[specs[kind] for kind, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for _, x in outs],
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=plan.interpret,
        name=f"kda_{name}",
    )(*(x for _, x in ins))
    return [(kind, x) for (kind, _), x in zip(outs, made, strict=True)]


def _made(kind: str, dtype, *shape: int):
    return kind, jax.ShapeDtypeStruct(shape, dtype)


def _inputs(plan: Plan, q, k, v, g, beta):
    """Tokens in the kernels' layout."""
    q = q if plan.interpret else on_gpu(q)
    return [
        ("shared", widen(q, plan.key)),
        ("shared", widen(k, plan.key)),
        ("value", widen(v, plan.value)),
        ("key", widen(g, plan.key)),
        ("beta", jnp.swapaxes(beta.astype(jnp.float32), 1, 2)),
    ]


def _marks(marks):
    return [] if marks is None else [("marks", marks)]


def _sums(plan: Plan):
    return "sums", jnp.asarray(sums(plan.chunk))


def _decays(plan: Plan, shape):
    """Of every chunk: q from its start, k to its end, the decay across it; and b, or W."""
    batch, length, heads = shape
    keys = [_made("keys", plan.dtype, batch, heads, length, plan.key)] * 3
    across = _made("across", jnp.float32, batch, heads, length // plan.chunk, plan.key)
    return [*keys[:2], across, keys[2]]


def _run_forward(plan: Plan, save: bool, q, k, v, g, beta, initial_state, marks):
    (batch, length, heads, width), key = v.shape, q.shape[-1]
    q_, k_, v_, g_, beta_ = _inputs(plan, q, k, v, g, beta)
    shape, count = (batch, length, heads), length // plan.chunk
    pairs = (batch, heads, length, plan.chunk)
    reads, overlaps, *ends, b_start = _call(
        functools.partial(kernels.score, plan, marks is not None),
        plan,
        shape,
        [_sums(plan), q_, k_, g_, beta_, *_marks(marks)],
        [
            *(_made("pairs", plan.dtype, *pairs), _made("pairs", jnp.float32, *pairs)),
            *_decays(plan, shape),
        ],
        steps=count,
    )
    w, u, *inverse = _call(
        functools.partial(kernels.solve, plan, save),
        plan,
        shape,
        [overlaps, b_start, v_, beta_],
        [
            _made("keys", plan.dtype, batch, heads, length, plan.key),
            _made("values", plan.dtype, batch, heads, length, plan.value),
            *([_made("pairs", plan.dtype, *pairs)] if save else []),
        ],
        steps=count,
    )
    state = (batch, heads, plan.key, plan.value)
    outs = [
        _made("value", v.dtype, *v_[1].shape),
        _made("state", jnp.float32, *state),
        _made("value", plan.dtype, *v_[1].shape),
        _made("states", plan.dtype, *state[:2], count, *state[2:]),
    ]
    (_, o), (_, final), *saved = _call(
        functools.partial(kernels.advance, plan, count, save),
        plan,
        shape,
        [reads, *ends, w, u, ("state", widen(initial_state, plan.key, plan.value))],
        outs if save else outs[:2],
        steps=plan.value // plan.value_block,
        whole=True,
    )
    return (o[..., :width], final[:, :, :key, :width]), (reads, *inverse, *saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kda(plan: Plan, q, k, v, g, beta, initial_state, marks):
    return _run_forward(plan, False, q, k, v, g, beta, initial_state, marks)[0]


def _kda_forward(plan: Plan, q, k, v, g, beta, initial_state, marks):
    out, saved = _run_forward(plan, True, q, k, v, g, beta, initial_state, marks)
    return out, (q, k, v, g, beta, marks, *(x for _, x in saved))


def _kda_backward(plan: Plan, residuals, cotangents):
    q, k, v, g, beta, marks, reads, inverse, delta, states = residuals
    do, dfinal = cotangents
    (batch, length, heads, width), key = v.shape, q.shape[-1]
    q_, k_, v_, g_, beta_ = _inputs(plan, q, k, v, g, beta)
    shape, count, do = (batch, length, heads), length // plan.chunk, widen(do, plan.value)
    inverse = ("pairs", inverse)
    *ends, w = _call(
        functools.partial(kernels.decay, plan, marks is not None),
        plan,
        shape,
        [_sums(plan), q_, k_, g_, beta_, inverse, *_marks(marks)],
        _decays(plan, shape),
        steps=count,
    )
    state = (batch, heads, plan.key, plan.value)
    dr, dstates, (_, dinitial) = _call(
        functools.partial(kernels.retreat, plan, count),
        plan,
        shape,
        [
            *(("pairs", reads), inverse, *ends, w, ("value", do)),
            ("state", widen(dfinal, plan.key, plan.value)),
        ],
        [
            _made("value", plan.dtype, *do.shape),
            _made("states", plan.dtype, *state[:2], count, *state[2:]),
            _made("state", jnp.float32, *state),
        ],
        steps=plan.value // plan.value_block,
        whole=True,
    )
    rows, do, delta = (batch, heads, length), ("value", do), ("value", delta)
    dreads, doverlaps, diagonal, (_, dv), (_, dbeta_v) = _call(
        functools.partial(kernels.pairs, plan, marks is not None),
        plan,
        shape,
        [v_, beta_, do, dr, delta, *_marks(marks)],
        [
            *[_made("pairs", plan.dtype, *rows, plan.chunk)] * 2,
            _made("beta", jnp.float32, *rows),
            _made("value", v.dtype, batch, length, heads, plan.value),
            _made("beta", jnp.float32, *rows),
        ],
        steps=count,
    )
    # Value heads of a group add up to their q/k head's gradient, in float32.
    narrow = [x.dtype if plan.group == 1 else jnp.float32 for x in (q, k)]
    wide = (batch, length, heads, plan.key)
    splits = plan.key // plan.key_block
    outs = [
        _made("key", narrow[0], *wide),
        _made("key", narrow[1], *wide),
        _made("key", g.dtype, *wide),
        _made("dbeta", jnp.float32, batch, heads, splits, length),
    ]
    (_, dq), (_, dk), (_, dg), (_, dbeta) = _call(
        functools.partial(kernels.transpose, plan, marks is not None),
        plan,
        shape,
        [
            *(_sums(plan), q_, k_, g_, beta_, do, dr, delta),
            *(("states", states), dstates, ends[-1], dreads, doverlaps, diagonal),
            *_marks(marks),
        ],
        outs,
        steps=count * splits,
        splits=splits,
    )
    dbeta = jnp.swapaxes(jnp.sum(dbeta, axis=2) + dbeta_v, 1, 2)
    dinitial = dinitial[:, :, :key, :width]
    dq, dk = group_sum(dq, q), group_sum(dk, k)
    return dq, dk, dv[..., :width], dg[..., :key], dbeta.astype(beta.dtype), dinitial, None


_kda.defvjp(_kda_forward, _kda_backward)


def kda_pallas_gpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    g: Float[Array, "B T Hv K"],
    beta: Float[Array, "B T Hv"],
    initial_state: Float[Array, "B Hv K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    chunk_size: int,
    interpret: bool = False,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Chunkwise KDA on an NVIDIA GPU; both passes are kernels. Arguments as in `kda`.

    q, k and v are float32 or bfloat16, g and the states float32. T must be a multiple of
    chunk_size, a power of two >= 16, of which more than 64 runs as 64; padding tokens carry
    k=v=beta=g=0. Under a mesh, call it inside `jaxalope.sharding.kernel_map`, as the layer does.
    Reverse mode only.

    `interpret` runs the same kernels on any platform, slowly, for tests.

    Raises:
      InputError: another dtype, or heads wider than 256; when lowered, another platform than CUDA.
    """
    check_triton("pallas_gpu")
    check("pallas_gpu", q, k, v, g)
    static = plan(q, v, scale, chunk_size, interpret)
    marks = None if segment_ids is None else segment_marks(segment_ids, static.chunk)
    return _kda(static, q, k, v, g, beta, initial_state, marks)
