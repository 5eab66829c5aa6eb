"""Vocabularies in tiktoken's form: a list of byte strings in the order in which they are merged."""

import base64
import binascii
import re

import tokenizers as hf

from ...errors import InputError
from .base import fingerprint
from .byte_level import byte_alphabet
from .json_file import Pipeline
from .published import TIKTOKEN, Published

# How the texts of Moonshot's models (Moonlight, Kimi) are cut into words, of which each is merged
# alone: a run of Han characters; letters of other scripts up to a change from small to capital
# ones, with an English contraction; up to three digits; punctuation; white space. As published in
# their `tokenization_kimi.py`.
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_CLASS = "TikTokenTokenizer"
# Ids beyond the byte strings that are special tokens, whether they are named or not.
_RESERVED = 256
# Published tokenizers cut longer texts, and longer runs of (or without) white space, apart first.
_LONGEST_TEXT, _LONGEST_RUN = 400_000, 25_000
_RANK = re.compile(rb"([A-Za-z0-9+/]+=*) ([0-9]+)")


class TiktokenTokenizer(Pipeline):
    """A `tiktoken.model` file: lines of a base64 byte string and its rank, which is its id.

    The 256 ids after the byte strings are special tokens, named by `added_tokens_decoder` of the
    `tokenizer_config.json` beside it, or `<|reserved_token_ID|>`. Encoding is exactly tiktoken's,
    by the `tokenizers` library. (The code published for Kimi counts two more reserved tokens, for
    which its models have no rows.)
    """

    kind = "tiktoken"
    main = TIKTOKEN
    # Their published code sorts the keys of tools before a chat template sees them.
    sort_tools = True

    def __init__(
        self, serialized: bytes, published: Published | None = None, pattern: str | None = None
    ):
        """Args: contents of the file; files beside it; how texts are cut, if not as Kimi's.

        Raises:
          InputError: the file is none, a special token has the id of another token, or the files
            beside it are of another tokenizer, whose pattern is not known.
        """
        published = published or Published()
        named = published.config.get("tokenizer_class", _CLASS)
        if pattern is None and named != _CLASS:
            raise InputError(
                f"tokenizer_class={named!r}: {TIKTOKEN} does not say how texts are cut into words, "
                f"and only that of {_CLASS} (Moonlight, Kimi) is known; give "
                "TiktokenTokenizer(..., pattern=...) the one in that model's code"
            )
        self.pattern = KIMI_PATTERN if pattern is None else pattern
        self._serialized = serialized
        ranks = read_ranks(serialized)
        added = _special_tokens(ranks, published)
        spec = {"decoder": {"type": "ByteLevel"}, "model": {}}
        super().__init__(_pipeline(ranks, added, self.pattern), spec, published)

        ids = {name: i for name, (i, _) in added.items()}
        special = published.special_ids(ids.get, {"bos_id": None, "eos_id": None, "pad_id": None})
        self.bos_id, self.eos_id, self.pad_id = special.values()
        self.fingerprint = fingerprint(
            b"tiktoken", serialized, self.pattern.encode(), repr((added, special)).encode()
        )

    def encode(self, text: str) -> list[int]:
        """Token ids; the names of special tokens stand for these tokens."""
        if len(text) <= _LONGEST_RUN:
            return super().encode(text)
        return [i for piece in _pieces(text) for i in super(TiktokenTokenizer, self).encode(piece)]

    def _meta(self):
        return {} if self.pattern == KIMI_PATTERN else {"pattern": self.pattern}

    def _serialized_bytes(self):
        return self._serialized


def is_tiktoken(serialized: bytes) -> bool:
    """Whether a file's first line has a base64 string and a rank."""
    return _RANK.fullmatch(serialized.partition(b"\n")[0].rstrip(b"\r")) is not None


def read_ranks(serialized: bytes) -> dict[bytes, int]:
    """The byte strings of a file, in the order of their ranks.

    Raises:
      InputError: a line is something else, two have one rank or one string, or a byte is missing.
    """
    ranks: dict[bytes, int] = {}
    taken = set()
    for number, line in enumerate(serialized.splitlines(), 1):
        if not line.strip():
            continue
        match = _RANK.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not token:
            raise InputError(
                f"line {number} is {line[:60]!r}, and should be a base64 string and its rank"
            )
        rank = int(match[2])
        if token in ranks or rank in taken:
            raise InputError(f"line {number} repeats the string or the rank of an earlier line")
        ranks[token] = rank
        taken.add(rank)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise InputError(
            f"{len(missing)} single bytes have no rank (the first is {missing[0]:#04x}): texts "
            "could not be encoded; is the file whole?"
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _special_tokens(ranks: dict[bytes, int], published: Published) -> dict[str, tuple[int, bool]]:
    """`(id, special)` by name, in the order of ids."""
    named = {i: (name, special) for name, (i, special) in published.added_tokens.items()}
    taken = set(ranks.values())
    for i, (name, _) in named.items():
        if i in taken:
            raise InputError(
                f"{name!r} is added as id {i}, which {TIKTOKEN} gives to another token; do these "
                "files belong together?"
            )
        if name.encode() in ranks:
            raise InputError(f"{name!r} is added as id {i}, and is an ordinary token too")
    for i in range(len(ranks), len(ranks) + _RESERVED):
        if i not in taken:
            named.setdefault(i, (f"<|reserved_token_{i}|>", True))
    return {name: (i, special) for i, (name, special) in sorted(named.items())}


def _pipeline(
    ranks: dict[bytes, int], added: dict[str, tuple[int, bool]], pattern: str
) -> hf.Tokenizer:
    stand_in = {b: c for c, b in byte_alphabet().items()}
    vocab = {token.decode("latin-1").translate(stand_in): rank for token, rank in ranks.items()}
    # tiktoken joins the two neighbours whose joint string has the lowest rank, the first of equals;
    # the library, those that stand earliest in a list of pairs. Every split of a string goes into
    # the list, in the order of ranks. Among splits of one string the order does not matter, as only
    # one of them can ever be met: what stands between two boundaries that are still there has been
    # joined as it would be alone, hence in one way.
    merges = []
    for token in vocab:
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    # Special tokens are put into the vocabulary to keep their ids; no merge leads to them.
    ids = {name: i for name, (i, _) in added.items()}
    # A word that is a token is taken whole, even where merges would not lead to it.
    model = hf.models.BPE(vocab | ids, merges, ignore_merges=True)
    pipeline = hf.Tokenizer(model)
    try:
        split = hf.pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated")
    except Exception as e:  # The library raises bare Exception.
        raise InputError(f"pattern={pattern!r} is no regular expression that is known: {e}") from e
    pipeline.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [split, hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = hf.decoders.ByteLevel()
    tokens = {
        special: [
            hf.AddedToken(name, normalized=False, special=special)
            for name, (_, own) in added.items()
            if own == special
        ]
        for special in (True, False)
    }
    pipeline.add_special_tokens(tokens[True])
    pipeline.add_tokens(tokens[False])
    return pipeline


def _pieces(text: str) -> list[str]:
    """Where the published tokenizer cuts a long text."""
    pieces = []
    for start in range(0, len(text), _LONGEST_TEXT):
        part = text[start : start + _LONGEST_TEXT]
        cuts = [0]
        for run in re.finditer(r"\s+|\S+", part):
            cuts += range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN)
        pieces += [part[a:b] for a, b in zip(cuts, [*cuts[1:], len(part)], strict=True)]
    return pieces
