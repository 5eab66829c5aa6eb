"""Operators as benchmarks run them: inputs of named shapes, passes over them, what may be tuned."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import workload
from plan import Assume

from jaxalope.layers.ops import grouped_matmul, kda, latent_decode, optional, tuning
from jaxalope.layers.ops.grouped_matmul import shapes as grouped_shapes
from jaxalope.layers.ops.kda import l2norm, softplus_gate
from jaxalope.layers.ops.kda import shapes as kda_shapes
from jaxalope.layers.ops.latent_decode import shapes as latent_shapes
from jaxalope.layers.ops.linear_cross_entropy import linear_cross_entropy


class Problem(NamedTuple):
    """One operator at one shape, with a batch, a length (tokens, or slots of a cache), a dtype.

    ``inputs`` makes arrays, for ``jax.eval_shape`` too; ``run`` takes them and picks what
    `implementation=None` picks, and what it returns may be summed and differentiated in the first
    ``learnt`` of them. ``passes`` are by implementation (and tokens a chunk, of those that have
    it): what is planned for chips that are absent, over ``pass_inputs``, whose values only
    ``assume`` knows; ``flops`` those of their products; ``heads`` what a token's time is shared by.
    """

    shape_class: str
    run: Callable
    inputs: Callable[[], tuple]
    learnt: int
    candidates: list[dict]
    passes: Callable[[str, int | None], dict[str, Callable]]
    pass_inputs: Callable[[], tuple]
    flops: dict[str, float]
    assume: Assume | None = None
    heads: int = 0


def normal(seed: int, *shape: int, dtype: str):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def kernels(operator) -> list[str]:
    """Implementations by name that may be worth a try on this platform."""
    here = {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",), "cuda": ("pallas_gpu",)}
    return [n for n in here.get(jax.default_backend(), ()) if n in operator]


# KDA --------------------------------------------------------------------------------------------

# Sizes of the GPU kernels to try, beside what they choose themselves.
KDA_GPU_SIZES = (
    *({"value_block": width} for width in (16, 32, 64)),
    *({"key_block": width} for width in (16, 32, 64, 128)),
    *({"carry_warps": warps} for warps in (4, 8)),
    *({"transpose_warps": warps} for warps in (2, 4, 8)),
)


def kda_inputs(s: kda_shapes.KdaShape, batch: int, length: int, dtype: str):
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


def kda_passes(implementation: str, chunk_size: int, segment_ids=None) -> dict[str, Callable]:
    """The two passes as functions of the inputs."""

    def forward(*arrays):
        *tokens, state = arrays
        return kda.kda(
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


def of_kda(shape: str, batch: int, length: int, dtype: str) -> Problem:
    s = kda_shapes.SHAPES[shape]
    sizes = [{"chunk_size": c} for c in (16, 32, 64, 128)]
    tried = [*sizes]
    for name in kernels(kda._IMPLEMENTATIONS):
        more = [{"heads": h, "tasks": t} for h, t in itertools.product((4, 8, 16), (4, 8))]
        if name == "pallas_gpu":
            more = KDA_GPU_SIZES
        tried += [{"implementation": name} | c | m for c, m in itertools.product(sizes, more)]
    inputs = functools.partial(kda_inputs, s, batch, length, dtype)
    return Problem(
        kda_shapes.shape_class(s.key_dim, s.value_dim),
        lambda *a: kda.kda(*a)[0],
        lambda: inputs()[:-1],
        5,
        tried,
        kda_passes,
        inputs,
        {},
        heads=s.num_value_heads,
    )


# Grouped products -------------------------------------------------------------------------------

# Of the GPU kernels, to try; XLA's form is not, as it may need more memory than there is.
GROUPED_GPU_SIZES = (
    *({"row_tile": rows, "warps": warps} for rows, warps in ((64, 4), (128, 4), (128, 8))),
    *({"depth_tile": depth} for depth in (32, 128)),
    *({"stages": stages} for stages in (2, 4)),
)


def grouped_products(form: str, dtype: str) -> Callable:
    """A product ``(x, w, group_sizes)`` by an implementation of ours, or one under its own name.

    ``ragged_dot`` is XLA's without our clearing of rows past the last group; ``mosaic_tpu`` and
    ``mosaic_tpu_v2``, which our "tokamax" runs, are tokamax's.
    """
    if form in grouped_matmul.IMPLEMENTATIONS:
        return functools.partial(grouped_matmul.grouped_matmul, implementation=form)
    if form == "ragged_dot":
        return functools.partial(jax.lax.ragged_dot, preferred_element_type=dtype)
    ragged_dot = optional.tokamax("grouped_matmul").ragged_dot
    return functools.partial(ragged_dot, preferred_element_type=dtype, implementation=form)


def grouped_passes(dtype: str, form: str, chunk_size=None) -> dict[str, Callable]:
    """A product, and its two gradients."""
    product = grouped_products(form, dtype)

    def backward(x, w, sizes, dy):
        return jax.vjp(lambda x, w: product(x, w, sizes), x, w)[1](dy)

    def anywhere(run):
        # In their gradients tokamax's kernels ask again for a TPU in this host, name or no name.
        def traced(*arrays):
            with optional.tokamax("grouped_matmul", "tokamax.config").cross_compile(True):
                return run(*arrays)

        return traced if form.startswith("mosaic") else run

    return {
        "forward": anywhere(lambda x, w, sizes, dy: product(x, w, sizes)),
        "backward": anywhere(backward),
    }


def of_grouped_matmul(shape: str, batch: int, length: int, dtype: str) -> Problem:
    s = grouped_shapes.SHAPES[shape]
    rows = batch * length * s.top_k
    wide = (s.num_experts, s.features, s.hidden_features)
    narrow = (s.num_experts, s.hidden_features, s.features)
    owners = np.random.default_rng(0).choice(s.num_experts, rows, p=None)
    sizes = np.bincount(owners, minlength=s.num_experts)

    def inputs():
        weights = (
            normal(i, *shape, dtype=dtype) / math.sqrt(shape[1])
            for i, shape in enumerate((wide, wide, narrow))
        )
        x = normal(9, rows, s.features, dtype=dtype)
        return (x, *weights, jnp.asarray(sizes, jnp.int32))

    def pass_inputs():
        x, gate, _, _, groups = inputs()
        return x, gate, groups, normal(8, rows, s.hidden_features, dtype=dtype)

    blocks = [{"implementation": "blocked", "block": b} for b in (16, 32, 64, 128)]
    others = [{"implementation": "xla"}, {"implementation": "tokamax"}]
    if kernels(["pallas_gpu"]):
        blocks = [{"implementation": "pallas_gpu"} | sizes for sizes in GROUPED_GPU_SIZES]
        others = [{"implementation": "blocked"}, {"implementation": "tokamax"}]
    elif jax.default_backend() != "cpu":
        blocks = []  # loops of a length that the data decide
    flops = 2.0 * rows * s.features * s.hidden_features
    return Problem(
        grouped_shapes.shape_class(s.num_experts, wide),
        grouped_matmul.grouped_swiglu,
        inputs,
        4,
        [*blocks, *others],
        functools.partial(grouped_passes, dtype),
        pass_inputs,
        {"forward": flops, "backward": 2 * flops},
        workload.grouped_product(sizes),
    )


# Latent decoding --------------------------------------------------------------------------------


def of_latent_decode(shape: str, batch: int, length: int, dtype: str) -> Problem:
    s = latent_shapes.SHAPES[shape]

    def inputs():
        q = normal(0, batch, 1, s.num_heads, s.width, dtype=dtype)
        latent = normal(1, batch, length, s.width, dtype=dtype)
        return q, latent, jnp.full((batch, 1), length - 1, jnp.int32)

    def run(q, latent, positions, implementation=None):
        return latent_decode.latent_decode(
            q,
            latent,
            positions=positions,
            value_dim=s.value_dim,
            scale=s.width**-0.5,
            implementation=implementation,
        )

    return Problem(
        latent_shapes.shape_class(s.width, s.value_dim),
        run,
        inputs,
        0,
        [{"implementation": name} for name in ("xla", *kernels(latent_decode.IMPLEMENTATIONS))],
        lambda form, chunk_size=None: {"forward": functools.partial(run, implementation=form)},
        inputs,
        {"forward": 2.0 * batch * length * s.num_heads * (s.width + s.value_dim)},
        workload.full_caches(batch, length),
    )


# The loss ---------------------------------------------------------------------------------------


def of_linear_cross_entropy(shape: str, batch: int, length: int, dtype: str) -> Problem:
    vocab, width = map(int, shape.split("x"))

    def inputs():
        targets = jax.random.randint(jax.random.key(2), (batch, length), 0, vocab)
        kernel = jax.random.normal(jax.random.key(1), (width, vocab)) / math.sqrt(width)
        hidden = normal(0, batch, length, width, dtype=dtype)
        return hidden, kernel, targets, jnp.ones(targets.shape)

    def passes(form, chunk_size=None):
        def forward(*arrays):
            how = {"implementation": form, "chunk_size": chunk_size}
            return linear_cross_entropy(*arrays, accuracy=form != "tokamax", **how)[0]

        both = jax.value_and_grad(forward, argnums=(0, 1))
        return {"forward": forward, "forward+backward": both}

    sizes = (64, 128, 256, 512, 1024, 2048, 4096)
    flops = 2.0 * batch * length * width * vocab
    return Problem(
        f"v{tuning.up_to_power_of_2(vocab)}",
        lambda *a: linear_cross_entropy(*a)[0],
        inputs,
        2,
        [{"chunk_size": c} for c in sizes if c <= length],
        passes,
        inputs,
        {"forward": flops, "forward+backward": 3 * flops},
    )


PROBLEMS = {
    "grouped_matmul": of_grouped_matmul,
    "kda": of_kda,
    "latent_decode": of_latent_decode,
    "linear_cross_entropy": of_linear_cross_entropy,
}
