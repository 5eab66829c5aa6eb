"""Measures choices of an operator on this machine, and keeps what is faster in the table.

    python bench/tune.py --op=linear_cross_entropy --shape=8192x256
    python bench/tune.py --op=kda --shape=kimi_48b --dtype=bfloat16
    python bench/tune.py --op=grouped_matmul --shape=kimi_48b --dtype=bfloat16
    python bench/tune.py --op=latent_decode --shape=kimi_48b --dtype=bfloat16

All candidates and the defaults run in turns on the same inputs, loss and gradients (latent decoding
has the forward pass alone); a turn takes them in an order of its own, each once before it is timed,
since what ran before leaves its mark on caches and clocks. A speed-up over the defaults is taken
within a turn. The defaults run under a second name too: what is measured of them is noise. The
candidate of the largest median is kept for this kind of device and this class of shapes if that is
``--margin`` above 1 and above the second defaults', and if it was faster in nine turns of ten;
otherwise the entry is removed, so that the defaults hold, unless it is one of
``bench/tpu_schedule.py``, whose sizes count only where the kernel is asked for by name. The table,
``layers/ops/tuning.json``, is replaced at once and stays sorted: commit it. ``--dry_run`` leaves it
alone.

Candidates that cannot run here (a kernel for another platform) are left out by name.
"""

import functools
import itertools
import json
import math
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kda_problem
import numpy as np
import report
from absl import app, flags

from jaxalope.layers.ops import grouped_matmul, kda, latent_decode, tuning
from jaxalope.layers.ops.grouped_matmul import shapes as grouped_shapes
from jaxalope.layers.ops.kda import shapes as kda_shapes
from jaxalope.layers.ops.latent_decode import shapes as latent_shapes
from jaxalope.layers.ops.linear_cross_entropy import linear_cross_entropy

