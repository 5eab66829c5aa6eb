"""Elastic-Cache: the goldens, the slow transcription for every setting, and rows side by side."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import elastic_oracle as oracle

import jaxalope
from jaxalope.infer.denoise import Threshold, TopCount
from jaxalope.infer.denoise.elastic import ElasticCache, elastic_step, start_elastic
from jaxalope.infer.denoise.elastic_pass import each_layer
from jaxalope.infer.loop import run

FOLDER = pathlib.Path(__file__).parents[2] / "fixtures" / "llada_tiny"
GOLDEN = json.loads((FOLDER / "elastic.json").read_text())
MASK = 90


@functools.cache
def numpy_model():
    return oracle.TinyLLaDA(FOLDER)


@functools.cache
def tiny(scan=True):
    model = jaxalope.load(FOLDER)
    return model if scan else model.unrolled()


@functools.cache
def prompts():
    rows = np.load(FOLDER / "io.npz")["input_ids"]
    return [rows[0, :9], rows[1, :4], rows[0, 9:24], rows[1, 20:21]]


@dataclasses.dataclass
class Decoded:
    rows: list  # of token ids, with the masks that are left
    calls: list
    ratio: list
    trace: list  # a step: {"start_reset", "tracked", "decoded"}, each with an entry a row
    sims: list  # of (step, layer, row, similarity)


def decode(model, rows, new, settings, rule=None, *, eos=None, width=None):
    """All rows together, one step at a time, with what can be seen between steps."""
    total = [len(row) + n for row, n in zip(rows, new, strict=True)]
    width = width or max(total)
    canvas = np.full((len(rows), width), 0, np.int32)
    for i, row in enumerate(rows):
        canvas[i, : total[i]] = [*row, *[MASK] * new[i]]
    most = int((canvas == MASK).sum(axis=1).max())
    stops = np.broadcast_to(np.int32(-1 if eos is None else eos), len(rows))[:, None]

    def start(params, canvas, length):
        return start_elastic(bind(params), canvas, length, settings)

    def advance(params, settings, rule, state, stops):
        step = elastic_step(bind(params), settings, rule, stops, most=most)
        return run(step, state, 1)

    def bind(params):
        return dataclasses.replace(model, params=params).module()

    trace, sims = [], []
    with model.context():
        state = jax.jit(start)(model.params, canvas, np.array(total, np.int32))
        step = jax.jit(advance)
        module = model.module()
        while not bool(jnp.all(state.done)):
            running = ~np.asarray(state.done)
            state = step(model.params, settings, rule or TopCount(1), state, stops)
            count = len(trace)
            trace.append(
                {
                    "start_reset": np.asarray(state.start).tolist(),
                    "tracked": [[int(t) for t in row if t < width] for row in state.tracked],
                    "decoded": [[int(t) for t in row if t < width] for row in state.new],
                    "running": running,
                }
            )
            for layer, found in enumerate(each_layer(state.memory, module, "similarity")):
                sims += [
                    (count, layer, row, float(x))
                    for row, x in enumerate(found)
                    if running[row] and not np.isnan(x)
                ]
    tokens = np.asarray(state.tokens)
    return Decoded(
        rows=[tokens[i, :n].tolist() for i, n in enumerate(total)],
        calls=np.asarray(state.calls).tolist(),
        ratio=np.asarray(state.update_frequency(model.config.num_layers)).tolist(),
        trace=trace,
        sims=sims,
    )


def agree(found: Decoded, row: int, expected: oracle.Trace):
    """One row of a batch did what the transcription does with it alone."""
    assert found.rows[row] == expected.tokens.tolist()
    assert found.calls[row] == len(expected.steps)
    np.testing.assert_allclose(found.ratio[row], expected.update_ratio, rtol=1e-6)
    for mine, theirs in zip(found.trace, expected.steps, strict=False):
        assert mine["start_reset"][row] == theirs["start_reset"]
        assert mine["tracked"][row] == theirs["tracked"]
        assert sorted(mine["decoded"][row]) == sorted(theirs["decoded"])
    sims = [(s, layer, x) for s, layer, r, x in found.sims if r == row]
    assert [x[:2] for x in sims] == [x[:2] for x in expected.sims]
    np.testing.assert_allclose([x[2] for x in sims], [x[2] for x in expected.sims], atol=2e-5)


def golden_case(name):
    case = GOLDEN["cases"][name]
    prompt = np.load(FOLDER / "io.npz")["prompt"][0]
    return case, prompt, np.load(FOLDER / "elastic.npz")[f"tokens_{name}"][0]


@pytest.mark.parametrize("name", list(GOLDEN["cases"]))
def test_the_transcription_is_the_golden(name):
    case, prompt, tokens = golden_case(name)
    found = oracle.elastic(
        numpy_model(),
        prompt,
        case["gen_length"],
        mask_id=MASK,
        eos_id=GOLDEN["eos_id"],
        gamma=case["gamma"],
        window=case["window"],
        threshold=case["threshold"],
        top_k=case["k_top"],
    )
    assert found.tokens.tolist() == tokens.tolist()
    assert len(found.steps) == case["nfe"]
    np.testing.assert_allclose(found.update_ratio, case["update_ratio"], rtol=1e-9)
    assert [{"step": i, **step} for i, step in enumerate(found.steps)] == case["trace"]
    assert [list(x[:2]) for x in found.sims] == [x[:2] for x in case["sims"]]
    np.testing.assert_allclose([x[2] for x in found.sims], [x[2] for x in case["sims"]], atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_goldens(scan):
    for name in GOLDEN["cases"]:
        case, prompt, tokens = golden_case(name)
        settings = ElasticCache(gamma=case["gamma"], window=case["window"])
        found = decode(tiny(scan), [prompt], [case["gen_length"]], settings, eos=GOLDEN["eos_id"])
        assert found.rows[0] == tokens.tolist()
        assert found.calls == [case["nfe"]]
        np.testing.assert_allclose(found.ratio, case["update_ratio"], rtol=1e-6)
        steps = [{k: v[0] for k, v in step.items() if k != "running"} for step in found.trace]
        assert [{"step": i, **step} for i, step in enumerate(steps)] == case["trace"]
        assert [[s, layer] for s, layer, _, _ in found.sims] == [x[:2] for x in case["sims"]]
        sims = [x[3] for x in found.sims]
        np.testing.assert_allclose(sims, [x[2] for x in case["sims"]], atol=1e-5)


NEW = [17, 20, 9, 1]
SETTINGS = {
    "heads": (ElasticCache(gamma=0.6, window=5), TopCount(1)),
    "keys": (ElasticCache(gamma=0.93, window=5, drift="keys"), TopCount(2)),
    "threshold": (ElasticCache(gamma=0.7, window=6), Threshold(0.3)),
    "two": (ElasticCache(gamma=0.55, window=6, track_num=2), TopCount(2)),
    "all masks": (ElasticCache(gamma=0.6, window=4, block_caching=False), TopCount(1)),
    "exact": (ElasticCache(window=5, exact=True), TopCount(1)),
    "never": (ElasticCache(gamma=0.0, window=30), Threshold(0.2)),
}


def alone(row, new, settings, rule, eos=None):
    fixed = isinstance(rule, TopCount)
    return oracle.elastic(
        numpy_model(),
        row,
        new,
        mask_id=MASK,
        eos_id=eos,
        threshold=None if fixed else rule.value,
        top_k=rule.count if fixed else None,
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
    )


@pytest.mark.parametrize("name", list(SETTINGS))
def test_rows_of_a_batch_do_what_each_does_alone(name):
    settings, rule = SETTINGS[name]
    found = decode(tiny(), prompts(), NEW, settings, rule, width=32)
    for i, (row, new) in enumerate(zip(prompts(), NEW, strict=True)):
        agree(found, i, alone(row, new, settings, rule))
    starts = [
        set(np.array(step["start_reset"])[step["running"]]) for step in found.trace if len(step)
    ]
    if name in ("heads", "keys", "threshold", "two"):
        # Rows did refresh at different layers of one step, or the batch would show nothing.
        assert any(len(s) > 1 for s in starts)


def test_exact_is_decoding_without_a_cache():
    """Against the model's own forward pass, nothing of this method in it."""
    model, new = tiny(), [12, 7]
    rows = prompts()[:2]
    found = decode(model, rows, new, ElasticCache(window=5, exact=True), TopCount(2))
    for i, row in enumerate(rows):
        x, calls = np.concatenate([row, np.full(new[i], MASK)]), 0
        while (x == MASK).any():
            logits = np.array(model(x[None])[0][0], np.float64)
            places = np.flatnonzero(x == MASK)[:5]
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            best = places[np.argsort(-p[places].max(-1), kind="stable")[:2]]
            x[best] = logits[best].argmax(-1)
            calls += 1
        assert found.rows[i] == x.tolist()
        assert (found.calls[i], found.ratio[i]) == (calls, pytest.approx(4 / 3))
    stale = decode(model, rows, new, ElasticCache(gamma=0, window=5), TopCount(2))
    assert stale.rows != found.rows  # or "exact" would not be needed to get the above


def test_nothing_after_the_first_end_is_decoded():
    """The first step that commits a row's end token drops the masks after it."""
    settings, rule, ends = ElasticCache(gamma=0.6, window=6), TopCount(2), [77, 36]
    found = decode(tiny(), prompts()[:2], [20, 20], settings, rule, eos=ends)
    for i, row in enumerate(prompts()[:2]):
        expected = alone(row, 20, settings, rule, eos=ends[i])
        agree(found, i, expected)
        assert MASK in found.rows[i]
        response = found.rows[i][len(row) :]
        assert MASK not in response[: response.index(ends[i])]
