"""Trains a byte-level BPE on a corpus.

    python -m jaxalope.data.train_tokenizer --source=stdlib --vocab_size=4096 --output=DIR

`DIR` then holds a `tokenizer.json`; name it as a run's tokenizer. Bytes are its alphabet, so every
text survives encoding and decoding unchanged.
"""

import sys
from collections.abc import Iterator, Sequence

import tokenizers as hf
from absl import app, flags

from ..errors import InputError
from .config import DataConfig, SourceConfig
from .documents import Source
from .readers import open_source
from .tokenizers import JsonTokenizer

_SOURCE = flags.DEFINE_multi_string(
    "source", ["stdlib"], 'A corpus: "stdlib", a path or a glob. Repeat the flag for several.'
)
_FORMAT = flags.DEFINE_string("format", "auto", "Format of the sources.")
_FIELD = flags.DEFINE_string("field", "text", "Field or column that holds the text.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Number of ids, special tokens included.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write the tokenizer to; required.")
_HOLDOUT_FRACTION = flags.DEFINE_float(
    "holdout_fraction",
    DataConfig.holdout_fraction,
    "Share of the documents to leave out: that of the training run, so that its held-out text is "
    "not seen.",
)
_MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents",
    None,
    "Train on this many documents of every source, evenly spaced.",
    lower_bound=1,
)

_SPECIAL = {"pad_id": "<|pad|>", "bos_id": "<|bos|>", "eos_id": "<|eos|>"}


def _texts(source: Source, most: int | None) -> Iterator[str]:
    step = 1 if most is None else max(len(source) // most, 1)
    for i in range(0, len(source) if most is None else min(most * step, len(source)), step):
        yield source[i].text


def train(
    sources: Sequence[Source], vocab_size: int, max_documents: int | None = None
) -> JsonTokenizer:
    """A byte-level BPE with pad, BOS and EOS (ids 0, 1, 2) and then the 256 bytes.

    Args:
      sources: opened corpora.
      vocab_size: ids in all; fewer if the corpus has no more pairs to merge.
      max_documents: documents read of every source, evenly spaced; None: all.

    Raises:
      InputError: `vocab_size` has no room for the bytes.
    """
    least = 256 + len(_SPECIAL)
    if vocab_size < least:
        raise InputError(
            f"vocab_size={vocab_size} is too small: the bytes and the special tokens take {least}."
        )
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for source in sources for text in _texts(source, max_documents)), trainer
    )
    special = {name: tokenizer.token_to_id(token) for name, token in _SPECIAL.items()}
    return JsonTokenizer(tokenizer.to_str(), special)


def main(argv: Sequence[str]) -> int:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        if _OUTPUT.value is None:
            raise InputError("--output is missing: the directory to write the tokenizer to")
        sources = [
            open_source(
                SourceConfig(path=path, format=_FORMAT.value, field=_FIELD.value),
                "train",
                _HOLDOUT_FRACTION.value,
            )
            for path in _SOURCE.value
        ]
        sample = next((text for s in sources for text in _texts(s, None) if text), None)
        if sample is None:
            raise InputError(
                f"--source={','.join(_SOURCE.value)}: every document there is empty; name a corpus "
                "with text in it, or the --field that holds it"
            )
        tokenizer = train(sources, _VOCAB_SIZE.value, _MAX_DOCUMENTS.value)
        try:
            tokenizer.save(_OUTPUT.value)
        except OSError as e:
            raise InputError(
                f"--output={_OUTPUT.value} cannot be written: {e}. Name another directory"
            ) from e
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    count = len(tokenizer.encode(sample))
    print(
        f"{_OUTPUT.value}: {tokenizer.vocab_size} ids from "
        f"{sum(map(len, sources))} documents; {len(sample.encode()) / count:.2f} bytes per token "
        "on the first with text."
    )
    return 0


if __name__ == "__main__":
    app.run(main)
