import io
import itertools
import json

import pytest
import tokenizers as hf

from jaxalope.data.tokenizers import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)
from jaxalope.errors import InputError

TEXTS = ["", "def f(x):\n\treturn x + 1\n", "naïve café — 野うさぎ 🦌", " leading and  double "]
CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "the hare and the antelope ran away together\n",
] * 20


def byte_level_bpe():
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        hf.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<|padding|>"],
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_model():
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    return model.getvalue()


@pytest.fixture(params=["bytes", "json", "sentencepiece"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "json":
        return JsonTokenizer(byte_level_bpe().to_str())
    return SentencePieceTokenizer(request.getfixturevalue("sentencepiece_model"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_bytes_of_a_prefix_begin_the_bytes_of_the_text(tokenizer):
    # What streaming needs: more tokens only ever add bytes, even inside a code point.
    ids = tokenizer.encode("🦌 x")
    prefixes = [tokenizer.decode_bytes(ids[:n]) for n in range(len(ids) + 1)]
    assert all(b.startswith(a) for a, b in itertools.pairwise(prefixes))
    assert b"\xf0" in prefixes[1:]  # The deer arrives a byte at a time.


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "there")
    back = load_tokenizer(tmp_path / "there")
    assert type(back) is type(tokenizer)
    names = ("vocab_size", "bos_id", "eos_id", "pad_id", "fingerprint")
    assert [getattr(back, n) for n in names] == [getattr(tokenizer, n) for n in names]
    assert back.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_of_a_text_are_its_bytes(tokenizer, text):
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size
    assert b"".join(table[i] for i in tokenizer.encode(text)) == text.encode()
    assert {bytes([b]) for b in range(256)} <= set(table)
    assert table[tokenizer.eos_id] is None and table[tokenizer.pad_id] is None


@pytest.mark.parametrize("wrong", [-1, 100_000])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, wrong):
    ids = [*tokenizer.encode("ok"), wrong]
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(InputError, match=f"token id {wrong} at position {len(ids) - 1}"):
            decode(ids)


def test_special_tokens_have_no_text(tokenizer):
    ids = [i for i in (tokenizer.eos_id, tokenizer.pad_id) if i is not None]
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "" and tokenizer.decode_bytes(ids) == b""


def test_json_special_tokens_by_their_usual_names_or_by_the_config_beside(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_level_bpe().to_str())
    usual = load_tokenizer(path)
    assert (usual.bos_id, usual.eos_id, usual.pad_id) == (None, 0, 1)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|padding|>"}})
    )
    told = load_tokenizer(tmp_path)
    assert (told.bos_id, told.eos_id, told.pad_id) == (0, 1, 1)
    told.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 1


def test_json_settings_of_a_training_batch_do_not_cut_or_pad(tmp_path):
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    assert ours.decode(ours.encode(TEXTS[1])) == TEXTS[1]
    assert len(ours.encode("a")) == 1


def pieces(decoder, vocab, **model):
    """A `tokenizer.json` that only says what its tokens are."""
    spec = json.loads(hf.Tokenizer(hf.models.BPE()).to_str())
    spec["model"] |= {"vocab": {token: i for i, token in enumerate(vocab)}, **model}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec["added_tokens"] = [
        {"id": 0, "content": vocab[0], "special": True, **added},
        {"id": 1, "content": vocab[1], "special": False, **added},
    ]
    return JsonTokenizer(json.dumps({**spec, "decoder": decoder}))


MARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
FALLBACK = {
    "type": "Sequence",
    "decoders": [MARK, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@pytest.mark.parametrize("decoder", [FALLBACK, METASPACE])
def test_token_bytes_of_pieces_with_a_mark(decoder):
    vocab = ["</s>", "▁added", "<unk>", "▁the▁", "é", "<0xC3>"]
    tokenizer = pieces(decoder, vocab, unk_token="<unk>")
    byte = b"\xc3" if decoder is FALLBACK else b"<0xC3>"
    expected = [None, "▁added".encode(), None, b" the ", "é".encode(), byte]
    assert tokenizer.token_bytes() == expected


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [STRIP]},
    ],
)
def test_token_bytes_that_depend_on_neighbours_are_refused(decoder):
    with pytest.raises(InputError, match=r"from the token alone.*(None|WordPiece|Strip)"):
        pieces(decoder, ["</s>", "b", "c"]).token_bytes()


def test_token_bytes_of_a_gap_are_none():
    spec = json.loads(byte_level_bpe().to_str())
    spec["model"]["vocab"]["Ġgap"] = 1000
    table = JsonTokenizer(json.dumps(spec)).token_bytes()
    assert table[1000] == b" gap" and table[999] is None and len(table) == 1001


def test_json_vocabulary_with_a_gap_is_as_long_as_its_highest_id():
    spec = json.loads(byte_level_bpe().to_str())
    spec["model"]["vocab"]["Ġgap"] = 1000
    assert JsonTokenizer(json.dumps(spec)).vocab_size == 1001


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "empty", "none"]
)
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path, name):
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "none":
        (tmp_path / name).write_text("not a tokenizer")
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path / name)
