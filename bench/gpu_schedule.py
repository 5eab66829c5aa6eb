"""KDA on an NVIDIA GPU that is not there: what its kernels issue, by XLA's own machine code.

    python bench/gpu_schedule.py --shape=kimi_48b --length=8192 --dtype=bfloat16 \
        --chunk_sizes=16,32,64 --output=bench/results/kda_gpu_schedule.jsonl

compiles the two passes and the decoding step for an H200 (`pip install jaxalope[cuda-compile]`; a
GPU is not needed; run it with JAX_PLATFORMS=cpu), takes the kernels out of the executable
(`cubin.py`) and reads their machine code (`sass.py`; NVIDIA's nvdisasm is needed, which the
`triton` package brings, or --nvdisasm). The columns, for each kernel and summed up:

- registers a thread, bytes of its stack (spilled values, most of all), shared memory of a program,
  and how many programs a multiprocessor holds by these;
- for 64 tokens of a head, cycles of one multiprocessor if nothing but this held it up: "issue", an
  instruction a cycle from each of four schedulers; "tensor" cores; "fma", "alu" and "xu"
  (exponentials, conversions), the pipes of ordinary arithmetic; "l1", bytes to and from shared
  memory and L1, spills and requests to memory among them, at 128 a cycle; "l2", spills where the
  stacks of resident programs are more than L1 holds, at 5.5 TB/s;
- milliseconds of the whole kernel: "units", the longest of these, with 132 multiprocessors at
  1.98 GHz, all evenly busy; "HBM", operands and results once at 4.8 TB/s; "chain", one warp alone
  from its first instruction to its last, by the stalls that the compiler wrote into the code and
  assumed latencies of memory, as often as programs follow each other on a multiprocessor. The
  largest of the three is taken for the kernel, and kernels add up: they run one after another.

What that is not: a time. Nothing was run. Units and HBM bound a time from below: units at their
best rate, no conflict of shared memory's banks, no start of a kernel. The chain is an estimate of
what few resident warps cannot hide: where it is the largest, warps wait more than they work, and it
is too long where L1 or L2 holds what is loaded, too short where warps wait for each other's units.
Compare kernels of one compiler for one GPU. Loops turn as often as the kernels' plan says, on
average where programs differ; a kernel whose loops are not those that are known here is an error in
its row.

    python bench/gpu_schedule.py --dtype=bfloat16 --chunk_sizes=64 --sweep

tries the sizes that `bench/tune.py --op=kda` times on a GPU.
"""

import functools
import importlib.util
import itertools
import math
import mmap
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence

import cubin
import hlo
import jax
import problems
import report
import sass
from absl import app, flags

from jaxalope.layers.ops import tuning
from jaxalope.layers.ops.kda import kda_step, pallas_gpu
from jaxalope.layers.ops.kda.pallas_gpu_kernels import Plan
from jaxalope.layers.ops.kda.shapes import SHAPES
from jaxalope.sharding import absent_devices

