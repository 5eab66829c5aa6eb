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

On a CUDA machine: `bench/kda_gpu.py`.
"""

import functools

import jax
import problems
import report
from absl import app, flags

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


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    facts = report.facts(
        shape=_SHAPE.value, batch=_BATCH.value, dtype=_DTYPE.value, chunk_size=_CHUNK.value
    )
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    if _TOPOLOGY.value:
        compile_ahead(facts)
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
