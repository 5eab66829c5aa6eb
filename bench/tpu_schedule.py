"""An operator on a TPU that is not there: cycles of its programs, by the compiler's own schedule.

    python bench/tpu_schedule.py --op=kda --topology=tpu7x:2x2x1 --shape=kimi_48b --length=8192 \
        --dtype=bfloat16 --implementations=pallas_tpu,xla,tokamax --chunk_sizes=32,64,128 \
        --heads=4,8,16 --tasks=4,8 --output=bench/results/kda_tpu_schedule.jsonl
    python bench/tpu_schedule.py --op=latent_decode --topology=tpu7x:2x2x1 --batch=8 \
        --length=32768 --dtype=bfloat16 --implementations=pallas_tpu,xla \
        --output=bench/results/latent_decode_tpu_schedule.jsonl
    python bench/tpu_schedule.py --op=grouped_matmul --topology=tpu7x:2x2x1 --dtype=bfloat16 \
        --implementations=xla,ragged_dot,mosaic_tpu,mosaic_tpu_v2 \
        --output=bench/results/grouped_matmul_tpu_schedule.jsonl

compiles the passes for a chip of that kind (libtpu is needed, a TPU is not), and counts the
bundles of VLIW code of every kernel and of every copy and fusion around them, each as often as
the loops around it turn: a TensorCore runs its bundles in order, one a cycle. See `schedule.py`.

What such a figure is: the compiler's plan. It shows which kernel has more to do, on which unit, and
what a change of code or of block sizes changes. Waits that the scheduler plans are in it, so a
chain of dependent products costs what it takes them to leave the MXU. A large product does not beat
the MXU's peak: by its plan, 8192 x 8192 x 8192 in bfloat16 takes, of the cycles that the data
sheet's FLOP/s need at the clock assumed below, 1.10 on v5e, 1.08 on v5p, 1.27 on v6e and 1.17 on
TPU7x (libtpu 0.0.42 and 0.0.50).

What it is not: a time. Nothing was run. Waiting for HBM is not in it, nor are conflicts of VMEM's
banks or whatever else the scheduler cannot know. So a kernel whose bytes take longer than its
cycles is slower than it looks. tokamax's times for a TPU7x, as published, are 1.6 (forward) and 1.7
(both passes) times the plan of its KDA kernels. What a SparseCore does meanwhile (on TPU7x, some
changes of layout) is named and not counted. Code under a condition counts as always run. Compare
two kernels under one compiler and for one chip only.

A loop may turn as often as values say: over the blocks of a cache, or the groups of a product and
their tiles. The problem says of what it knows, how often in the workload that it stands for, and
which of the alternatives with products a turn takes (`workload.py`); the row repeats that as
`assumed_turns`. Caches are full; rows of a grouped product are drawn among the groups at random,
and tiles are those that the kernels say they have. Elsewhere, as in XLA's copies of windows that do
not divide their array, cycles are null and `at_least_cycles` counts such a loop once.

The time that the bytes take is that of a program's inputs and outputs, once, at the data sheet's
bandwidth; of a kernel or fusion, its operands and results in HBM, once (`stated_hbm_s`: what a
kernel says it moves), and the sum of these is the time of the parts' bytes (null where parts are in
a loop: they may read slices). On v5p the two cores of a chip share a kernel's grid, if it lets
them; cycles are of the busier one.

    python bench/tpu_schedule.py --topology=v5e:2x2 --shape=kimi_48b --dtype=bfloat16 \
        --implementations=pallas_tpu --chunk_sizes=32,64,128 --heads=4,8,16 --tasks=4,8 --tune

keeps the sizes of least cycles of KDA, forward and backward, for `implementation="pallas_tpu"` on
chips of that kind in `layers/ops/tuning.json`, unless sizes are there that were timed; `--dry_run`
prints them only. The table says that they are by schedule, and they make no implementation a
default.

tokamax needs Python 3.12, and of KDA the bounded gate. `mosaic_tpu` and `mosaic_tpu_v2` are its
grouped products by name; `ragged_dot` is XLA's, with results in the dtype of the operands.
"""

import itertools
import os
import pathlib
import re
import tempfile

import jax
import plan
import report
import schedule
from absl import app, flags
from problems import PROBLEMS

from jaxalope.layers.ops import tuning
from jaxalope.sharding import absent_devices

