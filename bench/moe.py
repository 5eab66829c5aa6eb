"""Routed experts, forward and forward+backward: ``blocked``, ``ragged_dot`` and every expert.

    python bench/moe.py --output=bench/results/moe.jsonl

The forms run in turns on the same inputs; a ratio is taken within a turn, and reported as the
median of the turns with their 10th and 90th percentile. ``matmul`` is one plain dense layer of the
arithmetic that the chosen experts need: the floor. Other
load on the machine hardly counts in process time, which is of all threads.

    python bench/moe.py --topology=h200 --shape=kimi_48b --tokens=8192 --dtype=bfloat16 \
        --forms=ragged_dot,blocked,pallas_gpu --output=bench/results/moe_gpu_compile.jsonl

compiles for a device that is not there instead, and runs nothing: the compiler's temporaries, and
of kernels of ours for GPUs registers a thread and bytes of its stack, where values are spilled. On
a GPU, `--forms=blocked,pallas_gpu` measures what can run there (`ragged_dot` at these sizes
cannot).
"""

import functools
import time

import cubin
import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags

from jaxalope.layers.ops.grouped_matmul import grouped_swiglu
from jaxalope.layers.ops.grouped_matmul.shapes import SHAPES
from jaxalope.sharding import absent_devices

_SHAPE = flags.DEFINE_enum("shape", "kimi_8m", sorted(SHAPES), "Widths and numbers of experts.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Tokens; each makes top_k rows.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of rows and weights.")
_TURNS = flags.DEFINE_integer("turns", 20, "Measurements of each form.", lower_bound=1)
_FORMS = flags.DEFINE_list(
    "forms", ["blocked", "ragged_dot", "every expert"], "Which to measure or compile."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Compile for a device of this kind: h200.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


def every_expert(x, gate, up, down, sizes):
    """What a mixture without sorting does: all experts on all rows, then a selection."""
    hidden = jax.nn.silu(jnp.einsum("md,edf->emf", x, gate)) * jnp.einsum("md,edf->emf", x, up)
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    owner = (row >= ends - sizes) & (row < ends)
    return jnp.einsum("emf,efd->md", jnp.where(owner.T[:, :, None], hidden, 0), down)


def matmul(x, gate, up, down, sizes):
    """The first expert on every row."""
    return (jax.nn.silu(x @ gate[0]) * (x @ up[0])) @ down[0]


FORMS = {
    "blocked": functools.partial(grouped_swiglu, implementation="blocked"),
    "ragged_dot": functools.partial(grouped_swiglu, implementation="xla"),
    "pallas_gpu": functools.partial(grouped_swiglu, implementation="pallas_gpu"),
    "tokamax": functools.partial(grouped_swiglu, implementation="tokamax"),
    "every expert": every_expert,
    "matmul": matmul,
}


def sizes_of(load: str, num_rows: int, num_experts: int) -> np.ndarray:
    """Rows of each expert: drawn evenly, drawn from a skewed distribution, or all of one."""
    rng = np.random.default_rng(0)
    if load == "one expert":
        return num_rows * np.eye(num_experts, dtype=int)[num_experts // 2]
    p = rng.dirichlet([2.0] * num_experts) if load == "skewed" else None
    return np.bincount(rng.choice(num_experts, num_rows, p=p), minlength=num_experts)


def measure(functions: dict, args: tuple, turns: int) -> dict[str, np.ndarray]:
    """``{name: [turns, 2]}``: wall and process seconds of every function in every turn."""
    times = {name: [] for name in functions}
    for _ in range(turns):
        for name, fn in functions.items():
            wall, process = time.perf_counter(), time.process_time()
            jax.block_until_ready(fn(*args))
            times[name].append((time.perf_counter() - wall, time.process_time() - process))
    return {name: np.asarray(t) for name, t in times.items()}


def inputs():
    """Rows, gradients of the outputs, and weights of every expert."""
    s = SHAPES[_SHAPE.value]
    keys = jax.random.split(jax.random.key(0), 5)
    rows = (_TOKENS.value * s.top_k, s.features)
    wide = (s.num_experts, s.features, s.hidden_features)
    narrow = (s.num_experts, s.hidden_features, s.features)
    return tuple(
        (jax.random.normal(key, shape) / np.sqrt(shape[-2] if len(shape) == 3 else 1)).astype(
            _DTYPE.value
        )
        for key, shape in zip(keys, [rows, rows, wide, wide, narrow], strict=True)
    )


def own_kernels(device, compiled) -> list[cubin.Kernel]:
    """Those of a program for a GPU that have the operator's name."""
    if device.platform != "gpu":
        return []
    found = cubin.kernels(compiled.runtime_executable().serialize()).values()
    return [kernel for kernel in found if kernel.name.startswith("grouped_matmul")]


def compile_ahead(facts):
    """Compiles for `--topology`, and prints and writes what the compiler says."""
    device = absent_devices(_TOPOLOGY.value)[0]
    x, dy, *weights = jax.eval_shape(inputs)
    sizes = jax.ShapeDtypeStruct((weights[0].shape[0],), jnp.int32)
    rows, lines = [], []
    for form in _FORMS.value:

        def forward(sizes, x, *weights, fn=FORMS[form]):
            return fn(x, *weights, sizes)

        def both(sizes, dy, *arrays, forward=forward):
            y, pull = jax.vjp(functools.partial(forward, sizes), *arrays)
            return y, pull(dy)

        passes = {"forward": (forward, (x,)), "forward+backward": (both, (dy, x))}
        for name, (program, given) in passes.items():
            compiled = report.compile_for(device, program, sizes, *given, *weights)
            size = compiled.memory_analysis().temp_size_in_bytes
            row = {"pass": name, "form": form, "temporary_bytes": size}
            row["kernels"] = {k.name: (k.registers, k.frame) for k in own_kernels(device, compiled)}
            rows.append(facts | row)
            each = (f"{k} {r}/{frame}" for k, (r, frame) in row["kernels"].items())
            lines.append((device.device_kind, name, form, f"{size / 2**30:.2f}", "; ".join(each)))
    headers = ("device", "pass", "form", "temporaries, GiB", "kernels, registers/stack")
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    unknown = [form for form in _FORMS.value if form not in FORMS]
    if unknown:
        raise app.UsageError(f"--forms={unknown[0]} is not one of {', '.join(FORMS)}")
    facts = report.facts(shape=_SHAPE.value, tokens=_TOKENS.value, dtype=_DTYPE.value)
    if _TOPOLOGY.value:
        facts["target"] = _TOPOLOGY.value
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    if _TOPOLOGY.value:
        compile_ahead(facts)
    else:
        measure_all(facts)


def measure_all(facts):
    """Times the forms under every load on the device that is here."""
    s = SHAPES[_SHAPE.value]
    x, dy, *weights = inputs()
    arrays, num_rows = (x, *weights), x.shape[0]
    forward_flops = 6 * num_rows * s.features * s.hidden_features
    forms = {name: FORMS[name] for name in (*_FORMS.value, "matmul")}
    lines = []
    for load in ("even", "skewed", "one expert"):
        sizes = jnp.asarray(sizes_of(load, num_rows, s.num_experts), jnp.int32)

        def forward_only(fn, sizes=sizes):
            return jax.jit(lambda *args: fn(*args, sizes))

        def with_backward(fn, sizes=sizes):
            def step(*args):
                y, pull = jax.vjp(lambda *a: fn(*a, sizes), *args)
                return y, pull(dy)  # without y, the compiler would drop a part of the forward pass

            return jax.jit(step)

        passes = {
            "forward": {n: forward_only(f) for n, f in forms.items()},
            "forward+backward": {n: with_backward(f) for n, f in forms.items()},
        }
        for name, functions in passes.items():
            for form in [*functions]:
                why = report.refusal(functools.partial(functions[form], *arrays))
                if why is not None:
                    del functions[form]
                    print(load, name, form, "left out:", why, flush=True)
            times = measure(functions, arrays, _TURNS.value)
            flops = forward_flops * (1 if name == "forward" else 3)
            for form, seconds in times.items():
                wall, process = seconds.min(0) * 1e3
                ratio = np.percentile(seconds[:, 0] / times["matmul"][:, 0], [10, 50, 90])
                cells = (load, name, form, f"{wall:.2f}", f"{process:.2f}")
                share = f"{ratio[1]:.2f} ({ratio[0]:.2f} - {ratio[2]:.2f})"
                lines.append((*cells, f"{flops / wall / 1e6:.0f}", share))
                row = {"load": load, "pass": name, "form": form, "flops": flops}
                row |= {"wall_s": seconds[:, 0].tolist(), "process_s": seconds[:, 1].tolist()}
                report.write_rows(_OUTPUT.value, [facts | row])
                print(lines[-1], flush=True)
    headers = "load", "pass", "form", "ms (min)", "process ms (min)", "active GFLOP/s"
    print(report.table((*headers, "of matmul's time"), lines))


if __name__ == "__main__":
    app.run(main)
