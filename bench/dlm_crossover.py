"""Little text read many times: does masked diffusion overtake next-token prediction?

    python bench/dlm_crossover.py --output=bench/results/dlm_crossover.jsonl \
      --picture=docs/dlm_crossover.png
    python bench/dlm_crossover.py --scale=gpu --seeds=2

The corpus is the running Python's standard library, files of its top folder joined in the order of
their names. The small arms read its first ``--unique`` bytes, the control reads much more of it,
and all are evaluated on 64 KiB from its middle, with the same masks every time. What is printed for
diffusion is a bound on its negative log-likelihood, so that a crossover is, if anything, late.

At ``--scale=gpu`` the corpus is the Python source of installed packages too, in tokens of a BPE
trained on it; run it where an accelerator is.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import tempfile

from absl import app, flags
from report import facts, spread, table, write_rows

from jaxalope.configs.registry import get_experiment
from jaxalope.train.loop import train
from jaxalope.train.metrics import read_metrics

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_PICTURE = flags.DEFINE_string("picture", None, "PNG to draw.")
_SCALE = flags.DEFINE_enum("scale", "cpu", ["cpu", "gpu"], "Size of models and text.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each arm.", lower_bound=1)
_UNIQUE = flags.DEFINE_integer("unique", None, "Bytes of the small corpus; the plan's if absent.")
_CONTROL = flags.DEFINE_integer("control", None, "Bytes of the control's; 0 leaves it out.")
_STEPS = flags.DEFINE_integer("steps", None, "Optimizer steps; the experiment's if absent.")

_HELD_OUT = 64 * 1024
# Python source has about 3.5 bytes a token of such a BPE.
_PLAN = {"cpu": (16 * 1024, 2_000_000), "gpu": (7_000_000, 0)}
_NAME = {"cpu": "dlm_crossover", "gpu": "dlm_crossover_gpu"}
ARMS = {"diffusion": "", "next token": "_ar"}


def corpus(scale: str) -> bytes:
    """The text, in one piece, the same on every machine with this Python (and these packages)."""
    paths = sysconfig.get_paths()
    files = sorted(pathlib.Path(paths["stdlib"]).glob("*.py"))
    if scale == "gpu":
        files += sorted(pathlib.Path(paths["purelib"]).rglob("*.py"))
    return b"".join(path.read_bytes() for path in files)


def write_text(folder: pathlib.Path, text: bytes, unique: int, scale: str) -> None:
    """``train.txt``, ``held_out.txt``, and the tokenizer where one is needed."""
    middle = len(text) // 2
    held_out = text[middle : middle + _HELD_OUT * (1 if scale == "cpu" else 16)]
    # The training text never reaches the held-out one.
    (folder / "train.txt").write_bytes(text[: min(unique, middle)])
    (folder / "held_out.txt").write_bytes(held_out)
    if scale == "gpu":
        (folder / "all.txt").write_bytes(text[:middle])
        command = [sys.executable, "-m", "jaxalope.data.train_tokenizer", "--vocab_size=8192"]
        command += [f"--source={folder / 'all.txt'}", f"--output={folder / 'tokenizer'}"]
        subprocess.run(command, check=True)


def curve(name: str, seed: int, folder: pathlib.Path, unique: int) -> list[dict]:
    """Train one arm; its held-out loss against epochs."""
    experiment = get_experiment(name)
    steps = _STEPS.value or experiment.train.steps
    experiment = dataclasses.replace(
        experiment,
        train=dataclasses.replace(experiment.train, seed=seed, steps=steps),
        data=dataclasses.replace(experiment.data, seed=seed),
    )
    tokens_a_step = experiment.data.batch_size * experiment.data.sequence_length
    workdir = folder / f"{name}-{unique}-{seed}"
    train(experiment, workdir, quiet=True)
    bytes_a_token = 1 if experiment.data.tokenizer == "bytes" else 3.5
    return [
        {
            "step": line["step"],
            "epoch": line["step"] * tokens_a_step * bytes_a_token / unique,
            "eval_nll": line.get("eval_nll", line["eval_loss"]),
        }
        for line in read_metrics(workdir)
        if "eval_loss" in line
    ]


def crossover(rows: list[dict], seed: int) -> float | None:
    """The epoch from which diffusion's held-out loss is the lower one to the end."""
    ours, theirs = (
        {r["step"]: r for r in rows if r["arm"] == arm and r["seed"] == seed} for arm in ARMS
    )
    found = None
    for step in sorted(ours.keys() & theirs.keys()):
        if ours[step]["eval_nll"] >= theirs[step]["eval_nll"]:
            found = None
        elif found is None:
            found = ours[step]["epoch"]
    return found


def draw(rows: list[dict], path: str) -> None:
    """Medians and ranges of the seeds over epochs, the small corpus beside the control."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = sorted({row["unique_bytes"] for row in rows})
    figure = Figure(figsize=(5 * len(sizes), 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, unique in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for arm, color in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
            mine = [r for r in rows if r["arm"] == arm and r["unique_bytes"] == unique]
            epochs = sorted({r["epoch"] for r in mine})
            values = [[r["eval_nll"] for r in mine if r["epoch"] == e] for e in epochs]
            axes.plot(epochs, [statistics.median(v) for v in values], color=color, label=arm)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(epochs, low, high, color=color, alpha=0.25)
        axes.set_title(f"{unique:,} bytes of text")
        axes.set_xlabel("epochs")
        axes.set_ylabel("held-out loss (nats a token)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main(_) -> None:
    """Run every arm, and print what became of it."""
    scale = _SCALE.value
    unique, control = _PLAN[scale]
    unique = _UNIQUE.value or unique
    control = control if _CONTROL.value is None else _CONTROL.value
    text, rows, here = corpus(scale), [], pathlib.Path.cwd()
    where = facts()
    output, picture = (p and str(here / p) for p in (_OUTPUT.value, _PICTURE.value))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.chdir(folder)  # The experiments read their text from the working directory.
        for size, seeds in ((unique, _SEEDS.value), (control, 1 if control else 0)):
            for seed in range(seeds):
                write_text(folder, text, size, scale)
                for arm, suffix in ARMS.items():
                    points = curve(_NAME[scale] + suffix, seed, folder, size)
                    new = [{"arm": arm, "seed": seed, "unique_bytes": size, **p} for p in points]
                    write_rows(output, [{**where, **row} for row in new])
                    rows += new
        os.chdir(here)
    lines = []
    for size in sorted({row["unique_bytes"] for row in rows}):
        mine = [row for row in rows if row["unique_bytes"] == size]
        seeds = sorted({row["seed"] for row in mine})
        for arm in ARMS:
            runs = [[r for r in mine if r["arm"] == arm and r["seed"] == s] for s in seeds]
            best = [min(run, key=lambda r: r["eval_nll"]) for run in runs]
            lines.append(
                [
                    f"{size:,}",
                    arm,
                    spread((r["eval_nll"] for r in best), 2),
                    spread((r["epoch"] for r in best), 0),
                    spread((run[-1]["eval_nll"] for run in runs), 2),
                ]
            )
        found = [crossover(mine, seed) for seed in seeds]
        epochs = ["never" if e is None else f"epoch {e:.0f}" for e in found]
        print(f"{size:,} bytes: diffusion is the better one from {', '.join(epochs)} on")
    print(table(["bytes", "arm", "lowest held-out loss", "at epoch", "last"], lines))
    if picture:
        draw(rows, picture)


if __name__ == "__main__":
    app.run(main)
