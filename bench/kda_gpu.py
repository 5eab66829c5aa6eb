"""KDA on a CUDA machine: `pallas_gpu`, `xla` and Triton's `fla`, in turns on the same inputs.

    python bench/kda_gpu.py --output=bench/results/kda_gpu.jsonl
    python bench/kda_gpu.py --heads=32 --lengths=8192,65536 --output=bench/results/kda_gpu.jsonl

Forward and forward+backward, fixed and packed rows, at every length of --lengths and every number
of --heads, K and V of 128; then one decoding step. `fla` is there where it and torch with CUDA can
be imported, twice for the gradients: as it is, and with what it can keep kept ("fla, kept").

Each side first has the outputs and gradients of its first two heads compared with the XLA form in
float32. Root of mean squared error over root of mean square, of the worst, is `error`; above 3% a
side is not timed. A measurement is --calls calls that are waited for together, so that what it
costs to launch one hides behind the one before, on both sides. The last columns are shares of what
an H200 can do: the time that the bytes of inputs and outputs, once, or the FLOPs would take, over
the time taken. `--interpret` with tiny lengths runs the same on a CPU.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import problems
import report
from absl import app, flags

import jaxalope.layers.ops.kda as kda_module
from jaxalope.layers.ops.kda import kda_step, pallas_gpu, pallas_gpu_step
from jaxalope.layers.ops.kda import step as step_module
from jaxalope.layers.ops.kda.shapes import KdaShape

_LENGTHS = flags.DEFINE_list("lengths", ["2048", "8192", "32768", "65536"], "T.")
_HEADS = flags.DEFINE_list("heads", ["16", "32", "64", "96"], "Heads.")
_WIDTH = flags.DEFINE_integer("width", 128, "K and V.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1, "Rows.", lower_bound=1)
_SEGMENTS = flags.DEFINE_integer("segments", 8, "Documents of a packed row.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of q, k and v.")
_CHUNK = flags.DEFINE_integer("chunk_size", 64, "Tokens a chunk.")
_TURNS = flags.DEFINE_integer("turns", 7, "Measurements of each side.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 10, "Calls a measurement.", lower_bound=1)
_INTERPRET = flags.DEFINE_bool("interpret", False, "Interpret our kernels, on a CPU.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")

OURS = "pallas_gpu"
# What an H200 can do, as measured: bytes a second from memory, bfloat16 FLOPs a second.
_H200_BYTES = 4.3e12
_H200_FLOPS = 790e12
_MOST_ERROR = 3e-2


def limits(name: str, s: KdaShape, length: int) -> dict[str, float]:
    """Seconds that an H200 would need for the bytes, and for the FLOPs, of one pass over a row."""
    key, value, chunk = s.key_dim, s.value_dim, _CHUNK.value
    size = jnp.dtype(_DTYPE.value).itemsize
    forward = size * (2 * key + 2 * value) + 4 * key + 4
    flops = 6 * key * value + chunk * (6 * key + 4 * value + chunk)
    if name == "forward+backward":
        # Inputs and the outputs' gradients again, and the gradients of the inputs.
        forward += size * (4 * key + 3 * value) + 8 * key + 8
        flops += 16 * key * value + 10 * chunk * (key + value)
    tokens = _BATCH.value * length * s.num_value_heads
    return {"bytes_s": forward * tokens / _H200_BYTES, "flops_s": flops * tokens / _H200_FLOPS}


# fla -------------------------------------------------------------------------------------------


class OnTorch:
    """Results of torch, which `jax.block_until_ready` waits for."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def block_until_ready(self):
        import torch

        torch.cuda.synchronize()
        return self

    def numpy(self):
        return [x.detach().float().cpu().numpy() for x in two_heads(self.tensors)]


def fla_sides(arrays, segment_ids) -> dict[str, dict]:
    """Its passes on copies of the inputs, by side; none where it cannot be imported or run."""
    try:
        import torch
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        print(f"no fla: {error}", flush=True)
        return {}
    if not torch.cuda.is_available():
        print("no fla: torch finds no CUDA", flush=True)
        return {}

    def copy(x):
        x = torch.from_numpy(np.array(x, np.float32)).cuda()
        return x.to(torch.bfloat16) if _DTYPE.value == "bfloat16" else x

    tokens = [copy(x) for x in arrays[:3]]
    g, beta, state = (torch.from_numpy(np.array(x, np.float32)).cuda() for x in arrays[3:])
    extra = {}
    if segment_ids is not None:
        # Its documents have a state each. Ours enters the first one and leaves the last.
        ends = np.flatnonzero(np.diff(np.asarray(segment_ids[0]), append=0)) + 1
        starts = torch.tensor([0, *ends], dtype=torch.long)
        extra = {"cu_seqlens": starts.cuda(), "cu_seqlens_cpu": starts}
        state = torch.cat([state, state.new_zeros(len(ends) - 1, *state.shape[1:])])
    inputs = [x.requires_grad_() for x in (*tokens, g, beta, state)]

    def run(**more):
        o, final = chunk_kda(
            *inputs[:-1], initial_state=inputs[-1], output_final_state=True, **extra, **more
        )
        return o, final

    def forward():
        with torch.no_grad():
            o, final = run()
        return OnTorch(o, final[-_BATCH.value :])

    def both(**more):
        o, final = run(**more)
        dfinal = torch.zeros_like(final)
        dfinal[-_BATCH.value :] = final[-_BATCH.value :].detach()
        *grads, dstate = torch.autograd.grad((o, final), inputs, (o.detach(), dfinal))
        return OnTorch(o, final[-_BATCH.value :], *grads, dstate[: _BATCH.value])

    kept = functools.partial(both, disable_recompute=True)
    return {"fla": {"forward": forward, "forward+backward": both},
            "fla, kept": {"forward+backward": kept}}  # fmt: skip


