import json
import subprocess
import sys

import pytest
from absl import flags

from jaxalope.data.config import SourceConfig
from jaxalope.data.readers import open_source
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.data.train_tokenizer import main, train
from jaxalope.errors import InputError


@pytest.fixture
def corpus(tmp_path):
    lines = [json.dumps({"body": f"the hare number {i} outran the antelope\n"}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return SourceConfig(path=str(tmp_path / "a.jsonl"), field="body")


def test_trained_tokenizer_is_lossless_and_shorter_than_bytes(corpus):
    tokenizer = train([open_source(corpus)], 300)
    assert tokenizer.vocab_size == 300
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    for text in ("the hare outran the antelope", "naïve 🦌\n\t x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the antelope")) < 8
    assert train([open_source(corpus)], 300).fingerprint == tokenizer.fingerprint
    fewer = train([open_source(corpus)], 300, max_documents=3)
    assert fewer.fingerprint != tokenizer.fingerprint


def test_room_for_the_bytes(corpus):
    with pytest.raises(InputError, match="vocab_size=258"):
        train([open_source(corpus)], 258)


def test_command(corpus, tmp_path):
    command = [sys.executable, "-m", "jaxalope.data.train_tokenizer", f"--source={corpus.path}"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--field=body", "--vocab_size=280", f"--output={out}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "280 ids from 190 documents" in done.stdout
    assert load_tokenizer(out).vocab_size == 280
    done = subprocess.run([*command, f"--output={out}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: a.jsonl:1 has no field 'text'")


@pytest.fixture
def command(capsys):
    """``command(*args) -> (exit status, stdout, stderr)``, in this process."""

    def run(*args):
        for name in ("source", "field", "output"):
            flags.FLAGS[name].unparse()
        status = main(flags.FLAGS(["train_tokenizer", "--vocab_size=280", *args]))
        return status, *capsys.readouterr()

    return run


def test_a_corpus_without_text_is_one_line(tmp_path, command, corpus):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"body": ""}\n' * 40)
    status, _, err = command(f"--source={empty}", "--field=body", f"--output={tmp_path / 'out'}")
    assert status == 2 and err.count("\n") == 1
    assert f"--source={empty}: every document there is empty" in err
    assert not (tmp_path / "out").exists()
    # An empty one beside one with text is no mistake.
    sources = (f"--source={empty}", f"--source={corpus.path}")
    status, out, _ = command(*sources, "--field=body", f"--output={tmp_path / 'out'}")
    assert status == 0 and "bytes per token" in out


def test_an_output_that_cannot_be_made_is_one_line(tmp_path, command, corpus):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    status, _, err = command(f"--source={corpus.path}", "--field=body", f"--output={output}")
    assert status == 2 and err.count("\n") == 1
    assert f"--output={output} cannot be written" in err and "Name another" in err