_TOPOLOGY = flags.DEFINE_string("topology", "tpu7x:2x2x1", "The kind of chip: v5e:2x2, v6e:2x2.")
_OP = flags.DEFINE_enum("op", "kda", sorted(PROBLEMS), "The operator.")
_SHAPE = flags.DEFINE_string("shape", "kimi_48b", "A named shape; of the loss, VOCABxWIDTH.")
_BATCH = flags.DEFINE_integer("batch", 1, "Rows.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 8192, "Tokens, or slots of a cache.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")
_FORMS = flags.DEFINE_list("implementations", ["pallas_tpu"], "To compile.")
_CHUNKS = flags.DEFINE_list("chunk_sizes", ["64"], "Tokens a chunk, of KDA; tokamax has its own.")
_HEADS = flags.DEFINE_list("heads", [], "Heads a grid step, of pallas_tpu; none: its default.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks a grid step, of pallas_tpu; none: its default.")
_CLOCK = flags.DEFINE_float("clock_ghz", None, "Of the TensorCore; None is what is assumed here.")
_TUNE = flags.DEFINE_bool("tune", False, "Keep the sizes of least cycles in the table.")
_DRY = flags.DEFINE_bool("dry_run", False, "With --tune: print only.")
_TABLE = flags.DEFINE_string("table", str(tuning.PATH), "The table to rewrite.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")

# Hz of a TensorCore, by `device_kind`, and assumed: the makers' data sheets give bfloat16 FLOP/s
# and MXUs instead. v5e: 197e12 / (4 MXUs x 128 x 128 x 2); v5p: 459e12 / (2 cores x the same); v6e:
# 918e12 / (2 MXUs x 256 x 256 x 2 x 2); TPU7x: 2307e12 / (2 cores x the same). The last factor 2 of
# v6e and TPU7x is inferred: schedules of large products need more than one 256-wide row a cycle.
CLOCK = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9, "TPU7x": 2.2e9}
# bfloat16 FLOP/s of one JAX device, of the same sheets: of a v5p both cores, of a TPU7x one.
PEAK = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU7x": 2307e12 / 2}

# Seconds that tokamax's authors publish for its kernels, with the bounded gate, by what runs.
PUBLISHED = {
    ("kda", "TPU7x", "tokamax", "kimi_48b", 1, 8192, "bfloat16", "forward"): 1.78e-3,
    ("kda", "TPU7x", "tokamax", "kimi_48b", 1, 8192, "bfloat16", "forward+backward"): 4.59e-3,
}
SIZES = ("chunk_size", "heads", "tasks")
UNITS = ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")
_BYTES, _KNOWN = ("hbm_s", "parts_hbm_s"), ("flops_s", "published_s")
_BOTH = "forward+backward"
_NAME = 24  # characters of a kernel's name, in the table


def candidates():
    """Implementation and sizes: chunk, heads and tasks a grid step (None where it chooses)."""
    for form in _FORMS.value:
        if _OP.value != "kda":
            yield form, dict.fromkeys(SIZES)
            continue
        chunks = [64] if form == "tokamax" else [int(c) for c in _CHUNKS.value]
        own = form == "pallas_tpu"
        more = ([int(x) for x in flag.value if own] or [None] for flag in (_HEADS, _TASKS))
        for sizes in itertools.product(chunks, *more):
            yield form, dict(zip(SIZES, sizes, strict=True))


def compiled(device, program, arrays, sizes, folder, assume) -> plan.Program:
    """The schedule of a program for that device. Leaves the folder empty."""
    chosen = {name: sizes[name] for name in SIZES[1:] if sizes[name] is not None}
    try:
        with tuning.trying(_OP.value, **chosen):
            text = report.compile_for(device, program, *arrays).as_text()
        return plan.program(text, folder, **({"assume": assume} if assume else {}))
    finally:
        for path in folder.iterdir():
            path.unlink()


def packages() -> list[str]:
    """What besides JAX makes the programs."""
    others = any(form == "tokamax" or form.startswith("mosaic") for form in _FORMS.value)
    return ["libtpu", *["tokamax"] * others]


def is_kernel(use: plan.Use) -> bool:
    return use.instruction.opcode == "custom-call" and "tpu_custom_call" in use.instruction.rest