# Errors ----------------------------------------------------------------------------------------


def two_heads(arrays) -> tuple:
    """Of o and the final state, then of the gradients of q, k, v, g, beta and the initial state."""
    return tuple(x[:, :2] if n in (1, 7) else x[:, :, :2] for n, x in enumerate(arrays))


def error(got, want) -> float:
    """Of the worst of some arrays."""

    def of_one(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2)))

    return max(of_one(x, y) for x, y in zip(got, want, strict=True))


# Measuring -------------------------------------------------------------------------------------


def prepare():
    if _INTERPRET.value:
        kernel = functools.partial(pallas_gpu.kda_pallas_gpu, interpret=True)
        kda_module._IMPLEMENTATIONS[OURS] = kernel
        kernel = functools.partial(pallas_gpu_step.kda_step_pallas_gpu, interpret=True)
        step_module.STEPS[OURS] = kernel
    elif jax.default_backend() != "gpu":
        raise app.UsageError(
            "this needs an NVIDIA GPU and pip install jaxalope[cuda]; jax finds only "
            f"{jax.default_backend()}. --interpret runs it on a CPU with tiny --lengths"
        )


def arrays_of(out):
    """Two heads of what a side returned, for `error`."""
    return out.numpy() if isinstance(out, OnTorch) else two_heads(jax.tree.leaves(out))


def measure(what: dict, sides: dict, want, limit: dict):
    """Times sides that are right, writes their rows and yields them as lines of the table."""
    found = {}
    for form, run in sides.items():
        why = report.refusal(run)
        row = what | ({"error": error(arrays_of(run()), want)} if why is None else {"refused": why})
        row["form"] = form
        if row.get("error", 1.0) < _MOST_ERROR:
            found[form] = row
        else:  # A result too, and no time.
            print("not timed:", row, flush=True)
            report.write_rows(_OUTPUT.value, [row])
    runs = {form: sides[form] for form in found}
    seconds = report.alternate(runs, _TURNS.value, calls=_CALLS.value)
    for form, wall in seconds.items():
        share = {key[:-2] + "_share": t / min(wall) for key, t in limit.items()}
        row = found[form] | {"calls": _CALLS.value, "wall_s": wall.tolist()} | share
        report.write_rows(_OUTPUT.value, [row])
        ratio = report.spread(wall / seconds[OURS], 2) if OURS in seconds else "-"
        line = [what[key] for key in ("pass", "heads", "length", "packed")]
        line += [form, report.spread(wall * 1e3, 3), ratio, f"{found[form]['error']:.1e}"]
        yield (*line, *(f"{100 * x:.1f}%" for x in share.values()))


def chunked(facts: dict, s: KdaShape, length: int, *, packed: bool):
    """Both passes over a row."""
    arrays = problems.kda_inputs(s, _BATCH.value, length, _DTYPE.value)
    ids = None
    if packed:
        row = jnp.arange(length) * _SEGMENTS.value // length + 1
        ids = jnp.broadcast_to(row, (_BATCH.value, length))
    passes = {form: problems.kda_passes(form, _CHUNK.value, ids) for form in (OURS, "xla")}
    *tokens, state = (x.astype(jnp.float32) for x in arrays)
    few = (*(x[:, :, :2] for x in tokens), state[:, :2])
    others = fla_sides(arrays, ids) if _BATCH.value == 1 or not packed else {}
    for name in ("forward", "forward+backward"):
        want = jax.tree.leaves(jax.jit(passes["xla"][name])(*few))
        sides = {f: functools.partial(jax.jit(p[name]), *arrays) for f, p in passes.items()}
        sides |= {form: p[name] for form, p in others.items() if name in p}
        what = facts | {"pass": name, "length": length, "heads": s.num_heads, "packed": packed}
        yield from measure(what, sides, want, limits(name, s, length))


def decode(facts: dict, s: KdaShape):
    """One token of every row."""
    arrays = problems.kda_inputs(s, _BATCH.value, 1, _DTYPE.value)

    def step(implementation, *arrays):
        *tokens, state = arrays
        one = (x[:, 0] for x in tokens)
        o, state = kda_step(*one, state, implementation=implementation)
        return o[:, None], state

    sides = {
        form: functools.partial(jax.jit(functools.partial(step, form)), *arrays)
        for form in (OURS, "xla")
    }
    want = two_heads(step("xla", *(x.astype(jnp.float32) for x in arrays)))
    size = arrays[-1].size
    limit = {"bytes_s": 2 * 4 * size / _H200_BYTES, "flops_s": 8 * size / _H200_FLOPS}
    what = facts | {"pass": "decode", "length": 1, "heads": s.num_heads, "packed": False}
    yield from measure(what, sides, want, limit)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too
    prepare()
    facts = report.facts(
        batch=_BATCH.value,
        dtype=_DTYPE.value,
        chunk_size=_CHUNK.value,
        key_dim=_WIDTH.value,
        value_dim=_WIDTH.value,
        interpret=_INTERPRET.value,
        **report.versions("fla-core", "torch", "triton"),
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    lines = []

    def show(found):
        for line in found:
            print(line, flush=True)
            lines.append(line)

    for heads in map(int, _HEADS.value):
        s = KdaShape(heads, heads, _WIDTH.value, _WIDTH.value)
        for length in map(int, _LENGTHS.value):
            for packed in (False, True):
                show(chunked(facts, s, length, packed=packed))
        show(decode(facts, s))
    headers = ("pass", "H", "T", "packed", "side", "ms", f"of {OURS}", "error", "bytes", "FLOPs")
    print(report.table(headers, lines))


if __name__ == "__main__":
    app.run(main)
