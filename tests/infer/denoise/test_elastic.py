"""Elastic-Cache: the goldens, the slow transcription for every setting, and rows side by side."""

import dataclasses
import functools
import json
import pathlib

import elastic_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow import random_model

import jaxalope
from jaxalope import (
    ElasticCache,
    Greedy,
    InputError,
    Temperature,
    Threshold,
    TopCount,
    TopQuota,
    denoise,
)
from jaxalope.infer.denoise import Progress, parse_cache
from jaxalope.infer.denoise.draw import Numbers, decide
from jaxalope.infer.denoise.elastic_pass import each_layer, init_memory
from jaxalope.infer.denoise.step import Denoiser, Layout
from jaxalope.infer.policy import stack_rows
from jaxalope.infer.rows import NO_TOKEN
from jaxalope.model import KimiLinearConfig, build_model
from jaxalope.sharding import MeshConfig, abstract, make_mesh

pytestmark = pytest.mark.long

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


def decode(model, rows, new, kind, rule=None, *, eos=None, width=None):
    """All rows together, one step at a time, with what can be seen between steps."""
    lengths = np.array([len(row) for row in rows], np.int32)
    limits = lengths + np.array(new, np.int32)
    width, count = width or int(limits.max()), len(rows)
    canvas = np.zeros((count, max(lengths)), np.int32)
    for i, row in enumerate(rows):
        canvas[i, : len(row)] = row
    most = max(int(np.sum(np.asarray(row) == MASK)) + n for row, n in zip(rows, new, strict=True))
    stops = np.broadcast_to(np.int32(NO_TOKEN if eos is None else eos), count)[:, None]
    compiled, gamma = kind.traced()
    none = np.full((count, 1), NO_TOKEN, np.int32)
    numbers = Numbers(
        policy=jax.tree.map(lambda x: np.repeat(x, count, 0), stack_rows([Greedy()])),
        rule=jax.tree.map(lambda x: np.full(count, x, np.float32), rule or TopCount(1)),
        steps=np.ones(count, np.int32),
        guidance=np.zeros(count, np.float32),
        stop_tokens=stops,
        forbidden=none,
        last=none,
        cache=np.full(count, gamma, np.float32),
    )
    shift = model.config.logit_shift
    layout = Layout(mask=MASK, block_length=most, blocks=1, width=width, shift=shift)
    decoder, trace, sims = Denoiser(model.graphdef, compiled, layout), [], []
    with model.context():
        seeds = np.zeros(count, np.uint32)
        state = decoder.begin(model.params, canvas, lengths, limits, seeds, seeds.astype(np.int32))
        module = model.module()
        while not bool(jnp.all(state.done)):
            running = ~np.asarray(state.done)
            state = decoder.decode(model.params, numbers, state, 1)
            (memory,) = state.cache
            for layer, found in enumerate(each_layer(memory.layers, module, "similarity")):
                sims += [
                    (len(trace), layer, row, float(x))
                    for row, x in enumerate(found)
                    if running[row] and not np.isnan(x)
                ]
            trace.append(
                {
                    "start_reset": np.asarray(memory.start).tolist(),
                    "tracked": [[int(t) for t in row if t < width] for row in memory.tracked],
                    "decoded": [[int(t) for t in row if t < width] for row in memory.new],
                    "running": running,
                }
            )
    tokens = np.asarray(state.tokens)
    return Decoded(
        rows=[tokens[i, :n].tolist() for i, n in enumerate(limits)],
        calls=np.asarray(state.calls).tolist(),
        ratio=kind.update_frequency(state, model.config.num_layers).tolist(),
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


def alone(row, new, settings, rule, eos=None, **more):
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
        **more,
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


@pytest.mark.parametrize("name", ["heads", "two", "all masks", "exact"])
def test_shifted_logits_are_asked_for_one_place_before(name):
    """The tiny model read as one whose logits are of the next token; also of a first mask."""
    settings, rule = SETTINGS[name]
    model = tiny()
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, logit_shift=True))
    rows, new = [*prompts()[:2], np.array([MASK, 12, 40])], [17, 20, 12]
    found = decode(model, rows, new, settings, rule, width=32)
    for i, row in enumerate(rows):
        agree(found, i, alone(row, new[i], settings, rule, shift=True))
    if name == "exact":
        for i, row in enumerate(rows[:2]):
            ask = {"gen_length": new[i], "rule": rule, "stop_tokens": []}
            everything = dataclasses.replace(settings, window=new[i])
            mine, plain = (
                denoise(model, [row.tolist()], cache=cache, **ask) for cache in (everything, "none")
            )
            np.testing.assert_array_equal(mine.history[0].tokens, plain.history[0].tokens)


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


def test_the_mask_counts_in_a_confidence_as_published():
    """The first place is surer only if the mask's share of the second is no other token's."""
    logits = np.full((1, 2, 96), -9.0, np.float32)
    logits[0, 0, [3, 4]] = np.log([0.6, 0.4])
    logits[0, 1, [5, 6, MASK]] = np.log([0.5, 0.2, 0.3])
    none, one = np.full((1, 1), NO_TOKEN, np.int32), np.ones(1, np.int32)
    rule = TopCount(np.float32([1]))
    numbers = Numbers(stack_rows([Greedy()]), rule, one, one * 0.0, none, none, none, one)
    places = np.array([[0, 1]], np.int32)
    tokens = np.full((1, 2), MASK, np.int32)
    keys = jax.random.split(jax.random.key(0), 1)
    progress = Progress(one, one, one)
    token, sure, chosen, _, _ = decide(
        numbers, logits, tokens, one * 0, places, places >= 0, keys, progress, mask=MASK
    )
    assert token.tolist() == [[3, 5]] and chosen.tolist() == [[True, False]]
    np.testing.assert_allclose(sure, [[0.6, 0.5]], atol=0.01)


