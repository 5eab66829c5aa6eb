"""The loss picture of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from .metrics import read_metrics

FILE = "loss.png"
_SMOOTH_FROM = 50  # points; a shorter curve is clear as it is


def write_loss_picture(workdir: epath.PathLike, title: str) -> None:
    """Draw ``metrics.jsonl`` of a work directory into its ``loss.png``; nothing if it is empty."""
    workdir = epath.Path(workdir)
    lines = read_metrics(workdir)
    if any(_curve(lines, name)[0] for name in ("loss", "eval_loss")):
        (workdir / FILE).write_bytes(loss_picture(lines, title))


def loss_picture(lines: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of the training and held-out loss (nats per token) over the steps.

    Args:
        lines: of ``metrics.jsonl``.
        title: above the picture.
    """
    # Here, because only a run that draws should pay for it; Agg, because there may be no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = _curve(lines, "loss")
    if steps:
        long = len(steps) >= _SMOOTH_FROM
        label = f"training (last {losses[-1]:.3f})"
        if long:
            axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
            axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=1.6, label=label)
        else:
            axes.plot(steps, losses, ".-", color="tab:blue", linewidth=1.2, label=label)
    for name, label, color in (
        ("eval_loss", "held out", "tab:orange"),
        ("eval_ema_loss", "held out, EMA", "tab:green"),
    ):
        steps, losses = _curve(lines, name)
        if steps:
            text = f"{label} (last {losses[-1]:.3f})"
            axes.plot(steps, losses, "o-", color=color, markersize=4, label=text)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> np.ndarray:
    """The mean over about a fiftieth of the curve around each point: it does not lag behind."""
    window = np.ones(max(3, len(values) // 50))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
