import dataclasses
import itertools
import json
import pathlib
import re
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from jaxalope.data import streams
from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.data.pipeline import Pipeline, eval_batches, merge_states
from jaxalope.data.streams import source_of_rows
from jaxalope.data.tokenizers import ByteTokenizer
from jaxalope.errors import InputError

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora of different size; documents begin with a letter that tells the corpus."""
    root = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)

    def texts(letter, count):
        return [letter + f"{i:04d}" + "x" * int(rng.integers(0, 60)) for i in range(count)]

    for letter, count in (("a", 40), ("b", 25), ("c", 2)):
        lines = [json.dumps({"text": t}) for t in texts(letter, count)]
        (root / f"{letter}.jsonl").write_text("\n".join(lines))
    return {x: SourceConfig(path=str(root / f"{x}.jsonl")) for x in "abc"}


@pytest.fixture
def config(corpora):
    mixed = (corpora["a"], dataclasses.replace(corpora["b"], weight=0.5))
    return DataConfig(
        sequence_length=32, batch_size=8, num_streams=4, sources=mixed, holdout_fraction=0.1
    )


def take(config, count, state=None, **kwargs):
    """`count` batches from `state` on, and the state after each."""
    with Pipeline(config, TOKENIZER, **kwargs) as pipeline:
        if state is not None:
            pipeline.restore(state)
        made = []
        for _ in range(count):
            batch = next(pipeline)
            made.append((batch, pipeline.state()))
        return made


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours.keys() == theirs.keys() == {"tokens", "segment_ids", "positions"}
        for key in ours:
            assert ours[key].dtype == np.int32
            assert np.array_equal(ours[key], theirs[key]), key


def test_batches_have_the_promised_shape(config):
    (batch, state), *_ = take(config, 1)
    assert all(v.shape == (8, 32) and v.dtype == np.int32 for v in batch.values())
    assert (batch["tokens"] < TOKENIZER.vocab_size).all()
    assert (batch["segment_ids"] >= 1).all()  # concat wastes nothing
    for row in range(8):
        starts = np.flatnonzero(np.diff(batch["segment_ids"][row], prepend=0))
        assert (batch["positions"][row][starts] == 0).all()
        ends = starts[1:] - 1
        assert (batch["tokens"][row][ends] == TOKENIZER.eos_id).all()
    assert json.loads(json.dumps(state)) == state


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_after_any_step_gives_the_same_batches(config, packing, prefetch):
    # 12 steps of 8 rows of 32 tokens: the 40 + 25 documents of some 35 tokens pass more than once.
    config = dataclasses.replace(config, packing=packing, prefetch_batches=prefetch)
    straight = take(config, 24)
    batches = [b for b, _ in straight]
    indices = [s[0]["documents"]["next_index"] for s in straight[-1][1]["streams"].values()]
    assert max(indices) * 4 > 40, "the test has to cross the end of an epoch"
    for n in (0, 1, 2, 7, 15, 20):
        state = straight[n][1]
        assert state["step"] == n + 1
        resumed = take(config, 3, json.loads(json.dumps(state)))
        assert_same([b for b, _ in resumed], batches[n + 1 : n + 4])


# Eight rows of four streams, as they may be dealt to processes: in blocks of neighbours or not, and
# to some that split the model between them, and so feed the same rows.
DEALS = [
    [[range(0, 4)], [range(4, 8)]],
    [[range(0, 2), range(6, 8)], [range(2, 6)]],
    [[range(0, 2), range(4, 6)]] * 2 + [[range(2, 4), range(6, 8)]] * 2,
    [[range(2 * i, 2 * i + 2)] for i in (3, 1, 0, 2)],
    [None],
]


def put_together(parts, deal):
    """The global batch of the parts that processes have of it."""
    whole = {k: np.full((8, *v.shape[1:]), -1, v.dtype) for k, v in parts[0].items()}
    for part, rows in zip(parts, deal, strict=True):
        numbers = list(range(8) if rows is None else itertools.chain(*rows))
        for name, values in part.items():
            whole[name][numbers] = values
    return whole


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_batches_do_not_depend_on_which_process_has_which_rows(config, packing):
    config = dataclasses.replace(config, packing=packing)
    expected = [b for b, _ in take(config, 3 * len(DEALS))]
    state, made = None, []
    for deal in DEALS:  # The machines change on the way.
        parts = [take(config, 3, state, rows=rows) for rows in deal]
        made += [put_together([p[s][0] for p in parts], deal) for s in range(3)]
        state = merge_states([p[-1][1] for p in parts])
    assert_same(made, expected)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_fewer_documents_than_streams(corpora, packing):
    config = DataConfig(
        sequence_length=16,
        batch_size=8,
        sources=(corpora["c"],),
        holdout_fraction=0.0,
        packing=packing,
    )
    assert config.streams == 8
    straight = take(config, 6)
    assert_same([b for b, _ in take(config, 3, straight[2][1])], [b for b, _ in straight[3:]])
    text = b"".join(TOKENIZER.decode_bytes(b["tokens"].ravel()) for b, _ in straight)
    assert b"c0000" in text and b"c0001" in text


def test_streams_share_an_epoch_without_overlap(corpora):
    config = DataConfig(
        sequence_length=64,
        batch_size=4,
        sources=(corpora["a"],),
        holdout_fraction=0.0,
    )
    with Pipeline(config, TOKENIZER) as pipeline:
        seen = [[] for _ in range(4)]
        for _ in range(40):
            next(pipeline)
            for row, pieces in enumerate(pipeline._pieces[pipeline.step - 1]):
                seen[row] += [name for name, offset in pieces if offset == 0]
    first_epoch = [name for stream in seen for name in stream[:10]]  # 40 documents, 4 streams
    assert len(set(first_epoch)) == 40
    second_epoch = [name for stream in seen for name in stream[10:20]]
    assert len(set(second_epoch)) == 40
    assert first_epoch != second_epoch


def test_order_depends_on_the_seed_and_on_shuffle(config):
    first = take(config, 1)[0][0]["tokens"]
    assert not np.array_equal(first, take(dataclasses.replace(config, seed=1), 1)[0][0]["tokens"])
    ordered = dataclasses.replace(config, shuffle=False, holdout_fraction=0.0)
    text = TOKENIZER.decode(take(ordered, 1)[0][0]["tokens"][:, :5].ravel())
    assert "a0000" in text and "a0001" in text and "a0002" in text


def test_weights_are_shares_of_rows_in_every_batch(config):
    config = dataclasses.replace(config, batch_size=32, num_streams=None)
    for batch, _ in take(config, 6):
        letters = []
        with_start = batch["positions"] == 0
        for row in range(32):
            text = TOKENIZER.decode(batch["tokens"][row][np.argmax(with_start[row][1:]) + 1 :])
            letters.append("b" if "b0" in text else "a" if "a0" in text else "?")
        assert abs(letters.count("b") - 32 / 3) <= 3 + letters.count("?")


@pytest.mark.parametrize("weights", [[1.0], [2, 1], [0.7, 0.2, 0.1], [5, 0, 3]])
@pytest.mark.parametrize("start", [0, 10**9])
def test_source_of_rows_is_even(weights, start):
    rows = start + np.arange(4000)
    chosen = source_of_rows(weights, rows)
    share = np.array(weights) / np.sum(weights)
    counts = np.bincount(chosen, minlength=len(weights))
    assert np.abs(counts / 4000 - share).max() < 2e-3
    for batch in np.split(chosen, 125):
        assert np.abs(np.bincount(batch, minlength=len(weights)) - 32 * share).max() < 3
    # A row's number in the batch decides nothing: every stream reads every source.
    assert set(chosen[::32]) == {i for i, w in enumerate(weights) if w}


def test_bos_begins_documents_when_asked(config):
    config = dataclasses.replace(config, add_bos=True, packing="first_fit")
    batch = take(config, 1)[0][0]
    starts = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
    whole = starts & (batch["tokens"] == TOKENIZER.bos_id)
    assert whole.sum() > starts.sum() / 3
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = None
    with pytest.raises(InputError, match="add_bos=True"):
        Pipeline(config, tokenizer)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_documents_in_whole_chunks(config, packing):
    """Filled up behind their end with padding that is theirs, so that no chunk has two of them."""
    config = dataclasses.replace(config, align=4, packing=packing)
    (batch, state), *_ = take(config, 3)
    chunks = {name: x.reshape(8, -1, 4) for name, x in batch.items()}
    assert (chunks["segment_ids"] == chunks["segment_ids"][..., :1]).all()
    filled = (batch["tokens"] == TOKENIZER.pad_id) & (batch["segment_ids"] > 0)
    ends = chunks["tokens"] == TOKENIZER.eos_id
    assert filled.any() and ends.any()
    # Behind a document's end there is nothing else, and before it none of this.
    behind = np.cumsum(ends, axis=-1) - ends > 0
    held = chunks["segment_ids"] > 0
    np.testing.assert_array_equal(filled.reshape(behind.shape), behind & held)
    with pytest.raises(InputError, match="align: 4 there, 1 here"):
        take(dataclasses.replace(config, align=1), 1, state)
    with pytest.raises(InputError, match="align=5 cannot be used: it has to divide"):
        dataclasses.replace(config, align=5)


def test_state_is_refused_by_another_run(config, corpora, tmp_path):
    (_, state), *_ = take(config, 1)
    with pytest.raises(InputError, match=r"seed: 0 there, 5 here"):
        take(dataclasses.replace(config, seed=5), 1, state)
    with pytest.raises(InputError, match="sources: "):
        take(dataclasses.replace(config, sources=(corpora["a"],)), 1, state)
    tokenizer = ByteTokenizer()
    tokenizer.fingerprint = "other"
    with pytest.raises(InputError, match="tokenizer: "), Pipeline(config, tokenizer) as pipeline:
        pipeline.restore(state)
    ((_, part),) = take(config, 1, rows=[range(4)])
    with pytest.raises(InputError, match=r"lacks streams \[2, 3\]"):
        take(config, 1, part)
    with pytest.raises(InputError, match="not the state"):
        take(config, 1, {})
    with pytest.raises(InputError, match="cannot be merged"):
        merge_states([state, take(config, 2)[1][1]])


def test_a_corpus_that_changed_or_moved(corpora, tmp_path):
    def at(path):
        source = SourceConfig(path=str(path))
        return DataConfig(sequence_length=16, batch_size=2, sources=(source,))

    text = pathlib.Path(corpora["a"].path).read_text()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(text)
    straight = take(at(tmp_path / "one"), 3)
    moved = take(at(tmp_path / "two"), 2, straight[0][1])
    assert_same([b for b, _ in moved], [b for b, _ in straight[1:]])
    (tmp_path / "two/a.jsonl").write_text(text + '\n{"text": "more"}')
    with pytest.raises(InputError, match="cannot be continued exactly"):
        take(at(tmp_path / "two"), 1, straight[0][1])


def broken(path, line):
    """A corpus of 40 lines, the 31st of which is `line`; read in order by one stream."""
    lines = [json.dumps({"text": "x" * 40 + str(i)}) for i in range(40)]
    lines[30] = line
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    source = SourceConfig(path=str(path))
    return DataConfig(
        sequence_length=32, batch_size=2, sources=(source,), num_streams=1, shuffle=False
    )


def run_into(config):
    """The error that ends a run over `config`, and the state after its last good batch."""
    with Pipeline(config, TOKENIZER) as pipeline, pytest.raises(InputError) as error:
        while True:
            next(pipeline)
            state = pipeline.state()
    return str(error.value), state


@pytest.mark.parametrize("bad", ['{"text": "broken', '{"text": "caf\xe9"}'])
@pytest.mark.parametrize("mended", ['{"text": "mended"}', ""])
def test_a_run_goes_on_after_a_bad_line_was_mended_or_emptied(tmp_path, bad, mended):
    path = tmp_path / "a.jsonl"
    message, state = run_into(broken(path, bad))
    assert "a.jsonl" in message and "skip_bad" in message
    config = broken(path, mended)
    straight = take(config, state["step"] + 5)
    with pytest.warns(UserWarning, match=r"a\.jsonl' was edited since") as warned:
        went_on = take(config, 5, state)
    assert len(warned) == 1
    assert_same([b for b, _ in went_on], [b for b, _ in straight[-5:]])
    with warnings.catch_warnings():  # Said once: the state is of the edited corpus now.
        warnings.simplefilter("error")
        take(config, 1, went_on[0][1])


def test_an_edit_that_moves_documents_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    config = broken(path, "")
    ((_, state),) = take(config, 1)
    path.write_text(path.read_text() + '{"text": "more"}\n')
    with pytest.raises(InputError, match="documents may be edited while their number stays"):
        take(config, 1, state)
    other = dataclasses.replace(broken(path, ""), sources=(SourceConfig(str(path), field="id"),))
    with pytest.raises(InputError, match="cannot be continued exactly"):
        take(other, 1, state)


def test_states_without_a_numbering_go_by_the_number_of_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    config = broken(path, "")
    ((_, state),) = take(config, 1)
    del state["layout"]["sources"][0]["numbering"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(config, 1, state)
    broken(path, '{"text": "edited"}')
    with pytest.warns(UserWarning, match="was edited since"):
        take(config, 1, state)


def test_skip_bad_passes_over_so_many_and_may_be_set_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    config = broken(path, '{"text": "broken')
    _, state = run_into(config)
    emptied = take(broken(tmp_path / "b.jsonl", ""), state["step"] + 5)
    source = dataclasses.replace(config.sources[0], skip_bad=1)
    skipping = dataclasses.replace(config, sources=(source,))
    with pytest.warns(UserWarning, match=r"passed over, 1 of skip_bad=1: a\.jsonl:31 is not JSON"):
        went_on = take(skipping, 5, state)
    assert_same([b for b, _ in went_on], [b for b, _ in emptied[-5:]])
    lines = path.read_text().splitlines()
    lines[32] = "[]"
    path.write_text("\n".join(lines) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message, _ = run_into(skipping)
    assert "a.jsonl:33 is a list" in message and "skip_bad=1" in message
    with pytest.raises(InputError, match="skip_bad=-1"):
        SourceConfig(skip_bad=-1)


def test_rows_that_do_not_fit(config):
    with pytest.raises(
        InputError,
        match=r"num_streams=4 cannot be used: .* rows 5 to 7 of batch_size=8, and a stream fills 2 "
        r"neighbours\. Set num_streams to a multiple of 8 that divides",
    ):
        Pipeline(config, TOKENIZER, rows=[range(0, 4), range(5, 8)])
    with pytest.raises(InputError, match=r"num_streams=2 .* multiple of 4 that"):
        Pipeline(dataclasses.replace(config, num_streams=2), TOKENIZER, rows=[range(2, 4)])
    for rows in (range(6, 10), range(-2, 2), range(4, 4)):
        with pytest.raises(InputError, match=r"range.* is no block of the rows of batch_size=8"):
            Pipeline(config, TOKENIZER, rows=[rows])


def test_identity_names_the_documents_of_a_batch(config):
    with Pipeline(config, TOKENIZER, rows=[range(0, 2), range(4, 8)]) as pipeline:
        assert "not yet" in pipeline.describe(0)
        for _ in range(3):
            next(pipeline)
        text = pipeline.describe()
        assert text.startswith("batch 2 (seed 0); row 0: ")
        assert "a.jsonl:" in text and "row 7: " in text
        assert re.findall(r"row (\d)", text) == ["0", "1", "4", "5", "6", "7"]
        assert pipeline.describe(1).startswith("batch 1 ") and pipeline.describe(1) != text


def test_closing_ends_the_threads(config):
    before = threading.active_count()
    config = dataclasses.replace(config, read_threads=2)
    with Pipeline(config, TOKENIZER) as pipeline:
        next(pipeline)
        assert threading.active_count() > before
        state = pipeline.state()
    pipeline.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(5)
    assert threading.active_count() == before
    assert pipeline.state() == state
    with pytest.raises(ValueError, match="closed"):
        next(pipeline)


def test_read_threads_change_nothing(config):
    expected = take(config, 5)
    threaded = take(dataclasses.replace(config, read_threads=2), 5)
    assert_same([b for b, _ in threaded], [b for b, _ in expected])
    assert threaded[-1][1] == expected[-1][1]


def test_a_program_that_does_not_close_ends_quietly():
    program = (
        "from jaxalope.data.config import DataConfig\n"
        "from jaxalope.data.pipeline import Pipeline\n"
        "from jaxalope.data.tokenizers import ByteTokenizer\n"
        "p = Pipeline(DataConfig(sequence_length=64, batch_size=2), ByteTokenizer())\n"
        "print(next(p)['tokens'].shape)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(2, 64)\n", "")


def test_errors_of_the_reader_reach_the_caller(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}')
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    config = DataConfig(sequence_length=8, batch_size=2, sources=(source,), holdout_fraction=0)
    with (
        Pipeline(config, TOKENIZER) as pipeline,
        pytest.raises(InputError, match=r"a\.jsonl:2: field 'text' holds int"),
    ):
        next(pipeline)


def eval_texts(batches):
    return {
        bytes(b["tokens"][r][(b["segment_ids"][r] == s)].clip(0, 255).astype(np.uint8))[:5]
        for b in batches
        for r in range(len(b["tokens"]))
        for s in range(1, b["segment_ids"][r].max() + 1)
    }


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_evaluation_is_one_pass_over_what_training_never_sees(config, packing):
    config = dataclasses.replace(config, packing=packing, sequence_length=128)
    batches = list(eval_batches(config, TOKENIZER))
    assert_same(list(eval_batches(config, TOKENIZER)), batches)
    # Every tenth line of a.jsonl and b.jsonl, counted from 1.
    held_out = {b"a0009", b"a0019", b"a0029", b"a0039", b"b0009", b"b0019"}
    assert {t for t in eval_texts(batches) if t[:1] in b"ab" and t[1:].isdigit()} == held_out
    seen = eval_texts([b for b, _ in take(config, 30)])
    assert len(seen) > 50 and not seen & held_out
    last = batches[-1]
    assert last["tokens"].shape == (8, 128)
    empty = last["segment_ids"].max(1) == 0
    assert empty.any() and (last["tokens"][empty] == TOKENIZER.pad_id).all()


def test_evaluation_is_the_same_for_any_seed_rows_of_a_process_and_batch_size(config):
    rows = np.concatenate([b["tokens"] for b in eval_batches(config, TOKENIZER)])
    other = dataclasses.replace(config, seed=9, batch_size=2, num_streams=None, shuffle=False)
    smaller = np.concatenate([b["tokens"] for b in eval_batches(other, TOKENIZER)])
    assert np.array_equal(rows[: len(smaller)], smaller)
    assert (rows[len(smaller) :] == TOKENIZER.pad_id).all()
    for deal in DEALS:
        parts = [eval_batches(config, TOKENIZER, rows=own) for own in deal]
        joined = [put_together(batch, deal)["tokens"] for batch in zip(*parts, strict=True)]
        assert np.array_equal(np.concatenate(joined), rows)
    assert len(list(eval_batches(config, TOKENIZER, num_batches=1))) == 1


def test_separate_evaluation_sources(config, corpora):
    config = dataclasses.replace(config, sources=(corpora["a"],), eval_sources=(corpora["c"],))
    texts = {t for t in eval_texts(eval_batches(config, TOKENIZER)) if t[1:].isdigit()}
    assert texts == {b"c0000", b"c0001"}
    seen = eval_texts([b for b, _ in take(config, 40)])
    assert {b"a0009", b"a0019"} <= seen  # Nothing is held out of `sources` then.


def test_evaluation_without_text(tmp_path, config):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    empty = SourceConfig(path=str(tmp_path / "a.jsonl"))
    config = dataclasses.replace(config, eval_sources=(empty,))
    with pytest.raises(InputError, match="held-out documents are all empty"):
        next(eval_batches(config, TOKENIZER))


def test_the_default_corpus_starts_at_once(monkeypatch):
    read = []
    original = streams.open_source

    def counted(*args):
        source = original(*args)
        get = source.__getitem__

        class Counted(type(source)):
            def __getitem__(self, index):
                read.append(index)
                return get(index)

        source.__class__ = Counted
        return source

    monkeypatch.setattr(streams, "open_source", counted)
    config = DataConfig(sequence_length=256, batch_size=8, prefetch_batches=0)
    with Pipeline(config, TOKENIZER) as pipeline:
        assert not read
        batch = next(pipeline)
        assert 8 <= len(read) <= 64  # One document a stream, or a few if they are short.
    text = TOKENIZER.decode(batch["tokens"].ravel())
    assert any(word in text for word in ("import", "def ", '"""'))
    assert len(set(itertools.chain(*batch["tokens"].tolist()))) > 30
