"""Evaluate a model: ``python -m jaxalope.evals --model=WORKDIR --metric=brier_lm``.

Exit status: 0 evaluated; 2 the input is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

from absl import app, flags, logging

from ..errors import InputError, ReadError

_MODEL = flags.DEFINE_string("model", None, "A training workdir, or a published model; required.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint's step; the newest if not given.")
_EMA = flags.DEFINE_bool("ema", False, "The moving average of the parameters.")
_METRIC = flags.DEFINE_enum("metric", "brier_lm", ["brier_lm"], "What to measure.")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "What to measure on: 'stdlib' (its held-out files), or a file, directory or glob, read whole. "
    "If not given, what the run of --model holds out.",
)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 8, "Packed batches to read; 0 reads all.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Rows of a batch; documents read at once.")
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", None, "Tokens of a row; if not given, as the model was trained, or 512."
)
_NUM_POSITIONS = flags.DEFINE_integer(
    "num_positions", 64, "Positions scored of each document; 0 scores all."
)
_EXACT_LAST = flags.DEFINE_bool(
    "exact_last",
    None,
    "Next-token models: the last token of an n-gram by its probability (the default), or all by "
    "draws (--noexact_last), as for models without probabilities.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_OUTPUT = flags.DEFINE_string("output", None, "A file for the numbers, as JSON.")


def main(argv: list[str]) -> int:
    """Print what was measured; returns the exit status."""
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read.
    try:
        if argv[1:]:
            raise InputError(f"unexpected {argv[1]!r}; flags look like --num_batches=8")
        if _MODEL.value is None:
            raise InputError("--model is missing: the workdir of a run, or a published model")
        for name in ("num_batches", "num_positions"):
            if flags.FLAGS[name].value < 0:
                raise InputError(f"--{name}={flags.FLAGS[name].value} must be 0 (all) or more")
        _brier_lm()
    except (InputError, ReadError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _brier_lm() -> None:
    # After flag parsing, so that --help answers at once.
    from ..data.pipeline import eval_batches
    from ..model import load
    from .brier_lm import brier_lm

    output = None if _OUTPUT.value is None else pathlib.Path(_OUTPUT.value)
    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output={output}: its folder does not exist; make it first")
    model = load(_MODEL.value, step=_STEP.value, ema=_EMA.value)
    if model.tokenizer is None:
        raise InputError(f"--model={_MODEL.value} has no tokenizer to read --data with")
    config = _data(model)
    measured = brier_lm(
        model,
        eval_batches(config, model.tokenizer, _NUM_BATCHES.value or None),
        exact_last=_EXACT_LAST.value,
        num_positions=_NUM_POSITIONS.value or None,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
    )
    print(measured)
    if output is not None:
        settings = {
            "model": _MODEL.value,
            "metric": _METRIC.value,
            "data": _DATA.value,
            "num_batches": _NUM_BATCHES.value,
            "batch_size": _BATCH_SIZE.value,
            "sequence_length": config.sequence_length,
            "num_positions": _NUM_POSITIONS.value,
            "seed": _SEED.value,
        }
        output.write_text(json.dumps(settings | measured.to_json(), indent=1) + "\n")


def _data(model):
    """Where the batches come from: the run's own settings, but for what the flags say."""
    from ..configs.experiment import experiment_from_dict
    from ..data.config import DataConfig, SourceConfig
    from ..model.checkpoint import read_document
    from ..model.load import locate
    from ..model.published import is_published

    directory = locate(_MODEL.value)
    if not is_published(directory):
        config = experiment_from_dict(read_document(directory, "experiment", _STEP.value)).data
    elif _DATA.value is None:
        raise InputError(
            f"--data is missing: --model={_MODEL.value} is of no run, so it holds nothing out"
        )
    else:
        config = DataConfig(512, 1, add_bos=model.add_bos)
    length = _SEQUENCE_LENGTH.value or config.sequence_length
    config = dataclasses.replace(
        config, sequence_length=length, batch_size=_BATCH_SIZE.value, num_streams=None
    )
    if _DATA.value is None:
        return config
    source = (SourceConfig(_DATA.value),)
    if _DATA.value != "stdlib":
        return dataclasses.replace(config, eval_sources=source)
    held_out = config.holdout_fraction or DataConfig(length, 1).holdout_fraction
    return dataclasses.replace(config, sources=source, eval_sources=(), holdout_fraction=held_out)


if __name__ == "__main__":
    app.run(main)
