"""What is read and not learnt: prompts and conversations, from records to rows with weights."""

import json

import numpy as np
import pytest

from jaxalope.data.chat import encode_answer
from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.data.pipeline import Pipeline, eval_batches
from jaxalope.data.tokenizers import ByteTokenizer, Published
from jaxalope.errors import InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
PAIRS = [("ab", "xyz"), ("", "long answer"), ("c", ""), ("dd", "q")]


def tokenizer(template=TEMPLATE):
    return ByteTokenizer(Published({"chat_template.jinja": template.encode()}))


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def written(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def read(source, steps=1, tokens=None, **more):
    """Rows `(text learnt in capitals, the rest in brackets)` of a few batches."""
    settings = {"sequence_length": 24, "batch_size": 1, "shuffle": False, "holdout_fraction": 0}
    config = DataConfig(**{**settings, "sources": (source,), "packing": "single", **more})
    with Pipeline(config, tokens or tokenizer()) as pipeline:
        return [next(pipeline) for _ in range(steps)]


def learnt_and_read(batch):
    ids, weights, segments = (batch[k][0] for k in ("tokens", "loss_weights", "segment_ids"))
    assert weights.dtype == np.float32 and set(weights) <= {0.0, 1.0}
    assert (weights[segments == 0] == 0).all()
    return ids[weights == 1].tolist(), ids[(weights == 0) & (segments > 0)].tolist()


def test_prompts_and_answers_in_fields_of_their_own(tmp_path):
    records = [{"question": p, "answer": a} for p, a in PAIRS]
    source = SourceConfig(written(tmp_path / "p.jsonl", records), field="answer", prompt="question")
    for add_bos in (False, True):
        begin = [257] if add_bos else []
        found = [learnt_and_read(b) for b in read(source, 3, add_bos=add_bos)]
        assert found == [
            ([*b"xyz", 258], [*begin, *b"ab"]),
            ([*begin, *b"long answer", 258], []),  # All of a text is learnt that has no prompt.
            ([*b"q", 258], [*begin, *b"dd"]),  # No answer, no document.
        ]


def test_parquet_has_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chats = [[user("u"), answer("v")], [user("w"), answer("x"), user("y"), answer("z")]]
    table = {"p": [p for p, _ in PAIRS[:2]], "a": [a for _, a in PAIRS[:2]], "m": chats}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    records = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    lines = written(tmp_path / "t.jsonl", records)
    for fields in ({"field": "a", "prompt": "p"}, {"field": "m", "chat": True}):
        if "chat" in fields:
            pytest.importorskip("jinja2")
        ours, theirs = (
            [learnt_and_read(b) for b in read(SourceConfig(str(path), **fields), 2)]
            for path in (tmp_path / "t.parquet", lines)
        )
        assert ours == theirs
    with pytest.raises(InputError, match="no column 'q'"):
        read(SourceConfig(str(tmp_path / "t.parquet"), field="a", prompt="q"))


def test_the_last_message_is_learnt(tmp_path):
    pytest.importorskip("jinja2")
    chats = [[user("hi"), answer("ho")], [user("a"), answer("b"), user("c"), answer("d")]]
    path = written(tmp_path / "c.jsonl", [{"messages": m} for m in chats])
    source = SourceConfig(path, field="messages", chat=True)
    assert [learnt_and_read(b) for b in read(source, 2)] == [
        ([*b"ho;", 258], [257, *b"[u]hi;[a]"]),
        ([*b"d;", 258], [257, *b"[u]a;[a]b;[u]c;[a]"]),
    ]
    # What a sampler is given is what was read; and a template may end the text itself.
    ended = tokenizer(TEMPLATE.replace("};{%", "}{{ eos_token }}{%"))
    assert encode_answer(ended, chats[0]) == ([257, *b"[u]hi", 258, *b"[a]"], [*b"ho", 258])
    assert learnt_and_read(read(source, 1, ended)[0])[0] == [*b"ho", 258]


def test_plain_sources_beside_are_learnt_whole(tmp_path):
    pairs = written(tmp_path / "p.jsonl", [{"q": "ab", "a": "xyz"}])
    plain = written(tmp_path / "t.jsonl", [{"text": "plain"}])
    sources = (SourceConfig(pairs, field="a", prompt="q"), SourceConfig(plain))
    made = read(None, 6, sources=sources)
    assert {tuple(learnt_and_read(b)[0]) for b in made} == {
        (*b"xyz", 258),
        (*b"plain", 258),
    }
    (only,) = read(SourceConfig(plain))
    assert "loss_weights" not in only


@pytest.mark.parametrize("packing", ["single", "first_fit", "concat"])
def test_weights_stay_with_their_tokens_and_resume(tmp_path, packing):
    """Prompts are lower case, answers upper: also where a document is cut in two."""
    rng = np.random.default_rng(0)
    records = [
        {"q": "".join(rng.choice(list("abc"), rng.integers(1, 9))), "a": "X" * rng.integers(1, 20)}
        for _ in range(30)
    ]
    source = SourceConfig(written(tmp_path / "p.jsonl", records), field="a", prompt="q")
    config = DataConfig(
        sequence_length=12, batch_size=4, sources=(source,), packing=packing, holdout_fraction=0.2
    )
    with Pipeline(config, tokenizer()) as pipeline:
        batches = [next(pipeline) for _ in range(4)]
        state = json.loads(json.dumps(pipeline.state()))
        expected = next(pipeline)
    with Pipeline(config, tokenizer()) as again:
        again.restore(state)
        resumed = next(again)
    for key, value in expected.items():
        np.testing.assert_array_equal(resumed[key], value)
    held_out = list(eval_batches(config, tokenizer()))
    for batch in [*batches, *held_out]:
        learnt = np.isin(batch["tokens"], [ord("X"), 258]) & (batch["segment_ids"] > 0)
        np.testing.assert_array_equal(batch["loss_weights"], learnt)
    if packing == "single":
        assert all(b["segment_ids"].max() == 1 for b in batches)
        assert all((b["positions"][b["segment_ids"] > 0] < 12).all() for b in batches)


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ({"m": "text"}, {"field": "m", "chat": True}, "no list of messages"),
        ({"x": []}, {"field": "m", "chat": True}, "no field 'm'"),
        ({"m": [user("u")]}, {"field": "m", "chat": True}, r"c.jsonl:1: .*ends with the answer"),
        ({"m": [user("u"), user("v")]}, {"field": "m", "chat": True}, "ends with the answer"),
        ({"a": "x"}, {"field": "a", "prompt": "p"}, "no field 'p'"),
    ],
)
def test_records_that_hold_no_answer(tmp_path, record, fields, named):
    path = written(tmp_path / "c.jsonl", [record])
    with pytest.raises(InputError, match=named):
        read(SourceConfig(path, **fields))


def test_sources_and_templates_that_cannot_say_what_is_learnt(tmp_path):
    with pytest.raises(InputError, match="chat=True"):
        SourceConfig("x", field="m", chat=True, prompt="p")
    with pytest.raises(InputError, match="has no fields"):
        read(SourceConfig("stdlib", prompt="p"))
    pytest.importorskip("jinja2")
    with pytest.raises(InputError, match="does not begin with"):
        encode_answer(tokenizer("{{ messages | length }}"), [user("u"), answer("v")])
