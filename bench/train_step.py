"""A whole train step of any experiment, and its model-FLOP utilisation.

    python bench/train_step.py --config=kimi_linear_1b1 --set data.batch_size=8 \
        --set train.accumulation=1 --side=kda_implementation=xla \
        --side=kda_implementation=pallas_gpu --output=bench/results/train_step.jsonl

Batches are random tokens, so that neither corpus nor tokenizer is needed; everything else is the
experiment's: objective, optimizer, clipping, mesh. Sides differ in fields of the model and take
turns on one training state. Utilisation is model FLOPs (no recomputation) over the devices' peak:
dense bfloat16 of the data sheet, float32 measured here on a CPU.
"""

import contextlib

import jax
import numpy as np
import report
from absl import app, flags

from jaxalope.configs import get_experiment
from jaxalope.configs.overlay import overlay
from jaxalope.sharding import make_mesh, use_mesh
from jaxalope.train.hardware import peak_flops
from jaxalope.train.step import abstract_state, batch_sharding, init_state, make_train_step

_CONFIG = flags.DEFINE_string("config", "demo", "A named experiment, or a file that holds one.")
_SET = flags.DEFINE_multi_string(
    "set", [], "Change a field of the experiment: path.to.field=value."
)
_SIDE = flags.DEFINE_multi_string("side", [], "A field of the model: name=value; one run each.")
_STEPS = flags.DEFINE_integer("steps", 5, "Train steps of one measurement.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Measurements of each side.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


def random_batch(experiment) -> dict[str, np.ndarray]:
    """The arrays of one global batch, each row one document."""
    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    tokens = np.random.default_rng(0).integers(3, experiment.model.vocab_size, shape)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.ascontiguousarray(positions),
    }
    if experiment.data.has_prompts:
        batch["loss_weights"] = np.ones(shape, np.float32)
    return batch


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    base = overlay(get_experiment(_CONFIG.value), _SET.value)
    experiments = {
        side: overlay(base, [f"model.{side}"] if side else []) for side in _SIDE.value or [""]
    }
    mesh = make_mesh(base.mesh) if jax.device_count() > 1 else None
    with contextlib.nullcontext() if mesh is None else use_mesh(mesh, base.rules):
        rows, lines = measure(base, experiments, mesh)
    headers = ("model", "s a step", "tokens/s", "MFU, %", "temporaries, GiB")
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


def measure(base, experiments, mesh):
    state = init_state(base, mesh)[1]
    place = None if mesh is None else batch_sharding(base, mesh)
    batch = jax.device_put(random_batch(base), place)
    carry, compiled = [state], {}
    for name, experiment in experiments.items():
        # Fields that choose an implementation leave parameters as they are.
        graphdef, _ = abstract_state(experiment, mesh)
        compiled[name] = make_train_step(experiment, graphdef).lower(state, batch).compile()

    def side(step):
        def run():
            for _ in range(_STEPS.value):
                carry[0], metrics = step(carry[0], batch)
            return metrics["loss"]

        return run

    seconds = report.alternate({n: side(s) for n, s in compiled.items()}, _TURNS.value)
    data, devices = base.data, jax.devices()
    tokens = data.batch_size * data.sequence_length
    flops = base.model.flops_per_token(data.sequence_length) * tokens
    peak = peak_flops(devices)
    facts = report.facts(config=_CONFIG.value, set=_SET.value, parameters=base.model.num_params())
    rows, lines = [], []
    for name, step in compiled.items():
        times = seconds[name] / _STEPS.value
        memory = step.memory_analysis().temp_size_in_bytes
        row = {"side": name, "devices": len(devices), "model_flops": flops, "peak_flops": peak}
        rows.append(facts | row | {"seconds": times.tolist(), "temporary_bytes": memory})
        share = report.spread(100 * flops / times / peak) if peak else "-"
        speed = report.spread(tokens / times, 0)
        cells = (report.spread(times, 3), speed, share, f"{memory / 2**30:.2f}")
        lines.append((name or _CONFIG.value, *cells))
    return rows, lines


if __name__ == "__main__":
    app.run(main)
