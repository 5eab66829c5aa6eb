"""KDA, forward and forward+backward: the chunked form against the token scan, time and memory.

    python bench/kda.py --output=bench/results/kda.jsonl

The two run in turns on the same inputs; a speed-up is taken within a turn and reported as the
median of the turns with the lowest and the highest. Memory is what the compiled program allocates
for temporaries (`memory_analysis`), inputs and outputs not counted. The last columns divide time
and memory by T: linear scaling is a constant column.

    python bench/kda.py --topology=v5e:2x2 --implementation=pallas_tpu --shape=kimi_48b \
        --dtype=bfloat16 --lengths=8192 --output=bench/results/kda_tpu_compile.jsonl

compiles the two passes for a chip of that kind instead: libtpu is needed, a TPU is not. Nothing
runs; the columns are what the compiler says of its programs: VMEM of each kernel,
FLOPs and bytes (of a Pallas kernel, those that the kernel declares) and memory of temporaries.

    python bench/kda.py --gpu --dtype=bfloat16 --lengths=2048,8192,32768,65536 \
        --output=bench/results/kda_gpu.jsonl

is the comparison on a CUDA machine: `pallas_gpu`, `xla` and, where `fla` and torch with CUDA can be
imported, Triton's `chunk_kda`, in turns, forward and forward+backward, fixed and packed rows, at
every length of --lengths and every number of --heads; then one decoding step. The last columns are
shares of what an H200 can do: the time that the bytes of inputs and outputs, once, or the FLOPs
would take, over the time taken. `--interpret` with tiny lengths runs the same on a CPU.
"""

import functools
import os

import jax
import jax.numpy as jnp
import problems
import report
from absl import app, flags

import jaxalope.layers.ops.kda as kda_module
from jaxalope.layers.ops.kda import kda_step, pallas_gpu, pallas_gpu_step
from jaxalope.layers.ops.kda import step as step_module
from jaxalope.layers.ops.kda.shapes import SHAPES, KdaShape
from jaxalope.sharding import absent_devices

