"""Loading and saving a published checkpoint: time and host memory, against the libraries' own.

A 1B-parameter Pythia of random bfloat16 numbers (2.02 GB in two files) is written once. Then, in
turns and each in a process of its own: ``jaxalope.load`` and ``jaxalope.save``;
``safetensors.torch.load_file``; ``transformers``' ``from_pretrained`` and ``save_pretrained``.
Files are in the page cache. Every tensor is touched before the clock stops, since a mapped file is
not read before that. Memory is the process's peak above what it was before.

    python bench/exchange.py --output=bench/results/exchange.jsonl
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from etils import epath
from report import facts, spread, table, write_rows

import jaxalope
from jaxalope.model import GPTNeoXConfig, build_model
from jaxalope.model.exchange import Lazy, Sources, layout_of_model, write_weights
from jaxalope.model.gpt_neox_weights import PUBLISHED
from jaxalope.sharding import abstract

_TURNS = flags.DEFINE_integer("turns", 3, "Repetitions of each side.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_MODEL = flags.DEFINE_string("model", "pythia_1b", "A preset of GPTNeoXConfig.")
_SIDE = flags.DEFINE_string("side", None, "Internal: what this process measures.")
_FOLDER = flags.DEFINE_string("folder", None, "Internal: where the checkpoint lies.")
SIDES = ("jaxalope", "load_file", "transformers")


def write_checkpoint(folder: pathlib.Path) -> int:
    """Write the model; returns its size in bytes."""
    config = getattr(GPTNeoXConfig, _MODEL.value)()
    contents = PUBLISHED.config_to(config) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(contents))
    numbers = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(ml_dtypes.bfloat16)
    _, shapes, _ = abstract(lambda key: build_model(config, key))
    leaves = layout_of_model(PUBLISHED, config, shapes)
    arrays = {
        leaf.path: Lazy(
            leaf.shape, numbers.dtype, functools.partial(np.resize, numbers, leaf.shape)
        )
        for leaf in leaves
    }
    sources = Sources(leaves, arrays.__getitem__, list(arrays.values()))
    write_weights(epath.Path(folder), sources, shard_size=2 * 10**9)
    return sum(d.itemsize * math.prod(s) for d, s in sources.tensors.values())


def resident(what: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or at most so far (``VmHWM``). Linux."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) * 1024


def measure(side: str, folder: pathlib.Path) -> dict[str, float]:
    """Seconds and bytes of one side, in this process."""
    out: dict[str, float] = {}

    def timed(name, run):
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # The peak starts from here.
        before, start = resident("VmRSS"), time.perf_counter()
        result = run()
        out[f"{name}_s"] = time.perf_counter() - start
        out[f"{name}_peak"] = resident("VmHWM") - before
        return result

    if side == "jaxalope":
        jax.devices()

        def load():
            model = jaxalope.load(folder)
            return jax.block_until_ready(model.params) and model

        model = timed("load", load)
        timed("save", lambda: jaxalope.save(model, folder / "ours"))
        return out
    import torch

    def touch(tensors):
        for tensor in tensors:
            tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()

    if side == "load_file":
        from safetensors.torch import load_file

        def load():
            for file in sorted(folder.glob("*.safetensors")):
                tensors = load_file(file)
                touch(tensors.values())

        timed("load", load)
        return out
    import transformers

    def load():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        touch(model.parameters())
        return model

    model = timed("load", load)
    timed("save", lambda: model.save_pretrained(folder / "theirs", max_shard_size="5GB"))
    return out


def main(_) -> None:
    if _SIDE.value is not None:
        print("RESULT " + json.dumps(measure(_SIDE.value, pathlib.Path(_FOLDER.value))))
        return
    import safetensors
    import torch
    import transformers

    versions = {
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = write_checkpoint(folder)
        for turn in range(_TURNS.value):
            for side in SIDES:
                command = [sys.executable, __file__, f"--side={side}", f"--folder={folder}"]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
                measured = json.loads(line.removeprefix("RESULT "))
                rows.append({"side": side, "turn": turn, "bytes": size, **measured})
                for written in ("ours", "theirs"):
                    shutil.rmtree(folder / written, ignore_errors=True)
    where = facts(**versions)
    write_rows(_OUTPUT.value, [{**where, **row} for row in rows])
    print(
        table(
            ["", "load, GB/s", "peak memory, GB", "save, GB/s", "peak memory, GB"],
            [[side, *_cells([r for r in rows if r["side"] == side])] for side in SIDES],
        )
    )


def _cells(rows: list[dict]) -> list[str]:
    cells = []
    for what in ("load", "save"):
        if f"{what}_s" not in rows[0]:
            return [*cells, "", ""]
        cells.append(spread((r["bytes"] / r[f"{what}_s"] / 1e9 for r in rows), 2))
        cells.append(spread((r[f"{what}_peak"] / 1e9 for r in rows), 2))
    return cells


if __name__ == "__main__":
    app.run(main)
