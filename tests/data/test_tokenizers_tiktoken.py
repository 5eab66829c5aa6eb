"""Vocabularies in tiktoken's form, against a slow merge and an independent cut into words."""

import base64
import itertools
import json
import random
import re
import sys
import unicodedata

import pytest
import tokenizers as hf

from jaxalope.data.tokenizers import TiktokenTokenizer, load_tokenizer
from jaxalope.data.tokenizers.byte_level import byte_alphabet
from jaxalope.data.tokenizers.tiktoken import KIMI_PATTERN
from jaxalope.errors import InputError

TEXTS = [
    "",
    "Hello world, it's HERE; we'LL see it'S O'Reilly",
    "HelloWorld XMLHttpRequest iPhone ABCdef Ǆa ǅx ǆ",
    "中文English混合 汉字abc 北京市 Pascal 々〇 東京です カタカナ漢字",
    "GPT4发布于2023年3月14日,共有1750亿个参数。",
    "e\u0301te\u0301 naïve ΣΑΣ привет नमस्ते שלום",
    "  two  \n\n \t tabs\r\n\r\n   end   ",
    "x=1;\n    return [1, 22, 333, 4444]!!\n\n🦌🦌 $100%  …\u00a0\u3000y",
    "[BOS]a[EOS]<|im_end|> <|reserved_token_7|> [bos]",
]
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|tool|>", 254: "[UNK]", 255: "[PAD]"}

# Unicode's script Han, as far as texts here go.
HAN = [(0x2E80, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B),
       (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAD9), (0x20000, 0x323AF)]  # fmt: skip
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def members(categories, han):
    """A class of `re` with every character of these categories."""
    is_han = set().union(*(range(a, b + 1) for a, b in HAN))
    found, out = [], []
    for i in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(i))
        if (category in categories or category[0] in categories) and (han or i not in is_han):
            found.append(i)
    for i in found:
        if out and out[-1][1] == i - 1:
            out[-1][1] = i
        else:
            out.append([i, i])
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in out)


@pytest.fixture(scope="module")
def words():
    """The published pattern for Python's `re`, its classes written out."""
    other = members({"L", "N"}, True)
    upper = members({"Lu", "Lt", "Lm", "Lo", "M"}, False)
    lower = members({"Ll", "Lm", "Lo", "M"}, False)
    suffix = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    pattern = "|".join([
        "[" + "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in HAN) + "]+",
        f"[^\\r\\n{other}]?[{upper}]*[{lower}]+{suffix}",
        f"[^\\r\\n{other}]?[{upper}]+[{lower}]*{suffix}",
        f"[{members({'N'}, True)}]{{1,3}}",
        f" ?[^{SPACES}{other}]+[\\r\\n]*",
        f"[{SPACES}]*[\\r\\n]+",
        f"[{SPACES}]+(?![^{SPACES}])",
        f"[{SPACES}]+",
    ])  # fmt: skip
    return re.compile(pattern)


def merge(word, ranks):
    """tiktoken's rule, as it is told: join the neighbours of lowest joint rank, first of equals."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [ranks.get(a + b) for a, b in itertools.pairwise(parts)]
        known = [rank for rank in joined if rank is not None]
        if not known:
            return [ranks[part] for part in parts]
        at = joined.index(min(known))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def encode(text, ranks, words, special):
    out = []
    for place, part in enumerate(re.split("(" + "|".join(map(re.escape, special)) + ")", text)):
        if place % 2:
            out.append(special[part])
        else:
            found = words.findall(part)
            assert "".join(found) == part
            out += [i for word in found for i in merge(word.encode(), ranks)]
    return out


def published(ranks):
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in ranks.items())


def config(first, names=NAMES):
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {
        str(first + i): {"content": name, **flags, "special": name != "<|tool|>"}
        for i, name in names.items()
    }
    roles = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    auto = {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}
    return {"added_tokens_decoder": added, "auto_map": auto, **roles,
            "tokenizer_class": "TikTokenTokenizer"}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    """A vocabulary that was trained, as published ones are."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(KIMI_PATTERN), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = byte_alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS[:-1], "the hare and the antelope"] * 5, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(alphabet[c] for c in token): rank for token, rank in vocab}


@pytest.fixture
def directory(tmp_path, ranks):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tiktoken.model").write_bytes(published(ranks))
    (tmp_path / "there" / "tokenizer_config.json").write_text(json.dumps(config(len(ranks))))
    (tmp_path / "there" / "tokenization_kimi.py").write_text("raise RuntimeError('never run')\n")
    return tmp_path / "there"


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_is_tiktokens(directory, ranks, words, text):
    tokenizer = load_tokenizer(directory)
    first = len(ranks)
    special = {f"<|reserved_token_{first + i}|>": first + i for i in range(256)}
    special = {name: i for name, i in special.items() if i - first not in NAMES}
    special |= {name: first + i for i, name in NAMES.items()}
    ids = tokenizer.encode(text)
    assert ids == encode(text, ranks, words, special)
    assert max(ids, default=0) < tokenizer.vocab_size == first + 256
    plain = text.replace("[BOS]", "").replace("[EOS]", "").replace("<|im_end|>", "")
    assert tokenizer.decode(ids) == plain and tokenizer.decode_bytes(ids) == plain.encode()


