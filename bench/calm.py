"""CALM at small scale: its autoencoder, its speed, and BrierLM against training FLOPs.

    python bench/calm.py --task=autoencoder --output=bench/results/calm_autoencoder.jsonl
    python bench/calm.py --task=generation --output=bench/results/calm_generation.jsonl
    python bench/calm.py --task=brier --output=bench/results/calm_brier.jsonl \
      --picture=docs/calm_brier.png
    python bench/calm.py --task=ablations --output=bench/results/calm_ablations.jsonl

`autoencoder` trains `calm_autoencoder_demo` and gives back held-out text through noise of several
sizes. `generation` writes with random weights: a next-token model and a CALM model whose
transformers are alike, side by side. `brier` trains `calm_demo` and `calm_ar_demo`, several seeds
of each, over one autoencoder; `ablations` trains `calm_demo` with one thing changed.

Text is the running Python's standard library, in bytes; scores are of its held-out files.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from report import alternate, facts, spread, table, write_rows

import jaxalope
from jaxalope import Model
from jaxalope.configs import NextVector, Reconstruction, get_experiment, with_part
from jaxalope.data.pipeline import eval_batches
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.evals import brier_lm
from jaxalope.model import CALMAutoencoderConfig, CALMConfig, LLaDAConfig, build_model
from jaxalope.sharding import split
from jaxalope.train.loop import train

_TASK = flags.DEFINE_enum(
    "task", "generation", ["autoencoder", "generation", "brier", "ablations"], "What to measure."
)
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG to draw, of `brier`.")
_AUTOENCODER = flags.DEFINE_string(
    "autoencoder", None, "A finished autoencoder's workdir; one is trained if absent."
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each side.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", None, "Optimizer steps; the experiment's if absent.")
_FIRST_STEPS = flags.DEFINE_integer(
    "autoencoder_steps", None, "Optimizer steps of an autoencoder that is trained here."
)
_SIDES = flags.DEFINE_multi_string("side", [], "Ablations to run; all if absent.")
_POINTS = flags.DEFINE_integer("points", 4, "Places of a run that are scored.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 5, "Times that each side writes.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 512, "Of the models that write.")
_LAYERS = flags.DEFINE_integer("layers", 8, "Of the models that write.")
_VOCAB = flags.DEFINE_integer("vocab", 8192, "Ids of the models that write.")
_BATCHES = flags.DEFINE_multi_integer("batch", [1, 16], "Texts that are written at once.")
_NEW = flags.DEFINE_integer("new_tokens", 256, "Tokens that are written.")

_HELD_OUT_ROWS = 64
_POSITIONS = 64


# ------------------------------------------------------------------------------------- autoencoder


def autoencoder_workdir(folder: pathlib.Path, **objective) -> tuple[str, float]:
    """A trained autoencoder, and the seconds that it took."""
    experiment = get_experiment("calm_autoencoder_demo")
    experiment = dataclasses.replace(experiment, objective=Reconstruction(**objective))
    experiment = _of_length(experiment, _FIRST_STEPS.value)
    name = "-".join(["autoencoder", *(f"{k}={v}" for k, v in sorted(objective.items()))])
    workdir = folder / name
    start = time.perf_counter()
    train(experiment, workdir)
    return str(workdir), time.perf_counter() - start


def _of_length(experiment, steps: int | None):
    """The experiment with another number of steps, a third of them decaying."""
    if steps is None or steps == experiment.train.steps:
        return experiment
    return dataclasses.replace(
        experiment,
        train=dataclasses.replace(experiment.train, steps=steps),
        schedule=dataclasses.replace(experiment.schedule, decay_steps=steps // 3),
    )


def held_out(data, rows: int = _HELD_OUT_ROWS) -> list[dict]:
    """Batches of held-out rows."""
    tokenizer = load_tokenizer(data.tokenizer)
    data = dataclasses.replace(data, batch_size=8, num_streams=None)
    return list(eval_batches(data, tokenizer, rows // 8))


def run_autoencoder(folder: pathlib.Path) -> list[dict]:
    """Accuracy of held-out tokens through the posterior with noise of other sizes."""
    seconds = None
    workdir = _AUTOENCODER.value
    if workdir is None:
        workdir, seconds = autoencoder_workdir(folder)
    model = jaxalope.load(workdir)
    batches = held_out(get_experiment("calm_autoencoder_demo").data, 1024)

    @jax.jit
    def right(params, batch, std, key):
        module = nnx.merge(model.graphdef, params)
        mean, log_std = module.encode(batch["tokens"])
        # None is the posterior's own.
        noise = jnp.where(jnp.isnan(std), jnp.exp(log_std), std)
        latents = mean + noise * jax.random.normal(key, mean.shape)
        tokens = module.tokens(latents).reshape(batch["tokens"].shape)
        counted = batch["segment_ids"] > 0
        same = (tokens == batch["tokens"]) & counted
        return same.sum(), counted.sum(), jnp.exp(log_std).mean()

    rows = []
    for std in (float("nan"), 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        sums = [
            right(model.params, b, std, jax.random.fold_in(jax.random.key(0), i))
            for i, b in enumerate(batches)
        ]
        good, count, posterior = (np.array([float(s[i]) for s in sums]) for i in range(3))
        rows.append(
            {
                "noise": "posterior" if np.isnan(std) else std,
                "posterior_std": posterior.mean(),
                "accuracy": good.sum() / count.sum(),
                "tokens": int(count.sum()),
                "train_seconds": seconds,
            }
        )
    cells = [(r["noise"], f"{r['accuracy']:.5f}", f"{r['tokens']:,}") for r in rows]
    print(
        f"posterior std {rows[0]['posterior_std']:.3f}; trained in {seconds and round(seconds)} s"
    )
    print(table(["noise", "accuracy", "held-out tokens"], cells))
    return rows


# -------------------------------------------------------------------------------------- generation


def run_generation() -> list[dict]:
    """Tokens/s of both kinds of model over the same transformer."""
    shape = {
        "hidden_size": _WIDTH.value,
        "num_layers": _LAYERS.value,
        "num_attention_heads": _WIDTH.value // 64,
        "num_kv_heads": _WIDTH.value // 64,
        "intermediate_size": _WIDTH.value * 8 // 3 // 64 * 64,
        "scan_layers": False,
    }
    baseline = LLaDAConfig(
        vocab_size=_VOCAB.value,
        mask_token_id=_VOCAB.value - 1,
        block_size=1,
        logit_shift=True,
        rope_theta=10000.0,
        **shape,
    )
    # The published proportions: a quarter as many blocks in the head, half the width.
    chunked = CALMConfig(
        autoencoder=CALMAutoencoderConfig(
            vocab_size=_VOCAB.value,
            hidden_size=_WIDTH.value // 2,
            intermediate_size=_WIDTH.value * 5 // 4,
        ),
        head_layers=max(_LAYERS.value // 4, 1),
        **shape,
    )
    models = {"next token": baseline, "CALM, K=4": chunked}
    built = {name: (c, *split(build_model(c, jax.random.key(0)))) for name, c in models.items()}
    models = {name: Model(c, graphdef, params) for name, (c, graphdef, params) in built.items()}
    rows, lines = [], []
    for batch in _BATCHES.value:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, _VOCAB.value - 1, 64).tolist() for _ in range(batch)]

        def side(model, prompts=prompts):
            return lambda: jaxalope.generate(
                model, prompts, max_new_tokens=_NEW.value, stop_tokens=(), seed=0
            )

        seconds = alternate({name: side(m) for name, m in models.items()}, _TURNS.value)
        for name, times in seconds.items():
            speed, ratio = batch * _NEW.value / times, seconds["next token"] / times
            flops = _generation_flops(models[name].config)
            rows.append(
                {"batch": batch, "side": name, "flops_a_token": flops, "seconds": times.tolist()}
            )
            cells = (spread(speed, 0), spread(ratio, 2), f"{flops / 1e6:.0f}")
            lines.append((batch, name, *cells))
    print(table(["batch", "side", "tokens/s", "times next token", "MFLOP a token"], lines))
    return rows


def _generation_flops(config) -> float:
    length = 64 + _NEW.value // 2
    if isinstance(config, CALMConfig):
        return config.generation_flops_per_token(length)
    return config.flops_per_token(length) / 3


# ------------------------------------------------------------------------------- BrierLM and FLOPs


def scored_run(experiment, workdir: pathlib.Path, seed: int, points: int) -> list[dict]:
    """Train, then score the model of some places of the run on held-out text."""
    experiment = _of_length(experiment, _STEPS.value)
    steps = experiment.train.steps
    experiment = dataclasses.replace(
        experiment,
        train=dataclasses.replace(experiment.train, seed=seed, eval_every=None),
        data=dataclasses.replace(experiment.data, seed=seed),
        checkpoint=dataclasses.replace(
            experiment.checkpoint, every=max(steps // points, 1), keep_last=points + 1, keep_best=0
        ),
    )
    start = time.perf_counter()
    train(experiment, workdir, quiet=True)
    seconds = time.perf_counter() - start
    data = experiment.data
    flops = experiment.model.flops_per_token(data.sequence_length)
    rows = []
    for step in range(max(steps // points, 1), steps + 1, max(steps // points, 1)):
        model = jaxalope.load(workdir, step=step)
        score = brier_lm(model, held_out(data), num_positions=_POSITIONS, seed=0)
        tokens = step * data.batch_size * data.sequence_length
        rows.append(
            {
                "seed": seed,
                "step": step,
                "tokens": tokens,
                "train_flops": flops * tokens,
                "train_seconds": seconds * step / steps,
                "brier_lm": score.score,
                "brier": score.factors.tolist(),
                "standard_errors": score.standard_errors.tolist(),
            }
        )
    return rows


def run_brier(folder: pathlib.Path) -> list[dict]:
    """Both sides, several seeds each."""
    workdir = _AUTOENCODER.value or autoencoder_workdir(folder)[0]
    sides = {
        "CALM, K=4": with_part(get_experiment("calm_demo"), "autoencoder", workdir),
        "next token": get_experiment("calm_ar_demo"),
    }
    rows = []
    for seed in range(_SEEDS.value):
        for name, experiment in sides.items():
            points = scored_run(experiment, folder / f"{name}-{seed}", seed, _POINTS.value)
            new = [{"side": name, **row} for row in points]
            write_rows(_OUTPUT.value, [{**facts(), **row} for row in new])
            rows += new
    lines = []
    for name in sides:
        for step in sorted({r["step"] for r in rows if r["side"] == name}):
            mine = [r for r in rows if r["side"] == name and r["step"] == step]
            flops = f"{mine[0]['train_flops']:.2e}"
            factors = [statistics.median(r["brier"][n] for r in mine) for n in range(4)]
            cells = " / ".join(f"{100 * x:.1f}" for x in factors)
            lines.append((name, step, flops, spread((r["brier_lm"] for r in mine), 2), cells))
    print(table(["side", "steps", "training FLOPs", "BrierLM", "Brier-1 / 2 / 3 / 4, %"], lines))
    if _PICTURE.value:
        draw(rows, _PICTURE.value)
    return []


def draw(rows: list[dict], path: str) -> None:
    """Medians and ranges of the seeds over training FLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(dict.fromkeys(r["side"] for r in rows))
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        mine = [r for r in rows if r["side"] == name]
        flops = sorted({r["train_flops"] for r in mine})
        values = [[r["brier_lm"] for r in mine if r["train_flops"] == f] for f in flops]
        axes.plot(flops, [statistics.median(v) for v in values], "o-", color=color, label=name)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(flops, low, high, color=color, alpha=0.25)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("BrierLM, held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


# --------------------------------------------------------------------------------------- ablations


def run_ablations(folder: pathlib.Path) -> list[dict]:
    """The demo with one thing changed: what the paper's ablations change."""
    base = get_experiment("calm_demo")
    no_dropout = {"token_dropout": 0.0, "latent_dropout": 0.0}

    def over(objective=None, head="energy", **autoencoder):
        workdir = None if autoencoder else _AUTOENCODER.value
        workdir = workdir or autoencoder_workdir(folder, **autoencoder)[0]
        experiment = with_part(base, "autoencoder", workdir)
        return dataclasses.replace(
            experiment,
            model=dataclasses.replace(experiment.model, head=head),
            objective=objective or NextVector(num_targets=32, min_reconstruction=0.0),
        )

    def samples(count):
        return NextVector(num_samples=count, num_targets=32)

    sides = {
        "as it is": over,
        "KL not clipped": lambda: over(kl_floor=0.0),
        "no dropout": lambda: over(**no_dropout),
        "no KL, no dropout": lambda: over(kl_weight=0.0, **no_dropout),
        "diffusion head": lambda: over(head="diffusion"),
        "flow head": lambda: over(head="flow"),
        "N = 2": lambda: over(samples(2)),
        "N = 4": lambda: over(samples(4)),
        "N = 12": lambda: over(samples(12)),
    }
    chosen = _SIDES.value or list(sides)
    lines = []
    for name in chosen:
        experiment, runs = sides[name](), []
        for seed in range(_SEEDS.value):
            workdir = folder / f"{name}-{seed}".replace(" ", "_").replace(",", "")
            last = scored_run(experiment, workdir, seed, 1)[-1]
            runs.append({"side": name, **last})
            write_rows(_OUTPUT.value, [{**facts(), **runs[-1]}])
        factors = [statistics.median(r["brier"][n] for r in runs) for n in range(4)]
        cells = " / ".join(f"{100 * x:.1f}" for x in factors)
        took = spread((r["train_seconds"] for r in runs), 0)
        lines.append((name, spread((r["brier_lm"] for r in runs), 2), cells, took))
        print(table(["changed", "BrierLM", "Brier-1 / 2 / 3 / 4, %", "seconds"], lines), flush=True)
    return []


def main(argv):
    """Measure what is asked for, print it, and keep the rows."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    where = facts()
    print(" ".join(f"{k}={v}" for k, v in where.items()))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if _TASK.value == "autoencoder":
            rows = run_autoencoder(folder)
        elif _TASK.value == "generation":
            rows = run_generation()
            where |= {"width": _WIDTH.value, "layers": _LAYERS.value, "vocab": _VOCAB.value}
        elif _TASK.value == "brier":
            rows = run_brier(folder)
        else:
            rows = run_ablations(folder)
    write_rows(_OUTPUT.value, [{**where, **row} for row in rows])


if __name__ == "__main__":
    app.run(main)