_SHAPE = flags.DEFINE_enum("shape", "kimi_48b", sorted(SHAPES), "Heads and widths.")
_BATCH = flags.DEFINE_integer("batch", 1, "Rows.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 8192, "T.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of q, k and v.")
_CHUNKS = flags.DEFINE_list("chunk_sizes", ["64"], "Tokens a chunk.")
_SWEEP = flags.DEFINE_bool("sweep", False, "Try blocks and warps too.")
_PASSES = flags.DEFINE_list("passes", ["forward", "forward+backward", "decode"], "To compile.")
_NVDISASM = flags.DEFINE_string("nvdisasm", None, "Where it is; None looks on PATH and in triton.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")

# An H200: multiprocessors, clock, and of each multiprocessor registers, bytes of shared memory,
# warps and programs.
_PROCESSORS, _CLOCK = 132, 1.98e9
_REGISTERS, _SHARED, _WARPS, _PROGRAMS = 65536, 233472, 64, 32
# Bytes a second of its L2, about what has been measured, and of a multiprocessor's L1.
_L2, _L1 = 5.5e12, 256 << 10
_UNITS = ("issue", "tensor", "fma", "alu", "xu", "l1", "l2")

# How often a kernel's loops turn, and its long branches are taken: keyed by the kernel and the
# loops (L) and branches (S) of its machine code with their depth, in order of their start.
_TURNS = {
    # Parts of the key channels, and of each the sizes of halves.
    ("kda_score", "L0 L1"): lambda p: (p.parts, p.levels),
    ("kda_score", "L0"): lambda p: (p.levels,) if p.parts == 1 else (p.parts,),
    ("kda_solve", "L0 L0"): lambda p: (p.parts, p.value_parts),
    ("kda_decay", "L0"): lambda p: (p.parts,),
    ("kda_advance", "L0"): lambda p: (p.chunks,),
    ("kda_retreat", "L0"): lambda p: (p.chunks,),
    ("kda_pairs", "L0"): lambda p: (p.value_parts / 2,),
    ("kda_transpose", "L0"): lambda p: (p.levels,),
}


class Problem:
    """What decides how often loops turn."""

    def __init__(self, length: int, plan: Plan):
        self.chunks = length / plan.chunk
        self.levels = plan.chunk.bit_length() - 1
        self.parts, self.value_parts = (x / min(plan.part, x) for x in (plan.key, plan.value))


def turns(name: str, code: sass.Code, problem: Problem | None) -> tuple[float, ...]:
    """A number for each region of a kernel.

    Raises:
        ValueError: a kernel of ours has other loops than those that are known here.
    """
    if not name.startswith("kda_"):
        return (1,) * len(code.regions)  # XLA's own, which wait for memory; a turn at least
    if not code.regions:
        return ()
    depth = [sum(r != s and r.inside(s) for s in code.regions) for r in code.regions]
    form = " ".join(f"{'SL'[r.loop]}{d}" for r, d in zip(code.regions, depth, strict=True))
    if (name, form) not in _TURNS:
        raise ValueError(f"{name} has loops {form}, of which nothing is known")
    return _TURNS[name, form](problem)


def resident(kernel: cubin.Kernel, launch: cubin.Launch) -> int:
    """Programs that a multiprocessor holds."""
    warps = launch.threads // sass.WARP
    registers = math.ceil(kernel.registers / 8) * 8 * sass.WARP * warps
    shared = kernel.static_shared + launch.dynamic_shared
    limits = _WARPS // warps, _REGISTERS // registers, _SHARED // max(shared, 1024), _PROGRAMS
    return min(limits)


def operand_bytes(instruction: str, computations: hlo.Computations) -> int:
    """Bytes of its operands and results, each once."""
    for body in computations.values():
        if instruction in body:
            found = body[instruction]
            types = [body[x].type for x in dict.fromkeys(found.operands) if x in body]
            return sum(map(hlo.hbm_bytes, [found.type, *types]))
    return 0


def part(
    name: str,
    kernel: cubin.Kernel,
    launch: cubin.Launch,
    code: sass.Code,
    counts: Sequence[float],
    moved: int,
    tasks: float,
    bandwidth: float,
) -> dict:
    """A kernel's share of a row. `tasks`: 64 tokens of a head, or heads of one token."""
    total, chain = sass.totals(code, counts), sass.alone(code, counts)
    warps = launch.threads // sass.WARP
    cycles = {"issue": total.instructions} | total.pipes
    held, shared = resident(kernel, launch), kernel.static_shared + launch.dynamic_shared
    beyond = held * (kernel.frame * launch.threads + shared) > _L1
    cycles["l2"] = 4 * beyond * total.spill_bytes * _CLOCK * _PROCESSORS / _L2
    cycles = {unit: cycles.get(unit, 0) * warps * launch.programs / 4 for unit in _UNITS}
    seconds = {
        "units_s": max(cycles.values()) / _PROCESSORS / _CLOCK,
        "hbm_s": moved / bandwidth,
        "chain_s": chain * math.ceil(launch.programs / (_PROCESSORS * held)) / _CLOCK,
    }
    return {
        "name": name,
        "registers": kernel.registers,
        "stack_bytes": kernel.frame,
        "shared_bytes": shared,
        "warps": warps,
        "programs": launch.programs,
        "resident": held,
        "code": len(code.instructions),
        "turns": list(counts),
        "a_warp": {key: round(value, 1) for key, value in total.classes.items()},
        "chain_cycles": round(chain),
        "flops": total.flops * warps * launch.programs,
        "spill_bytes": total.spill_bytes * warps * launch.programs,
        "requested_bytes": total.global_bytes * warps * launch.programs,
        "hbm_bytes": moved,
        "cycles": {unit: round(value / tasks, 1) for unit, value in cycles.items()},
        **seconds,
        "estimate_s": max(seconds.values()),
    }


def nvdisasm() -> str:
    """Where the disassembler is."""
    triton = importlib.util.find_spec("triton")
    inside = "backends/nvidia/bin/nvdisasm"
    found = (
        _NVDISASM.value
        or shutil.which("nvdisasm")
        or (triton and str(pathlib.Path(triton.origin).parent / inside))
    )
    if not found or not pathlib.Path(found).exists():
        raise app.UsageError("nvdisasm is needed: pip install triton, or --nvdisasm=PATH")
    return found


def ptxas() -> str:
    """The version of the one in the CUDA plugin, by its own text."""
    for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        spec = importlib.util.find_spec(name) if importlib.util.find_spec("jax_plugins") else None
        for path in pathlib.Path(spec.origin).parent.glob("*.so") if spec else ():
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                found = re.search(rb"Cuda compilation tools, release (\d+\.\d+)", m)
                if found:
                    return found[1].decode()
    raise app.UsageError("JAX's CUDA plugin is needed: pip install jaxalope[cuda-compile]")


def candidates(name: str):
    """Chunk sizes and the choices of `tuning` to try, of a pass."""
    if name == "decode":
        return [(1, {})]
    sizes = [{}, *(problems.KDA_GPU_SIZES if _SWEEP.value else ())]
    return itertools.product(map(int, _CHUNKS.value), sizes)


def program(name: str, chunk: int):
    """The pass, and what it is given."""
    s = SHAPES[_SHAPE.value]
    length = 1 if name == "decode" else _LENGTH.value
    arrays = jax.eval_shape(
        functools.partial(problems.kda_inputs, s, _BATCH.value, length, _DTYPE.value)
    )
    if name != "decode":
        return problems.kda_passes("pallas_gpu", chunk)[name], arrays
    one = [jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype) for x in arrays[:-1]]
    return functools.partial(kda_step, implementation="pallas_gpu"), (*one, arrays[-1])