def public(model, cache, **kwargs):
    rows = [row.tolist() for row in prompts()]
    found = denoise(
        model, rows, gen_length=10, cache=cache, rule=kwargs.pop("rule", TopCount(1)), **kwargs
    )
    return [h.tokens.tolist() for h in found.history], found


def test_denoise_reports_what_a_row_alone_needs():
    settings = ElasticCache(gamma=0.6, window=5)
    tokens, found = public(tiny(), settings, stop_tokens=[])
    for i, row in enumerate(prompts()):
        expected = alone(row, 10, settings, TopCount(1))
        assert tokens[i] == expected.tokens.tolist()
        assert found.nfe[i] == len(expected.steps)
        assert found.update_frequency[i] == pytest.approx(expected.update_ratio)
        steps = found.history[i].step
        assert [np.flatnonzero(steps == s + 1).tolist() for s in range(len(expected.steps))] == [
            sorted(step["decoded"]) for step in expected.steps
        ]


def test_eight_devices_decode_as_one():
    """With rows, heads and vocabulary split."""
    cache = ElasticCache(gamma=0.6, window=5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, alone = public(tiny(), cache)
    many, there = public(jaxalope.load(FOLDER, mesh=mesh), cache)
    assert many == one
    assert there.update_frequency == alone.update_frequency


def test_shared_keys_and_samples():
    """Fewer keys than queries, for which there is no golden; and draws, which depend on a row's
    seed and on what is left to fill in."""
    model, ask = random_model(num_kv_heads=2, num_layers=3), {"stop_tokens": []}
    everything = ElasticCache(window=40, exact=True)
    warm = {"policy": Temperature(1.5), "n": 2, **ask}
    for more in (ask, warm):
        mine, theirs = (public(model, cache, **more)[0] for cache in (everything, "none"))
        for i in range(len(mine)):
            # Without a window, masks of a prompt are a block of their own.
            if MASK not in prompts()[i // more.get("n", 1)]:
                assert mine[i] == theirs[i]
    assert mine[0] != mine[1]
    cache = ElasticCache(gamma=0.9, window=6)
    cached, found = public(model, cache, **ask)
    row = prompts()[1].tolist()
    again = denoise(model, [row], gen_length=10, cache=cache, rule=TopCount(1), **ask)
    assert again.history[0].tokens.tolist() == cached[1]
    assert again.update_frequency[0] == pytest.approx(found.update_frequency[1])
    assert 0.2 < found.update_frequency[1] < 1.2  # some layers, not all


@pytest.mark.parametrize("explicit", [True, False])
def test_more_tokens_to_watch_than_there_are(explicit):
    """All of them are watched, as with as many as the canvas has places."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, explicit=explicit))
    model, settings = tiny().on(mesh), {"gamma": 0.6, "window": 5}
    few, there = public(model, ElasticCache(track_num=64, **settings))
    many, here = public(model, ElasticCache(track_num=100, **settings))
    assert many == few
    assert here.update_frequency == there.update_frequency


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"window": 0}, "window=0"),
        ({"track_num": 0}, "track_num=0"),
        ({"track_num": 2.5}, "track_num=2.5 must be a whole number"),
        ({"window": None}, "window=None must be a whole number"),
        ({"drift": "rows"}, "drift='rows'"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(InputError, match=named):
        ElasticCache(**settings)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"block_length": 4}, "block_length=4"),
        ({"steps": 4, "rule": None}, "steps=4"),
        ({"rule": TopQuota()}, "rule=TopQuota"),
        ({"cfg_scale": 1.0}, "cfg_scale"),
    ],
)
def test_what_a_sliding_window_has_no_use_for(asked, named):
    with pytest.raises(InputError, match=named):
        public(tiny(), "elastic", **asked)


def test_models_that_it_is_not_for():
    row = [[1, 2, 3]]
    with pytest.raises(InputError, match="block_size=4"):
        denoise(random_model(block_size=4), row, gen_length=4, cache="elastic")
    config = KimiLinearConfig.tiny()
    graphdef, shapes, _ = abstract(lambda key: build_model(config, key))
    kimi = jaxalope.Model(config, graphdef, shapes)
    with pytest.raises(InputError, match="masked diffusion"):
        denoise(kimi, row, gen_length=4, cache="elastic")
    with pytest.raises(InputError, match="watches the attention"):
        init_memory(kimi.module(), 1, 8, 1)


def test_settings_on_the_command_line():
    assert parse_cache("elastic") == "elastic"
    asked = parse_cache("elastic:gamma=0.8, window=32,drift=keys,block_caching=false")
    assert asked == ElasticCache(gamma=0.8, window=32, drift="keys", block_caching=False)
    for text, named in (
        ("elastic:windw=3", "did you mean 'window'"),
        ("elastic:window=wide", "not 'wide'"),
        ("elastic:exact=maybe", "not 'maybe'"),
        ("dual:gamma=1", "dual takes no settings"),
    ):
        with pytest.raises(InputError, match=named):
            parse_cache(text)
