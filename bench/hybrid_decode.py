"""Decoding at long context: the hybrid, 3 KDA layers to 1 MLA, against MLA in every layer.

    python bench/hybrid_decode.py --model=demo --contexts=4096,65536,1048576 --memory_gib=1.5
    python bench/hybrid_decode.py --model=kimi_linear_48b --layers=4 --memory_gib=60 \
        --contexts=4096,32768,131072,524288,1048576 --decode_implementation=pallas_gpu \
        --output=bench/results/hybrid_decode.jsonl

Both models have the same widths, layers and mixtures and random weights, large ones in the model's
dtype. Each decodes as many rows as `--memory_gib` has room for with caches of that context (or
`--batch`), greedy, `--steps` tokens in one call; caches are filled with numbers, not by a prefill.
The two run in turns; one cache is in memory at a time. The published figure is 6.3 times the tokens
a second at 1M tokens, and 74% fewer bytes of cache (Kimi Linear, arXiv 2510.26692).
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags
from flax import nnx

from jaxalope.model import KimiLinearConfig, build_model
from jaxalope.sharding import init_params

_MODELS = ("demo", "tiny", "kimi_linear_48b", "scaling_653m", "scaling_1b1", "scaling_1b7")
_MODEL = flags.DEFINE_enum("model", "demo", _MODELS, "Widths and mixtures.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers; every fourth is MLA.", lower_bound=4)
_CONTEXTS = flags.DEFINE_list("contexts", ["4096", "16384"], "Tokens that a row has read.")
_MEMORY = flags.DEFINE_float("memory_gib", 0.25, "What a model's caches may take.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", None, "Rows of both models; as many as fit if absent.")
_MAX_BATCH = flags.DEFINE_integer("max_batch", 512, "Most rows.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Tokens a row and call.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Calls of each model.", lower_bound=1)
_DECODE = flags.DEFINE_string("decode_implementation", None, "How MLA reads its cache.")
_KDA = flags.DEFINE_string("kda_implementation", None, "Of KDA.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")

# Arrays of more elements are held in the model's dtype, not in float32.
_LARGE = 2**16


def configs() -> dict[str, KimiLinearConfig]:
    """The two models."""
    layers = tuple(range(1, _LAYERS.value + 1))
    full = layers[3::4]
    hybrid = dataclasses.replace(
        getattr(KimiLinearConfig, _MODEL.value)(),
        num_layers=len(layers),
        kda_layers=tuple(i for i in layers if i not in full),
        full_attn_layers=full,
        decode_implementation=_DECODE.value,
        kda_implementation=_KDA.value,
        # A scan over layers would copy their caches at every token.
        scan_layers=False,
        remat="none",
    )
    mla = dataclasses.replace(hybrid, kda_layers=(), full_attn_layers=layers)
    return {"hybrid": hybrid, "mla": mla}


class Side:
    """One model, and a compiled call of it for one context."""

    def __init__(self, config: KimiLinearConfig):
        self.config = config

        def make(key):
            model = build_model(config, key)
            low = jax.tree.map(
                lambda x: x.astype(config.dtype) if x.size > _LARGE else x, nnx.state(model)
            )
            nnx.update(model, low)
            return model

        self.graphdef, self.params = init_params(make, jax.random.key(0))

    def cache(self, batch: int, context: int):
        """Shapes of the caches of so many rows, with room for the tokens to come."""

        def empty(params):
            return nnx.merge(self.graphdef, params).init_cache(batch, context + _STEPS.value)

        return jax.eval_shape(empty, self.params)

    def cache_bytes(self, batch: int, context: int) -> int:
        """What they take."""
        leaves = jax.tree.leaves(self.cache(batch, context))
        return sum(x.size * x.dtype.itemsize for x in leaves)

    def prepare(self, context: int) -> None:
        """Compiles the call, with as many rows as fit."""
        one = self.cache_bytes(1, context)
        fitting = int(_MEMORY.value * 2**30 // one)
        self.batch = _BATCH.value or max(1, min(fitting, _MAX_BATCH.value))
        self.row_bytes = one
        shapes = self.cache(self.batch, context)
        length = jnp.full((self.batch,), context, jnp.int32)

        def fill():
            leaves, treedef = jax.tree.flatten(shapes)
            filled = jax.tree.unflatten(treedef, [_numbers(x) for x in leaves])
            return dataclasses.replace(filled, length=length)

        def decode(params, cache):
            model = nnx.merge(self.graphdef, params)

            def step(_, state):
                tokens, cache = state
                logits, cache = model(tokens, cache)
                return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

            start = (jnp.zeros((self.batch, 1), jnp.int32), cache)
            return jax.lax.fori_loop(0, _STEPS.value, step, start)

        self.fill = jax.jit(fill)
        self.decode = jax.jit(decode, donate_argnums=1).lower(self.params, shapes).compile()

    def call(self) -> float:
        """Seconds of one call; its cache is made before and dropped after."""
        cache = jax.block_until_ready(self.fill())
        start = time.perf_counter()
        jax.block_until_ready(self.decode(self.params, cache))
        return time.perf_counter() - start


def _numbers(like):
    """Of about 1 in size, no two neighbours alike, and made without other memory."""
    phase = sum(
        jax.lax.broadcasted_iota(jnp.float32, like.shape, axis) * (0.7 + axis)
        for axis in range(len(like.shape))
    )
    return jnp.sin(phase).astype(like.dtype)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    sides = {name: Side(config) for name, config in configs().items()}
    facts = report.facts(
        model=_MODEL.value,
        layers=_LAYERS.value,
        dtype=sides["mla"].config.dtype,
        steps=_STEPS.value,
        memory_gib=_MEMORY.value,
        decode_implementation=_DECODE.value,
        kda_implementation=_KDA.value,
        parameters={name: side.config.num_params() for name, side in sides.items()},
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    rows, lines = [], []
    for context in map(int, _CONTEXTS.value):
        for side in sides.values():
            side.prepare(context)
            side.call()
        seconds = {name: [] for name in sides}
        for _ in range(_TURNS.value):
            for name, side in sides.items():
                seconds[name].append(side.call())
        speeds, new = {}, []
        for name, side in sides.items():
            speeds[name] = side.batch * _STEPS.value / np.asarray(seconds[name])
            new.append(
                {
                    "side": name,
                    "context": context,
                    "batch": side.batch,
                    "cache_bytes_a_row": side.row_bytes,
                    "seconds": seconds[name],
                }
            )
        rows += [facts | row for row in new]
        report.write_rows(_OUTPUT.value, rows[-len(sides) :])
        hybrid, mla = sides["hybrid"], sides["mla"]
        lines.append(
            (
                context,
                f"{hybrid.batch} / {mla.batch}",
                report.spread(speeds["hybrid"]),
                report.spread(speeds["mla"]),
                report.spread(speeds["hybrid"] / speeds["mla"], 2),
                f"{hybrid.row_bytes / 2**20:.1f} / {mla.row_bytes / 2**20:.1f}",
                f"{100 * (hybrid.row_bytes / mla.row_bytes - 1):.0f} %",
            )
        )
        print(lines[-1], flush=True)
    headers = ("context", "rows", "hybrid, tokens/s", "all MLA, tokens/s", "ratio")
    print(report.table((*headers, "cache a row, MiB", "cache"), lines))


if __name__ == "__main__":
    app.run(main)