def measure(device, name: str, chunk: int, sizes: dict, folder: pathlib.Path, tool: str) -> dict:
    """What a row has to say of one program. Leaves the folder empty."""
    s, bandwidth = SHAPES[_SHAPE.value], report.bandwidth(device)
    run, arrays = program(name, chunk)
    try:
        with tuning.trying("kda", **sizes):
            compiled = report.compile_for(device, run, *arrays)
        launches = cubin.launches(folder)
    finally:
        for path in folder.iterdir():
            path.unlink()
    kernels = cubin.kernels(compiled.runtime_executable().serialize())
    computations, entry = hlo.parse(compiled.as_text())
    tasks = _BATCH.value * s.num_value_heads
    tasks *= 1 if name == "decode" else _LENGTH.value / 64
    # A kernel for one token has no loops.
    problem = None
    if name != "decode":
        plan = pallas_gpu.plan(arrays[0], arrays[2], 1.0, chunk, interpret=False)
        problem = Problem(_LENGTH.value, plan)
    parts = []
    for launch in launches:
        kernel, path = kernels[launch.kernel], folder / "kernel"
        path.write_bytes(kernel.elf)
        code = sass.read(sass.disassemble(tool, str(path)))
        path.unlink()
        moved = operand_bytes(launch.instruction, computations)
        base = re.sub(r"__\d+$", "", launch.kernel)  # XLA numbers the second of a name
        counts = turns(base, code, problem)
        parts.append(part(base, kernel, launch, code, counts, moved, tasks, bandwidth))
    ends = (i.type for i in computations[entry].values() if i.root or i.opcode == "parameter")
    return summary(parts) | {
        "least_hbm_bytes": sum(map(hlo.hbm_bytes, ends)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def summary(parts: list[dict]) -> dict:
    """Kernels that run one after another."""
    return {
        "cycles": {u: round(sum(x["cycles"][u] for x in parts), 1) for u in _UNITS},
        "flops": sum(x["flops"] for x in parts),
        "hbm_bytes": sum(x["hbm_bytes"] for x in parts),
        "estimate_s": sum(x["estimate_s"] for x in parts),
        "parts": parts,
    }


def show(rows: list[dict]):
    """Prints a table of programs, and one of their kernels."""
    programs, kernels = [], []
    for row in rows:
        if "error" in row:
            continue
        sizes = " ".join(f"{key}={value}" for key, value in row["sizes"].items())
        what = row["pass"].replace("forward+backward", "both"), row["chunk_size"], sizes
        cycles = [f"{row['cycles'][unit]:,.0f}" for unit in _UNITS]
        times = [
            f"{row['hbm_bytes'] / row['bandwidth'] * 1e3:.4f}",
            f"{row['estimate_s'] * 1e3:.4f}",
        ]
        programs.append((*what, *cycles, *times))
        for x in row["parts"]:
            use = (f"{x[key]}" for key in ("registers", "stack_bytes"))
            grid = f"{x['programs']} x {x['warps']}", x["resident"]
            cycles = [f"{x['cycles'][unit]:,.0f}" for unit in _UNITS]
            times = (f"{x[k] * 1e3:.4f}" for k in ("units_s", "hbm_s", "chain_s"))
            shared = f"{x['shared_bytes'] / 1024:.0f}"
            kernels.append((*what, x["name"], *use, shared, *grid, *cycles, *times))
    units = [f"{unit}, cycles" for unit in _UNITS]
    print(
        "Cycles of one of 132 multiprocessors for 64 tokens of a head (of a step, for a head);\n"
        "milliseconds of HBM traffic, and the estimate: see the head of this file.\n"
    )
    print(report.table(("pass", "C", "sizes", *units, "HBM, ms", "estimate, ms"), programs))
    print()
    use = ("kernel", "registers", "stack", "shared, KiB", "programs x warps", "resident")
    times = ("units, ms", "HBM, ms", "chain, ms")
    print(report.table(("pass", "C", "sizes", *use, *_UNITS, *times), kernels))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    # A program that comes from a cache is not compiled, and then nothing is dumped.
    jax.config.update("jax_enable_compilation_cache", False)
    tool = nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        # XLA reads it at the first compilation.
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} {cubin.arguments(folder)}".strip()
        device = absent_devices("h200")[0]
        facts = report.facts(
            form="pallas_gpu",
            target=device.device_kind,
            ptxas=ptxas(),
            shape=_SHAPE.value,
            batch=_BATCH.value,
            length=_LENGTH.value,
            dtype=_DTYPE.value,
            bandwidth=report.bandwidth(device),
        )
        print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
        rows = []
        for name in _PASSES.value:
            for chunk, sizes in candidates(name):
                what = {"pass": name, "chunk_size": chunk, "sizes": sizes}
                try:
                    found = measure(device, name, chunk, sizes, pathlib.Path(folder), tool)
                except Exception as error:  # A refusal has many classes: it is a result.
                    found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                    print(f"left out: {what} ({found['error']})", flush=True)
                rows.append(facts | what | found)
    show(rows)
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