_OP = flags.DEFINE_enum("op", None, sorted(tuning.CHOICES), "The operator.", required=True)
_SHAPE = flags.DEFINE_string(
    "shape", None, "A named shape; of the loss, VOCABxWIDTH.", required=True
)
_TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens, or slots of a cache.", lower_bound=64)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
_TURNS = flags.DEFINE_integer("turns", 10, "Measurements of each candidate.", lower_bound=3)
_MARGIN = flags.DEFINE_float("margin", 1.05, "Least speed-up that is kept.", lower_bound=1.0)
_DRY = flags.DEFINE_bool("dry_run", False, "Print only.")
_TABLE = flags.DEFINE_string("table", str(tuning.PATH), "The table to rewrite.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


AGAIN = "{} again"


class Problem(NamedTuple):
    """One operator at one shape."""

    shape_class: str
    run: Callable  # of arrays; what it returns is summed and differentiated
    arrays: tuple
    learnt: int  # of the arrays, the first ones
    candidates: list[dict]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(_DTYPE.value)


def kernels(operator: str) -> list[str]:
    """Implementations by name that may be worth a try on this platform."""
    here = {"tpu": ("pallas_tpu",), "gpu": ("pallas_gpu",), "cuda": ("pallas_gpu",)}
    return [n for n in here.get(jax.default_backend(), ()) if n in operator]


def of_kda() -> Problem:
    s = kda_shapes.SHAPES[_SHAPE.value]
    *tokens, _ = kda_problem.inputs(s, 1, _TOKENS.value, _DTYPE.value)
    sizes = [{"chunk_size": c} for c in (16, 32, 64, 128)]
    tried = [*sizes]
    for name in kernels(kda._IMPLEMENTATIONS):
        more = [{"heads": h, "tasks": t} for h, t in itertools.product((4, 8, 16), (4, 8))]
        if name == "pallas_gpu":
            more = kda_problem.GPU_SIZES
        tried += [{"implementation": name} | c | m for c, m in itertools.product(sizes, more)]
    return Problem(
        kda_shapes.shape_class(s.key_dim, s.value_dim),
        lambda *a: kda.kda(*a)[0],
        tuple(tokens),
        5,
        tried,
    )


def of_grouped_matmul() -> Problem:
    s = grouped_shapes.SHAPES[_SHAPE.value]
    rows = _TOKENS.value * s.top_k
    wide = (s.num_experts, s.features, s.hidden_features)
    narrow = (s.num_experts, s.hidden_features, s.features)
    owners = np.random.default_rng(0).choice(s.num_experts, rows, p=None)
    sizes = jnp.asarray(np.bincount(owners, minlength=s.num_experts), jnp.int32)
    weights = (
        normal(i, *shape) / math.sqrt(shape[1]) for i, shape in enumerate((wide, wide, narrow))
    )
    blocks = [{"implementation": "blocked", "block": b} for b in (16, 32, 64, 128)]
    others = [{"implementation": "xla"}, {"implementation": "tokamax"}]
    if jax.default_backend() != "cpu":
        blocks = []  # loops of a length that the data decide
    return Problem(
        grouped_shapes.shape_class(s.num_experts, wide),
        grouped_matmul.grouped_swiglu,
        (normal(9, rows, s.features), *weights, sizes),
        4,
        [*blocks, *others],
    )


def of_latent_decode() -> Problem:
    s = latent_shapes.SHAPES[_SHAPE.value]
    q, latent = normal(0, 1, 1, s.num_heads, s.width), normal(1, 1, _TOKENS.value, s.width)
    positions = jnp.full((1, 1), _TOKENS.value - 1, jnp.int32)
    return Problem(
        latent_shapes.shape_class(s.width, s.value_dim),
        lambda q, latent, positions: latent_decode.latent_decode(
            q, latent, positions=positions, value_dim=s.value_dim, scale=s.width**-0.5
        ),
        (q, latent, positions),
        0,
        [{"implementation": name} for name in ("xla", *kernels(latent_decode.IMPLEMENTATIONS))],
    )


def of_linear_cross_entropy() -> Problem:
    vocab, width = map(int, _SHAPE.value.split("x"))
    targets = jax.random.randint(jax.random.key(2), (1, _TOKENS.value), 0, vocab)
    kernel = jax.random.normal(jax.random.key(1), (width, vocab)) / math.sqrt(width)
    sizes = (64, 128, 256, 512, 1024, 2048, 4096)
    return Problem(
        f"v{tuning.up_to_power_of_2(vocab)}",
        lambda *a: linear_cross_entropy(*a)[0],
        (normal(0, 1, _TOKENS.value, width), kernel, targets, jnp.ones(targets.shape)),
        2,
        [{"chunk_size": c} for c in sizes if c <= _TOKENS.value],
    )


PROBLEMS = {
    "grouped_matmul": of_grouped_matmul,
    "kda": of_kda,
    "latent_decode": of_latent_decode,
    "linear_cross_entropy": of_linear_cross_entropy,
}


def compiled(problem: Problem, choices: dict):
    """The program under these choices, or the reason why there is none."""

    def program(*arrays):
        if not problem.learnt:
            return problem.run(*arrays)
        given, rest = arrays[: problem.learnt], arrays[problem.learnt :]
        out, pull = jax.vjp(lambda *a: problem.run(*a, *rest), *given)
        return out, pull(jnp.ones_like(out))

    try:
        with tuning.trying(_OP.value, **choices), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # that the default was used instead
            return jax.jit(program).lower(*problem.arrays).compile()
    except Exception as error:  # A compiler's refusal has many classes; all leave a candidate out.
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def measure(programs: dict, turns: int) -> dict[str, np.ndarray]:
    """Wall seconds ``[turns]`` of every program."""
    rng, times = np.random.default_rng(0), {name: [] for name in programs}
    for _ in range(turns):
        for i in rng.permutation(len(programs)):
            name, run = list(programs.items())[i]
            jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: np.asarray(seconds) for name, seconds in times.items()}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    kind = jax.devices()[0].device_kind
    problem = PROBLEMS[_OP.value]()
    facts = report.facts(
        op=_OP.value, kind=kind, shape=_SHAPE.value, tokens=_TOKENS.value, dtype=_DTYPE.value
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    programs = {}
    for choices in ({}, *problem.candidates):
        found = compiled(problem, choices)
        if isinstance(found, str):
            print(f"left out: {choices} ({found})", flush=True)
            continue
        programs[json.dumps(choices, sort_keys=True)] = functools.partial(found, *problem.arrays)
    programs[AGAIN] = programs["{}"]
    seconds = measure(programs, _TURNS.value)
    gain = {name: seconds["{}"] / times for name, times in seconds.items()}
    lines, rows = [], []
    for name, times in seconds.items():
        lines.append((name, report.spread(times * 1e3), report.spread(gain[name], 2)))
        rows.append(facts | {"choices": name, "wall_s": times.tolist()})
    print(report.table((f"{_OP.value} {problem.shape_class}", "ms", "speed-up"), lines))
    report.write_rows(_OUTPUT.value, rows)
    noise = max(1.0, float(np.median(gain.pop(AGAIN))))
    best = max(gain, key=lambda name: np.median(gain[name]))
    median, sure = float(np.median(gain[best])), float(np.mean(gain[best] > 1))
    entry = None
    if median >= _MARGIN.value * noise and sure >= 0.9:
        entry = json.loads(best) | {key: facts[key] for key in ("jax", "date")}
        entry |= {"by": "time", "speedup": round(median, 2)}
    path = pathlib.Path(_TABLE.value)
    there = tuning.read(path).get(_OP.value, {}).get(kind, {}) if path.exists() else {}
    if entry is None and there.get(problem.shape_class, {}).get("by") == "schedule":
        print("the sizes by schedule stay: they change no default")
        return
    verb = "would be" if _DRY.value else "is"
    print(f"{_OP.value} / {kind} / {problem.shape_class} {verb} {entry or 'the defaults'}")
    if not _DRY.value:
        tuning.write(_OP.value, kind, {problem.shape_class: entry}, path)


if __name__ == "__main__":
    app.run(main)
