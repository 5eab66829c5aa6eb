"""Command line: a model from one form to another, file by file, able to go on where it stopped.

python -m jaxalope.model.convert --from=runs/demo --to=exported
python -m jaxalope.model.convert --from=organisation/name --to=runs/theirs --verify
python -m jaxalope.model.convert --from=organisation/name --plan
"""

from __future__ import annotations

import math
import sys

import jax
import numpy as np
from absl import app, flags
from etils import epath
from flax import nnx
from tqdm import tqdm

from ..errors import InputError, ReadError, SaveError
from .fields import float_dtype
from .handle import Model
from .load import load, locate, open_lazily, pinned
from .published import is_published, open_published
from .registry import decoding_of
from .save import FORMATS, save
from .unfinished import describe

_FROM = flags.DEFINE_string(
    "from", None, "A workdir, a published directory, or a hub id.", required=True
)
_TO = flags.DEFINE_string("to", None, "The new directory.")
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    FORMATS,
    "'hf' is the published form, 'orbax' a workdir; if absent, the one that --from does not have.",
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of a workdir; the newest if absent.")
_EMA = flags.DEFINE_bool("ema", False, "The moving average of a workdir's parameters.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of the written tensors; as they are if absent.")
_SHARD_SIZE = flags.DEFINE_string("shard_size", "5GB", "Of a safetensors file.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what would be read of a published model, and stop.")
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare outputs before and after; fails if the dtype is kept and they differ."
)
_PROMPT = flags.DEFINE_string(
    "verify_prompt", "The quick brown fox jumps over the lazy dog.", "The text of --verify."
)


def convert() -> None:
    """Do what the flags say."""
    if _PLAN.value:
        directory = locate(_FROM.value)
        if not is_published(directory):
            raise InputError(f"--plan: {directory} is a workdir; only published models have a plan")
        print(open_published(directory).plan.summary())
        return
    if _TO.value is None:
        raise InputError("--to is absent; name the directory to write")
    dtype = float_dtype("--dtype", _DTYPE.value)
    # One step for all that is read, be it while a run goes on and saves.
    source = pinned(_FROM.value, step=_STEP.value, ema=_EMA.value)
    model = open_lazily(source, ema=_EMA.value)
    sizes = [
        math.prod(x.shape) * np.dtype(dtype or x.dtype).itemsize
        for x in jax.tree.leaves(model.params)
    ]
    chosen = _FORMAT.value or ("orbax" if is_published(source) else "hf")
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc=f"writing {chosen}") as bar:
        save(
            model,
            _TO.value,
            chosen,
            dtype=dtype,
            shard_size=_SHARD_SIZE.value,
            source=describe(source, ema=_EMA.value),
            progress=bar.update,
        )
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params))
    print(f"{_TO.value}: {count:,} parameters")
    if _VERIFY.value:
        _verify(source)


def _verify(source: epath.Path) -> None:
    # In float32, so that no rounding hides a difference.
    before = _outputs(load(source, ema=_EMA.value, dtype="float32"))
    after = _outputs(load(_TO.value, dtype="float32"))
    difference = float(np.abs(before - after).max())
    size = float(np.abs(before).max())
    print(f"largest difference of the outputs: {difference:.3g} (the largest is {size:.3g})")
    if not np.isfinite(difference) or (_DTYPE.value is None and difference > 0):
        raise InputError(
            f"--verify: {_TO.value} does not compute what {_FROM.value} does; do not use it, and "
            "report this"
        )


def _outputs(model: Model) -> np.ndarray:
    """Of the fixed prompt: the logits, and of models that draw vectors all that they make."""
    if model.tokenizer is None:
        # No text: the first ids of the vocabulary serve as well.
        ids = list(range(min(32, model.config.vocab_size)))
    else:
        ids = model.tokenizer.encode(_PROMPT.value) or [0]
    chunk = getattr(model.config, "chunk_size", 1)
    tokens = np.resize(np.asarray([ids], np.int32), (1, -(-len(ids) // chunk) * chunk))
    kind = decoding_of(model.config)
    if kind == "reconstruction":
        return np.asarray(model(tokens))
    outputs = np.asarray(model(tokens)[0])
    if kind != "next_vector":
        return outputs

    def drawn(params, hidden):
        module = nnx.merge(model.graphdef, params)
        noise = module.latent_head.noise(jax.random.key(0), hidden.shape[:2])
        latents = module.draw(hidden, noise)
        logits = module.autoencoder.logits(module.autoencoder.decode(latents))
        return [latents, logits, *module.autoencoder.encode(tokens)]

    outputs = [outputs, *jax.jit(drawn)(model.params, outputs)]
    return np.concatenate([np.ravel(x) for x in outputs])


def main(argv: list[str]) -> None:
    """Run ``python -m jaxalope.model.convert``."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        convert()
    except (InputError, ReadError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    app.run(main)