_SHAPE = flags.DEFINE_enum("shape", "kimi_8m", sorted(SHAPES), "Heads and widths.")
_BATCH = flags.DEFINE_integer("batch", 1, "Rows.", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", ["256", "512", "1024", "2048", "4096", "8192"], "T.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of q, k and v.")
_CHUNK = flags.DEFINE_integer("chunk_size", 64, "Tokens a chunk of the chunked form.")
_FORM = flags.DEFINE_string("implementation", "xla", "The chunked form to measure.")
_TURNS = flags.DEFINE_integer("turns", 7, "Measurements of each form.", lower_bound=1)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Compile for a chip of this kind: v5e:2x2.")
_GPU = flags.DEFINE_bool("gpu", False, "Compare on a CUDA machine.")
_INTERPRET = flags.DEFINE_bool("interpret", False, "Interpret the GPU kernels, for tests of --gpu.")
_HEADS = flags.DEFINE_list("heads", ["16", "32", "64", "96"], "Heads, for --gpu.")
_WIDTH = flags.DEFINE_integer("width", 128, "K and V, for --gpu.", lower_bound=1)
_SEGMENTS = flags.DEFINE_integer("segments", 8, "Documents of a packed row, for --gpu.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


def inputs(length: int, s: KdaShape | None = None):
    """Of the shape of the flags, or of another."""
    return problems.kda_inputs(s or SHAPES[_SHAPE.value], _BATCH.value, length, _DTYPE.value)


def programs(implementation: str, segment_ids=None):
    """The two passes as functions of the inputs."""
    return problems.kda_passes(implementation, _CHUNK.value, segment_ids)


def compile_ahead(facts):
    """Compiles for `--topology`, and prints and writes what the compiler says."""
    device = absent_devices(_TOPOLOGY.value)[0]
    rows, lines = [], []
    for length in map(int, _LENGTHS.value):
        arrays = jax.eval_shape(functools.partial(inputs, length))
        for name, program in programs(_FORM.value).items():
            compiled = report.compile_for(device, program, *arrays)
            cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            row = {
                "pass": name,
                "form": _FORM.value,
                "length": length,
                "target": device.device_kind,
                "vmem_bytes": report.vmem_bytes(compiled),
                "flops": cost.get("flops"),
                "bytes_accessed": cost.get("bytes accessed"),
                "temporary_bytes": memory.temp_size_in_bytes,
            }
            rows.append(facts | row)
            vmem = " + ".join(f"{x / 2**20:.1f}" for x in row["vmem_bytes"]) or "-"
            giga = (report.billions(row[key], 2) for key in ("flops", "bytes_accessed"))
            temporaries = f"{row['temporary_bytes'] / 2**20:.0f}"
            lines.append((row["target"], name, _FORM.value, length, vmem, *giga, temporaries))
    headers = ("chip", "pass", "form", "T", "VMEM, MiB", "GFLOP", "GB", "temporaries, MiB")
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


# On a CUDA machine -----------------------------------------------------------------------------

# What an H200 can do, as measured: bytes a second from memory, bfloat16 FLOPs a second.
_H200_BYTES = 4.3e12
_H200_FLOPS = 790e12


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


def fla_programs(arrays, segment_ids):
    """Triton's `chunk_kda` on copies of the inputs; None where it cannot be imported or run."""
    try:
        import numpy as np
        import torch
        from fla.ops.kda import chunk_kda
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def copy(x):
        x = torch.from_numpy(np.array(x, np.float32)).cuda()
        return x.to(torch.bfloat16) if _DTYPE.value == "bfloat16" else x

    q, k, v = (copy(x).requires_grad_() for x in arrays[:3])
    g, beta, state = (
        torch.from_numpy(np.array(x, np.float32)).cuda().requires_grad_() for x in arrays[3:]
    )
    extra = {"initial_state": state}
    if segment_ids is not None:
        starts = np.flatnonzero(np.diff(np.asarray(segment_ids[0]), prepend=0, append=0))
        extra = {"cu_seqlens": torch.tensor(starts, dtype=torch.int32, device="cuda")}

    def forward():
        o, _ = chunk_kda(q, k, v, g, beta, output_final_state=True, **extra)
        torch.cuda.synchronize()
        return o

    def no_grad():
        with torch.no_grad():
            return forward() is None

    def both():
        out = forward()
        out.backward(out.detach())
        for x in (q, k, v, g, beta, state):
            x.grad = None
        torch.cuda.synchronize()
        return True

    return {"forward": no_grad, "forward+backward": both}


def compare_on_gpu(facts):
    """Measures the sides in turns, and prints and writes times and shares of an H200's limits."""
    if _INTERPRET.value:
        kernel = functools.partial(pallas_gpu.kda_pallas_gpu, interpret=True)
        kda_module._IMPLEMENTATIONS["pallas_gpu"] = kernel
        kernel = functools.partial(pallas_gpu_step.kda_step_pallas_gpu, interpret=True)
        step_module.STEPS["pallas_gpu"] = kernel
    elif jax.default_backend() != "gpu":
        raise app.UsageError(
            "--gpu needs an NVIDIA GPU and jax[cuda12]; jax finds only "
            f"{jax.default_backend()}. --interpret runs it on a CPU with tiny --lengths"
        )
    lines = []

    def fits(form, run, row):
        try:
            jax.block_until_ready(run())
        except RuntimeError as error:  # out of memory, most of all: a result, not an accident
            print(form, row, error, flush=True)
            report.write_rows(_OUTPUT.value, [facts | row | {"form": form, "error": str(error)}])
            return False
        return True

    def measure(name, s, length, packed, sides, limit):
        what = {
            "shape": "-",
            "pass": name,
            "length": length,
            "heads": s.num_heads,
            "packed": packed,
        }
        sides = {form: run for form, run in sides.items() if fits(form, run, what)}
        seconds = report.alternate(sides, _TURNS.value) if "pallas_gpu" in sides else {}
        ours = seconds.get("pallas_gpu")
        for form, wall in seconds.items():
            share = {key[:-2] + "_share": t / min(wall) for key, t in limit.items()}
            row = what | {"form": form, "key_dim": s.key_dim, "value_dim": s.value_dim}
            row |= {"interpret": _INTERPRET.value, "wall_s": wall.tolist()} | share
            report.write_rows(_OUTPUT.value, [facts | row])
            shares = [f"{100 * x:.1f}%" for x in share.values()]
            times = report.spread(wall * 1e3, 3), report.spread(wall / ours, 2)
            lines.append((name, s.num_heads, length, packed, form, *times, *shares))
            print(lines[-1], flush=True)

    for heads in map(int, _HEADS.value):
        s = KdaShape(heads, heads, _WIDTH.value, _WIDTH.value)
        for length in map(int, _LENGTHS.value):
            arrays = inputs(length, s)
            for packed in (False, True):
                ids = None
                if packed:
                    row = jnp.arange(length) * _SEGMENTS.value // length + 1
                    ids = jnp.broadcast_to(row, (_BATCH.value, length))
                others = fla_programs(arrays, ids) if _BATCH.value == 1 or not packed else None
                for name in ("forward", "forward+backward"):
                    sides = {
                        form: functools.partial(jax.jit(programs(form, ids)[name]), *arrays)
                        for form in ("pallas_gpu", "xla")
                    }
                    if others:
                        sides["fla"] = others[name]
                    measure(name, s, length, packed, sides, limits(name, s, length))
        one = [x[:, 0] for x in inputs(1, s)[:-1]]
        state = inputs(1, s)[-1]
        sides = {
            form: functools.partial(
                jax.jit(functools.partial(kda_step, implementation=form)), *one, state
            )
            for form in ("pallas_gpu", "xla")
        }
        limit = {"bytes_s": 2 * state.nbytes / _H200_BYTES}
        limit["flops_s"] = 8 * state.size / _H200_FLOPS
        measure("decode", s, 1, False, sides, limit)
    headers = ("pass", "H", "T", "packed", "form", "ms", "of pallas_gpu", "bytes", "FLOPs")
    print(report.table(headers, lines))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _GPU.value:  # torch wants memory too
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts = report.facts(
        shape=_SHAPE.value, batch=_BATCH.value, dtype=_DTYPE.value, chunk_size=_CHUNK.value
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    if _TOPOLOGY.value:
        compile_ahead(facts)
        return
    if _GPU.value:
        compare_on_gpu(facts)
        return
    rows, lines = [], []
    forms = (_FORM.value, "reference")
    for name in programs(forms[0]):
        for length in map(int, _LENGTHS.value):
            arrays = inputs(length)
            compiled = {
                form: jax.jit(programs(form)[name]).lower(*arrays).compile() for form in forms
            }
            sides = {
                form: lambda run=run, arrays=arrays: run(*arrays) for form, run in compiled.items()
            }
            seconds = report.alternate(sides, _TURNS.value)
            memory = {f: c.memory_analysis().temp_size_in_bytes for f, c in compiled.items()}
            for form in forms:
                row = {
                    "pass": name,
                    "form": form,
                    "length": length,
                    "wall_s": seconds[form].tolist(),
                }
                rows.append(facts | row | {"temporary_bytes": memory[form]})
            ours, scan = (seconds[form] * 1e3 for form in forms)
            tokens = length * _BATCH.value
            lines.append(
                (
                    name,
                    length,
                    report.spread(ours, 2),
                    report.spread(scan, 1),
                    report.spread(scan / ours),
                    *(f"{memory[form] / 2**20:.1f}" for form in forms),
                    f"{ours.min() * 1e3 / tokens:.2f}",
                    f"{memory[forms[0]] / 2**10 / tokens:.2f}",
                )
            )
            print(lines[-1], flush=True)
    ours = forms[0]
    headers = (
        "pass",
        "T",
        f"{ours}, ms",
        "token scan, ms",
        "speed-up",
        f"{ours}, MiB",
        "scan, MiB",
    )
    print(report.table((*headers, f"{ours}, us a token", f"{ours}, KiB a token"), lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