def part(use: plan.Use, clock: float, bandwidth: float) -> dict:
    """A kernel's or a fusion's share of a row."""
    s = use.schedule
    row = {"name": use.instruction.name, "pallas": is_kernel(use), "runs": use.runs}
    row |= {"cycles": use.cycles, "hbm_s": use.hbm_bytes / bandwidth}
    stated = re.search(r'"bytes_accessed":"(\d+)"', use.instruction.rest)
    if is_kernel(use) and stated:
        row["stated_hbm_s"] = int(stated[1]) / bandwidth
    if s is not None:
        row |= {"body_cycles": s.body, "grid_steps": s.trips, "share": s.share}
        row |= {"spills": s.spills, "fills": s.fills, "at_least_cycles": s.at_least}
    return row | {"seconds": use.cycles and use.cycles / clock}


def measure(facts: dict, device, folder: pathlib.Path) -> list[dict]:
    """Compiles and prints every candidate; the rows."""
    rows = []
    problem = PROBLEMS[_OP.value](_SHAPE.value, _BATCH.value, _LENGTH.value, _DTYPE.value)
    clock = _CLOCK.value * 1e9 if _CLOCK.value else CLOCK[device.device_kind]
    bandwidth = report.bandwidth(device)
    arrays = jax.eval_shape(problem.pass_inputs)
    chunks_of_64 = _BATCH.value * _LENGTH.value / 64 * problem.heads or None
    for form, sizes in candidates():
        for name, run in problem.passes(form, sizes["chunk_size"]).items():
            what = {"pass": name, "form": form, **sizes}
            try:
                found = compiled(device, run, arrays, sizes, folder, problem.assume)
            except Exception as error:  # A compiler's refusal has many classes: it is a result.
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"left out: {what} ({why})", flush=True)
                rows.append(facts | what | {"error": str(error)[:500]})
                continue
            cycles, flops = found.cycles, problem.flops.get(name)
            where = (_OP.value, device.device_kind, form, _SHAPE.value, _BATCH.value, _LENGTH.value)
            row = what | {
                "cycles": cycles,
                "at_least_cycles": found.at_least,
                "unknown": found.unknown,
                "kernel_cycles": sum(u.cycles or 0 for u in found.uses if is_kernel(u)),
                "cycles_per_64_tokens": cycles and chunks_of_64 and cycles / chunks_of_64,
                "seconds": cycles and cycles / clock,
                "hbm_s": found.hbm_bytes / bandwidth,
                # In a loop, a fusion may read a slice of its operand only.
                "parts_hbm_s": sum(u.hbm_bytes for u in found.uses) / bandwidth
                if all(u.runs == 1 for u in found.uses)
                else None,
                "published_s": PUBLISHED.get((*where, _DTYPE.value, name)),
                "assumed_clock_hz": clock,
                "bandwidth": bandwidth,
                "on_sparse_core": list(found.elsewhere),
                "parts": [part(use, clock, bandwidth) for use in found.uses],
            }
            if found.assumed:
                row["assumed_turns"] = list(found.assumed)
            if flops:
                row["flops_s"] = flops / PEAK[device.device_kind]
            rows.append(facts | row)
            print(f"compiled {what}", flush=True)
    return rows


def thousands(row: dict) -> str:
    """Cycles, or what they are at least, in thousands."""
    if row["cycles"] is None:
        return f">= {row['at_least_cycles'] / 1e3:,.0f}"
    return f"{row['cycles'] / 1e3:,.0f}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def brief(row: dict) -> dict:
    """A row to keep: of the parts that are no kernels, all but the largest without details."""
    details = ("body_cycles", "grid_steps", "share", "spills", "fills", "seconds")
    most = max((x["cycles"] or 0 for x in row.get("parts", [])), default=0)
    parts = [
        x
        if x["pallas"] or x["cycles"] == most
        else {key: value for key, value in x.items() if key not in details}
        for x in row.get("parts", [])
    ]
    return row | {"parts": parts} if parts else row