def test_long_words_are_merged_more_than_once(directory, ranks, words):
    """The texts are no trivial ones: many tokens, and many of several bytes."""
    tokens = [i for text in TEXTS for i in load_tokenizer(directory).encode(text)]
    lengths = {i: len(token) for token, i in ranks.items()}
    assert sum(lengths.get(i, 0) > 2 for i in tokens) > 50


@pytest.mark.parametrize("seed", range(6))
def test_any_ranks_whatever_their_order(seed):
    """Also strings that no merge leads to, or several would, and longer ones before their parts."""
    rng = random.Random(seed)
    ranks = {bytes([b]): b for b in range(256)}
    strings = sorted({"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(60)})
    rng.shuffle(strings)
    ranks |= {s.encode(): 256 + i for i, s in enumerate(strings)}
    tokenizer = TiktokenTokenizer(published(ranks))
    for _ in range(200):
        word = "".join(rng.choices("ab", k=rng.randint(1, 30)))
        assert tokenizer.encode(word) == merge(word.encode(), ranks), word


def test_very_long_runs_are_cut_where_the_published_tokenizer_cuts_them(directory, ranks, words):
    tokenizer = load_tokenizer(directory)
    two = next(t for t in ranks if len(t) == 2 and t.isalpha() and t.isascii()).decode()
    run, space = (two + "1") * 17_000, " \n" * 12_501  # 51,000 and 25,002 characters
    pieces = ["x " + run[:25_000], run[25_000:50_000], run[50_000:] + space[:25_000], "  \n1"]
    text = "x " + run + space[:25_000] + "  \n1"
    assert text == "".join(pieces)
    expected = [i for piece in pieces for i in encode(piece, ranks, words, {"[BOS]": 0})]
    assert tokenizer.encode(text) == expected
    # The cuts can be seen: through a word, for one.
    assert expected != encode(text, ranks, words, {"[BOS]": 0})


def test_special_tokens_and_the_bytes_of_tokens(directory, ranks):
    tokenizer, first = load_tokenizer(directory), len(ranks)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (first, first + 1, first + 255)
    assert tokenizer.special_names["unk_token"] == "[UNK]" and not tokenizer.add_bos
    table = tokenizer.token_bytes()
    assert table[:first] == list(ranks)
    # What is added without being special is text.
    assert [i for i, b in enumerate(table[first:]) if b is not None] == [3]
    assert tokenizer.decode([first, first + 3]) == "<|tool|>"


def test_it_comes_back_with_all_that_was_beside_it(directory, tmp_path):
    tokenizer = load_tokenizer(directory)
    tokenizer.save(tmp_path / "saved")
    back = load_tokenizer(tmp_path / "saved")
    assert type(back) is TiktokenTokenizer and back.fingerprint == tokenizer.fingerprint
    assert back.files() == {p.name: p.read_bytes() for p in directory.iterdir()}
    assert load_tokenizer(directory / "tiktoken.model").fingerprint == tokenizer.fingerprint


def test_another_pattern_is_kept(ranks, tmp_path):
    tokenizer = TiktokenTokenizer(published(ranks), pattern=r"\S+|\s+")
    assert tokenizer.fingerprint != TiktokenTokenizer(published(ranks)).fingerprint
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    text = "it's中文 ok"
    expected = [i for word in re.findall(r"\S+|\s+", text) for i in merge(word.encode(), ranks)]
    assert load_tokenizer(tmp_path).encode(text) == expected


def files(ranks, content=None, **changes):
    return {
        "tiktoken.model": published(ranks) if content is None else content,
        "tokenizer_config.json": json.dumps({**config(len(ranks)), **changes}).encode(),
    }


BAD = {
    "a line that is none": (lambda r: files(r, published(r) + b"what?\n"), "line 421"),
    "no base64": (lambda r: files(r, published(r) + b"YQ=== 999\n"), "line 421"),
    "a repeated rank": (lambda r: files(r, published(r) + b"enp6enp6eg== 3\n"), "line 421 repeats"),
    "half a file": (lambda r: files(r, published(r)[:900]), "single bytes have no rank|line"),
    "an id that is taken": (
        lambda r: files(r, added_tokens_decoder={"5": {"content": "[X]", "special": True}}),
        "'\\[X\\]' is added as id 5",
    ),
    "another model's": (lambda r: files(r, tokenizer_class="QWenTokenizer"), "QWenTokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case, ranks, tmp_path):
    make, words = BAD[case]
    for name, content in make(ranks).items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_tokenizer(tmp_path)


def test_ranks_under_another_name_need_a_pattern(ranks, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(published(ranks))
    with pytest.raises(InputError, match="pattern="):
        load_tokenizer(tmp_path)
