"""What is published beside a vocabulary travels with it, byte for byte."""

import io
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

TEXT = "def f(x): return 'naïve 野うさぎ 🦌'\n"
# Spacing and order that no JSON library would write by itself.
CONFIG = b'{"bos_token":  "<s>",\r\n "eos_token": {"content": "</s>"}, "add_bos_token": true}'
BESIDE = {
    "tokenizer_config.json": CONFIG,
    "special_tokens_map.json": b'{"pad_token": "<pad>", "bos_token": "never read"}\n',
    "added_tokens.json": b'{"</s>": 1}',
    "chat_template.jinja": "{{ messages }}\r\n{# é #}".encode(),
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "tokenization_own.py": b"raise RuntimeError\r\n",
}
OTHERS = {"config.json": b"{}", "model.safetensors": b"?", "README.md": b"#"}


def json_tokenizer():
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT] * 3,
        hf.trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def sentencepiece_model(**settings):
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5), model_writer=model, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, pad_id=0, unk_id=3, bos_id=2,
        eos_id=1, **settings,
    )  # fmt: skip
    return model.getvalue()


def write(directory, files):
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


@pytest.fixture(params=["tokenizer.json", "tokenizer.model", "both"])
def published(request):
    files = dict(BESIDE)
    if request.param != "tokenizer.model":
        # As many publishers write it: no spaces, another line end.
        files["tokenizer.json"] = json_tokenizer().to_str().encode() + b"\r\n"
    if request.param != "tokenizer.json":
        files["tokenizer.model"] = sentencepiece_model()
    return files


def test_a_published_directory_comes_back_from_a_workdir_byte_for_byte(published, tmp_path):
    first = load_tokenizer(write(tmp_path / "hub", {**published, **OTHERS}))
    first.save(tmp_path / "workdir")
    again = load_tokenizer(tmp_path / "workdir")
    assert type(again) is type(first) and again.fingerprint == first.fingerprint
    assert again.files() == first.files() == published
    written = load_tokenizer(write(tmp_path / "hub2", again.files()))
    assert written.fingerprint == first.fingerprint and written.files() == published
    assert type(first) is (
        JsonTokenizer if "tokenizer.json" in published else SentencePieceTokenizer
    )


def test_what_lies_beside_says_how_tokens_are_called(published, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, published))
    expected = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert tokenizer.special_names == expected
    assert tokenizer.add_bos
    assert tokenizer.chat_templates == {
        "default": BESIDE["chat_template.jinja"].decode(),
        "tool_use": "{{ tools }}",
    }
    assert tokenizer.encode_marked("<s>" + TEXT) == [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert tokenizer.bos_id not in tokenizer.encode(TEXT)


def test_a_file_takes_along_what_is_beside_it_but_no_other_vocabulary(tmp_path):
    files = {**BESIDE, "tokenizer.json": json_tokenizer().to_str().encode(), "merges.txt": b"x"}
    tokenizer = load_tokenizer(write(tmp_path, files) / "tokenizer.json")
    del files["merges.txt"]
    assert tokenizer.files() == files


def begins(tokenizer):
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("config", "file_begins", "expected"),
    [
        ({"add_bos_token": True}, False, True),
        ({"add_bos_token": False}, True, False),
        ({}, True, True),
        ({}, False, False),
        (None, True, True),
        ({"add_bos_token": True, "bos_token": None}, True, False),
    ],
)
def test_whether_texts_begin_with_bos(config, file_begins, expected, tmp_path):
    tokenizer = json_tokenizer()
    files = {"tokenizer.json": (begins(tokenizer) if file_begins else tokenizer).to_str().encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    assert load_tokenizer(write(tmp_path, files)).add_bos is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"tokenizer_class": "GemmaTokenizer"}, True), ({"tokenizer_class": "T5Tokenizer"}, False),
     ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False), ({}, False)],
)  # fmt: skip
def test_whether_sentencepiece_texts_begin_with_bos(config, expected, tmp_path):
    files = {"tokenizer.model": sentencepiece_model()}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    assert load_tokenizer(write(tmp_path, files)).add_bos is expected


def test_a_token_that_is_said_to_be_none_is_none(tmp_path):
    files = {"tokenizer.json": json_tokenizer().to_str().encode()}
    files["tokenizer_config.json"] = b'{"pad_token": null}'
    tokenizer = load_tokenizer(write(tmp_path, files))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, None)
    assert "pad_token" not in tokenizer.special_names


def test_templates_in_the_configuration(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    for i, (value, expected) in enumerate(
        [("x", {"default": "x"}), (named, {"default": "a", "rag": "b"}), (None, {})]
    ):
        files = {"tokenizer.json": json_tokenizer().to_str().encode()}
        files["tokenizer_config.json"] = json.dumps({"chat_template": value}).encode()
        assert load_tokenizer(write(tmp_path / str(i), files)).chat_templates == expected
    files["tokenizer_config.json"] = b'{"chat_template": 3}'
    with pytest.raises(InputError, match="chat_template='3'"):
        _ = load_tokenizer(write(tmp_path / "bad", files)).chat_templates


def test_special_tokens_that_only_we_know_are_published_too(tmp_path):
    special = {"bos_id": 0, "eos_id": 1, "pad_id": None}
    tokenizer = JsonTokenizer(json_tokenizer().to_str(), special)
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["eos_token"] == "</s>"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").files() == tokenizer.files()
    assert load_tokenizer(write(tmp_path / "out", tokenizer.files())).bos_id == 0


def test_bytes_in_published_form_encode_alike_and_come_back(tmp_path):
    template = {"chat_template.jinja": b"{{ bos_token }}"}
    ours = ByteTokenizer()
    directory = write(tmp_path / "out", {**ours.files(), **template})
    theirs = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in ("", TEXT, "\x00\x7f ", "a" * 5000):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == ours.encode(text) and theirs.decode(ids) == text
    cut = [*TEXT.encode()[:27], 257, 300, 200]
    assert theirs.decode(cut) == ours.decode(cut)

    back = load_tokenizer(directory)
    assert type(back) is ByteTokenizer and back.fingerprint == ours.fingerprint
    assert back.files() == {**ours.files(), **template}
    back.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").files() == back.files()
    assert back.encode_marked("<|bos|>é<|eos|>") == [257, 0xC3, 0xA9, 258]
    assert 258 not in back.encode("<|eos|>")


def test_sentencepiece_reads_control_tokens_by_name_in_chats_only():
    tokenizer = SentencePieceTokenizer(sentencepiece_model(user_defined_symbols=["<turn>"]))
    turn = tokenizer.encode("<turn>")
    assert len(turn) == 1
    marked = tokenizer.encode_marked("<s><turn>def f(x)</s>")
    assert marked == [2, *turn, *tokenizer.encode("def f(x)"), 1]
    assert not {1, 2} & set(tokenizer.encode("<s><turn>def f(x)</s>"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", b"[]", "tokenizer_config.json must hold a JSON object"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json is not UTF-8"),
        ("added_tokens.json", b'{"<im_start>": 900}', "'<im_start>' is added .* as id 900"),
    ],
)
def test_files_that_cannot_be_used_are_named(name, content, words, tmp_path):
    files = {"tokenizer.model": sentencepiece_model(), name: content}
    with pytest.raises(InputError, match=words):
        load_tokenizer(write(tmp_path, files))


def test_a_saved_tokenizer_without_its_vocabulary(tmp_path):
    JsonTokenizer(json_tokenizer().to_str()).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"speaks of a tokenizer.json"):
        load_tokenizer(tmp_path)
