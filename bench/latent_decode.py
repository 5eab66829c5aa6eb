"""Latent decoding: time of one read of the cache by every implementation, batch by context.

    python bench/latent_decode.py --shape=kimi_48b --dtype=bfloat16 --batches=1,8,64 \
        --contexts=4096,32768,262144,1048576 --implementations=xla,pallas_gpu \
        --output=bench/results/latent_decode.jsonl

The implementations run in turns on the same full caches. A call is a loop of `--steps` reads, each
with the queries that the one before gave, so that the host's dispatch is not what is measured. GB/s
counts each cached number once, whatever an implementation reads; its share is of the memory
bandwidth in the maker's data sheet. Caches of more than `--memory_gib` are left out.

    python bench/latent_decode.py --topology=v5e:2x2 --shape=kimi_48b --dtype=bfloat16 \
        --implementations=pallas_tpu,xla --output=bench/results/latent_decode_tpu_compile.jsonl

compiles for a chip of that kind, or a GPU (h200), instead: its compiler is needed, the device is
not. Nothing runs; the columns are what the compiler says of its programs (for GPUs, memory alone),
and the time that the cache's bytes take at the data sheet's bandwidth, below which no
implementation can go.
"""

import functools

import jax
import jax.numpy as jnp
import report
from absl import app, flags

from jaxalope.layers.ops.latent_decode import IMPLEMENTATIONS, latent_decode
from jaxalope.layers.ops.latent_decode.shapes import SHAPES
from jaxalope.sharding import absent_devices

_SHAPE = flags.DEFINE_enum("shape", "kimi_8m", sorted(SHAPES), "Heads and widths.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows.")
_CONTEXTS = flags.DEFINE_list("contexts", ["1024", "4096"], "Slots of a row, all filled.")
_TOKENS = flags.DEFINE_integer("tokens", 1, "New tokens a row, T.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of queries and cache.")
_FORMS = flags.DEFINE_list("implementations", ["xla", "reference"], "To measure, in turns.")
_STEPS = flags.DEFINE_integer("steps", 16, "Reads a call.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 7, "Calls of each implementation.", lower_bound=1)
_MEMORY = flags.DEFINE_float("memory_gib", 8.0, "Largest cache.", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Compile for a chip of this kind: v5e:2x2.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


def shapes(batch: int, context: int):
    """Queries, latents and positions of a call."""
    s, tokens = SHAPES[_SHAPE.value], _TOKENS.value
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=_DTYPE.value)
    return (
        floats((batch, tokens, s.num_heads, s.width)),
        floats((batch, context, s.width)),
        jax.ShapeDtypeStruct((batch, tokens), "int32"),
    )


def read(implementation: str, q, latent, positions):
    """One call of the operator."""
    return latent_decode(
        q,
        latent,
        positions=positions,
        value_dim=SHAPES[_SHAPE.value].value_dim,
        scale=SHAPES[_SHAPE.value].width ** -0.5,
        implementation=implementation,
    )


def reads(implementation: str, q, latent, positions):
    """`--steps` calls, one after another."""

    def step(_, q):
        o = read(implementation, q, latent, positions)
        return q.at[..., : o.shape[-1]].add(o)

    return jax.lax.fori_loop(0, _STEPS.value, step, q)


def grid():
    """Every batch and context whose cache fits, with the cache's bytes."""
    for context in map(int, _CONTEXTS.value):
        for batch in map(int, _BATCHES.value):
            _, latent, _ = shapes(batch, context)
            size = latent.size * latent.dtype.itemsize
            if size <= _MEMORY.value * 2**30:
                yield batch, context, size


def measure(facts):
    """Times every implementation on the device that is here."""
    peak, lines = report.bandwidth(jax.devices()[0]), []
    for batch, context, size in grid():
        q, latent, _ = shapes(batch, context)
        q, latent = (
            jax.jit(functools.partial(jax.random.normal, shape=x.shape, dtype=x.dtype))(key)
            for x, key in zip((q, latent), jax.random.split(jax.random.key(0)), strict=True)
        )
        last = context - _TOKENS.value + jnp.arange(_TOKENS.value, dtype=jnp.int32)
        arrays = (q, latent, jnp.broadcast_to(last, (batch, _TOKENS.value)))
        sides = {}
        for form in _FORMS.value:
            sides[form] = functools.partial(jax.jit(functools.partial(reads, form)), *arrays)
            if (why := report.refusal(sides[form])) is not None:
                del sides[form]
                print(batch, context, form, "left out:", why, flush=True)
        for form, seconds in report.alternate(sides, _TURNS.value).items():
            seconds = seconds / _STEPS.value
            row = {"form": form, "batch": batch, "context": context, "cache_bytes": size}
            row |= {"steps": _STEPS.value, "seconds": seconds.tolist()}
            report.write_rows(_OUTPUT.value, [facts | row])
            rate = size / seconds
            share = "-" if peak is None else report.spread(100 * rate / peak)
            cells = report.spread(seconds * 1e6), report.spread(rate / 1e9), share
            lines.append((batch, context, form, *cells))
            print(lines[-1], flush=True)
    headers = ("batch", "context", "form", "us a step", "GB/s", "% of the bandwidth")
    print(report.table(headers, lines))


def compile_ahead(facts):
    """Compiles for `--topology`, and prints and writes what the compiler says."""
    device = absent_devices(_TOPOLOGY.value)[0]
    rows, lines = [], []
    for batch, context, size in grid():
        for form in _FORMS.value:
            program = functools.partial(read, form)
            compiled = report.compile_for(device, program, *shapes(batch, context))
            cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
            row = {
                "form": form,
                "batch": batch,
                "context": context,
                "cache_bytes": size,
                "target": device.device_kind,
                "vmem_bytes": report.vmem_bytes(compiled),
                "flops": cost.get("flops"),
                "bytes_accessed": cost.get("bytes accessed"),
                "temporary_bytes": memory.temp_size_in_bytes,
                "bound_s": size / report.bandwidth(device),
            }
            rows.append(facts | row)
            vmem = " + ".join(f"{x / 2**20:.1f}" for x in row["vmem_bytes"]) or "-"
            cells = (
                vmem,
                report.billions(row["flops"], 2),
                report.billions(row["bytes_accessed"], 3),
                f"{row['temporary_bytes'] / 2**20:.1f}",
                f"{row['bound_s'] * 1e6:.0f}",
            )
            lines.append((row["target"], batch, context, form, *cells))
    headers = ("chip", "batch", "context", "form", "VMEM, MiB", "GFLOP", "GB", "temporaries, MiB")
    print(report.table((*headers, "us at full bandwidth"), lines))
    report.write_rows(_OUTPUT.value, rows)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    for form in _FORMS.value:
        if form not in IMPLEMENTATIONS:
            raise app.UsageError(f"--implementations={form} is not one of {IMPLEMENTATIONS}")
    facts = report.facts(shape=_SHAPE.value, tokens=_TOKENS.value, dtype=_DTYPE.value)
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    if _TOPOLOGY.value:
        compile_ahead(facts)
    else:
        measure(facts)


if __name__ == "__main__":
    app.run(main)