def show(rows: list[dict]):
    """Prints a table of the programs, and one of their kernels and of the largest part of each."""
    programs, kernels = [], []
    for row in rows:
        if "error" in row:
            continue
        sizes = "/".join(str(row[name] or "-") for name in SIZES)
        what = row["form"], row["pass"].replace(_BOTH, "both"), sizes
        per = row["cycles_per_64_tokens"]
        programs.append(
            (
                *what,
                thousands(row),
                f"{row['kernel_cycles'] / 1e3:,.0f}",
                "-" if per is None else f"{per:,.0f}",
                *(milliseconds(row.get(key)) for key in ("seconds", *_BYTES, *_KNOWN)),
                len(row["on_sparse_core"]),
            )
        )
        largest = max(row["parts"], key=lambda part: part["cycles"] or 0, default=None)
        for x in row["parts"]:
            if "share" not in x or not (x["pallas"] or x is largest):
                continue
            shares = " ".join(f"{100 * x['share'].get(unit, 0):.0f}" for unit in UNITS)
            cells = x["name"][:_NAME], x["runs"], x["body_cycles"], x["grid_steps"], thousands(x)
            times = milliseconds(x["seconds"]), milliseconds(x["hbm_s"])
            kernels.append((*what, *cells, *times, shares, f"{x['spills']} {x['fills']}"))
    print(
        "Sizes: chunk/heads/tasks. kc: thousands of cycles, then those in kernels; per 64: cycles\n"
        "for 64 tokens of a head; ms: of all cycles, of the program's bytes, of its parts' bytes,\n"
        "of its products at the data sheet's FLOP/s, as published; SC: parts on a SparseCore. Of\n"
        f"the kernels: cycles of a grid step, and % of the slots of {' '.join(UNITS)};\n"
        "registers spilled and filled a step.\n"
    )
    what = ("form", "pass", "sizes")
    times = ("ms", "bytes", "parts", "FLOPs", "published")
    print(report.table((*what, "kc", "kernels", "per 64", *times, "SC"), programs))
    print()
    headers = (*what, "kernel", "runs", "a step", "steps", "kc", "ms", "bytes")
    print(report.table((*headers, "% of units", "spills fills"), kernels))
    for said in dict.fromkeys(said for row in rows for said in row.get("assumed_turns", [])):
        print(f"\nassumed: {said}")


def tune(rows: list[dict], kind: str, facts: dict):
    """Keeps the sizes of least cycles in the table, if there are none that were timed."""
    tried = [r for r in rows if r["pass"] == _BOTH and r["form"] == "pallas_tpu"]
    tried = [r for r in tried if "error" not in r]
    # Of what is around the kernels, sizes change nothing.
    tried = [r for r in tried if None not in [x["cycles"] for x in r["parts"] if x["pallas"]]]
    if not tried:
        raise app.UsageError("--tune: no candidate of pallas_tpu was compiled")
    best = min(tried, key=lambda r: r["kernel_cycles"])
    path = pathlib.Path(_TABLE.value)
    entry = {"pallas_chunk_size": best["chunk_size"], "by": "schedule"}
    entry |= {name: best[name] for name in SIZES[1:] if best[name] is not None}
    entry |= {key: facts[key] for key in ("jax", "date")}
    problem = PROBLEMS["kda"](_SHAPE.value, _BATCH.value, _LENGTH.value, _DTYPE.value)
    shapes = problem.shape_class
    there = tuning.read(path).get("kda", {}).get(kind, {}).get(shapes, {})
    if there and there.get("by") != "schedule":
        print(f"kda / {kind} / {shapes} stays {there}, which was timed; by schedule: {entry}")
        return
    print(f"kda / {kind} / {shapes} {'would be' if _DRY.value else 'is'} {entry}")
    if not _DRY.value:
        tuning.write("kda", kind, {shapes: entry}, path)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if _TUNE.value and _OP.value != "kda":
        raise app.UsageError(f"--tune: the kernels of {_OP.value} have no sizes to choose")
    # A program that comes from a cache is not compiled, and then nothing is written.
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads it when it is loaded, which is below.
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {schedule.arguments(folder)}".strip()
        device = absent_devices(_TOPOLOGY.value)[0]
        facts = report.facts(
            **report.versions(*packages()),
            op=_OP.value,
            target=device.device_kind,
            shape=_SHAPE.value,
            batch=_BATCH.value,
            length=_LENGTH.value,
            dtype=_DTYPE.value,
        )
        print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
        rows = measure(facts, device, pathlib.Path(folder))
    show(rows)
    report.write_rows(_OUTPUT.value, map(brief, rows))
    if _TUNE.value:
        tune(rows, device.device_kind, facts)


if __name__ == "__main__":
    app.run(main)
