"""BrierLM of every kind of model against enumerated laws, and what it must not depend on."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import log_softmax, logits_of
from test_brier import brier
from toys import TableConfig, sharded, table_model
from vector_toys import LAW, sum_law, sum_model

from jaxalope import InputError
from jaxalope.evals import DenoisingSampler, GeneratingSampler, brier_lm
from jaxalope.evals.vectors import walked_terms, whole_terms
from jaxalope.model import Gemma2Config, LLaDAConfig, Model, build_model
from jaxalope.model.calm import CALMConfig
from jaxalope.model.calm_autoencoder import CALMAutoencoderConfig
from jaxalope.sharding import MeshConfig, init_params, make_mesh, param_axes, shardings

pytestmark = pytest.mark.long

TEXT = [1, 0, 2, 2, 1, 0, 0, 2, 1]


@functools.cache
def handle(config) -> Model:
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params)


def tiny_llada(**changes) -> Model:
    """Blocks of one with shifted logits unless changed; weights are sharp."""
    shape = {
        "vocab_size": 6, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2,
        "num_kv_heads": 2, "intermediate_size": 16, "mask_token_id": 5,
        "initializer_range": 0.6, "block_size": 1, "logit_shift": True, "scan_layers": False,
    }  # fmt: skip
    return handle(LLaDAConfig(**{**shape, **changes}))


def tiny_gemma2() -> Model:
    """Its window is shorter than the text: the cache is a ring."""
    config = dataclasses.replace(
        Gemma2Config.tiny(),
        vocab_size=5,
        sliding_window=3,
        initializer_range=0.4,
        num_layers=2,
        scan_layers=False,
    )
    return handle(config)


def next_token_law(model, text) -> np.ndarray:
    """The joint law of the four tokens after ``text``, by one plain forward pass."""
    size = model.config.vocab_size
    if isinstance(model.config, TableConfig):
        logits = logits_of(model)
        p = {
            gram: log_softmax(logits([*text, *gram]))
            for n in range(4)
            for gram in itertools.product(range(size), repeat=n)
        }
    else:
        after = list(itertools.product(range(size), repeat=3))
        rows = np.array([[*text, *gram] for gram in after])
        said = np.asarray(model(jnp.asarray(rows))[0], np.float64)[:, len(text) - 1 :]
        p = {
            gram[:n]: log_softmax(s[n])
            for gram, s in zip(after, said, strict=True)
            for n in range(4)
        }
    law = np.zeros((size,) * 4)
    for gram in itertools.product(range(size), repeat=4):
        law[gram] = np.exp(sum(p[gram[:n]][gram[n]] for n in range(4)))
    assert law.sum() == pytest.approx(1, abs=1e-5)
    return law


def expected(law_after, text, size=1) -> np.ndarray:
    """The mean of Brier-1 to Brier-4 over all starts of a text."""
    starts = range(size, len(text) - 3, size)
    return np.mean([brier(law_after(text[:s]), text[s : s + 4]) for s in starts], axis=0)


def agrees(found, want, errors=5.0) -> None:
    """Within five standard errors in all four: a wrong alarm is below 3e-6."""
    assert np.all(np.abs(found.factors - want) < errors * found.standard_errors + 1e-6), (
        found.factors, want, found.standard_errors
    )  # fmt: skip


MODELS = {
    "table": lambda: table_model(TableConfig(3, 2), seed=1),
    "recurrent": lambda: table_model(TableConfig(3, 2, recurrent=True), seed=1),
    "llada": tiny_llada,
    "gemma2": tiny_gemma2,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_both_forms_are_the_enumerated_score_of_a_next_token_model(name):
    model = MODELS[name]()
    want = expected(lambda text: next_token_law(model, text), TEXT)
    copies = [TEXT] * 800
    settings = {"batch_size": 400, "seed": 3, "num_positions": None}
    exact = brier_lm(model, copies, **settings)
    assert exact.exact_last and exact.positions == 800 * 5 and exact.documents == 800
    agrees(exact, want)
    # The first factor has no randomness left.
    np.testing.assert_allclose(exact.factors[0], want[0], atol=1e-5)
    if name == "gemma2":  # The draws are those of the other models; compiling takes its time.
        return
    sampled = brier_lm(model, copies, exact_last=False, **settings)
    assert not sampled.exact_last
    agrees(sampled, want)
    assert np.all(exact.standard_errors < sampled.standard_errors)


def test_a_sampler_is_scored_by_the_same_law():
    model = MODELS["table"]()
    want = expected(lambda text: next_token_law(model, text), TEXT)
    found = brier_lm(
        model, [TEXT] * 150, sampler=GeneratingSampler(model), batch_size=750, num_positions=None
    )
    assert found.positions == 750
    agrees(found, want)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_chunks_of_every_size_are_the_enumerated_score(size):
    """All models have one law, which runs through their chunks; the last start counts too."""
    text = [1, 0, 2, 2, 1, 0, 0, 2, 1, 1]
    want = expected(sum_law, text, size)
    found = brier_lm(sum_model(size), [text] * 3000, batch_size=1500, num_positions=None, seed=size)
    assert found.positions == 3000 * ((10 - 4) // size)
    agrees(found, want)


def test_small_and_whole_chunks_agree_where_chunks_are_independent():
    """K = 2 walks through the cache and K = 4 does not; the text is long, the starts the same."""
    text = list(np.random.default_rng(0).integers(0, 3, 40))
    small, whole = (
        brier_lm(sum_model(k, independent=True), [text] * 400, num_positions=None, batch_size=400)
        for k in (2, 4)
    )
    two = [expected_independent(text[s : s + 4], 2) for s in range(2, 37, 2)]
    four = [expected_independent(text[s : s + 4], 4) for s in range(4, 37, 4)]
    agrees(small, np.mean(two, axis=0))
    agrees(whole, np.mean(four, axis=0))


def expected_independent(gram, size):
    """Chunks of a law that forgets: the sum before each is 0."""
    law = np.zeros((3,) * 4)
    for x in itertools.product(range(3), repeat=4):
        parts = [x[i : i + size] for i in range(0, 4, size)]
        law[x] = np.prod([LAW[sum(part[:i]) % 3][t] for part in parts for i, t in enumerate(part)])
    return brier(law, gram)


def test_the_walk_draws_what_whole_chunks_draw():
    model = sum_model(4)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 3, (5, 24)))
    starts, seeds = jnp.array([[1, 2, 4, 5, 5]] * 5), jnp.arange(5, dtype=jnp.uint32)
    whole = whole_terms(model.module(), tokens, jnp.full(5, 24), starts, seeds)
    walked = walked_terms(model.module(), tokens, starts, seeds, gap=2)
    np.testing.assert_array_equal(whole, walked)


# -- A real CALM model --------------------------------------------------------------------------


def tiny_calm(chunk_size=4, head="energy") -> Model:
    """With a head that draws: a fresh one draws 0, always."""
    autoencoder = dataclasses.replace(
        CALMAutoencoderConfig.tiny(), vocab_size=8, chunk_size=chunk_size, eos_token_id=None,
        pad_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    config = dataclasses.replace(
        CALMConfig.tiny(), autoencoder=autoencoder, num_layers=1, initializer_range=0.5, head=head,
        scan_layers=False,
    )  # fmt: skip
    model = handle(config)
    if head == "energy":
        kernel = model.params["latent_head"]["final_proj"]["kernel"]
        model.params["latent_head"]["final_proj"]["kernel"] = jax.random.normal(
            jax.random.key(1), kernel.shape
        )
    return model


def calm_oracle(model, documents, seed) -> np.ndarray:
    """Factors by loops over the uncached model, terms in float64."""
    module, size = model.module(), model.config.chunk_size
    read = jax.jit(lambda tokens: module(tokens)[0][:, -1:])
    decode = jax.jit(lambda hidden, noise: module.tokens(module.draw(hidden, noise)))
    chunks, terms = -(-4 // size), []

    def draw(text, key, which, step):
        key = jax.random.fold_in(jax.random.fold_in(key, which), step)
        noise = module.latent_head.noise(key, (1, 1))
        return np.asarray(decode(read(jnp.asarray([text])), noise))[0, 0].tolist()

    for number, text in enumerate(documents):
        text = [int(t) for t in text]
        for start in range(size, len(text) - 3, size):
            key = jax.random.fold_in(jax.random.key(seed + number), start)
            truth, pair, path = text[start : start + 4], ([], []), ([], [])
            for step in range(chunks):
                for which in range(2):
                    before = text[: start + step * size]
                    pair[which].extend(draw(before, key, which, step))
                before = text[:start] + path[0]
                both = [draw(before, key, which, step) for which in range(2)]
                path[0].extend(both[0])
                path[1].extend(both[1])
            a1, a2, c = (
                np.cumprod(np.equal(x[:4], y[:4]), dtype=np.float64)
                for x, y in ((pair[0], truth), (pair[1], truth), path)
            )
            terms.append(a1 + a2 - c)
    return np.mean(terms, axis=0)


@pytest.mark.parametrize("chunk_size", [4, 2])
def test_a_calm_model_is_scored_as_a_plain_loop_does(chunk_size):
    model = tiny_calm(chunk_size)
    rng = np.random.default_rng(2)
    documents = [rng.integers(0, 3, n) for n in (13, 4, 22, 9)]
    found = brier_lm(model, documents, num_positions=None, seed=11)
    np.testing.assert_allclose(found.factors, calm_oracle(model, documents, 11), atol=1e-6)
    assert found.positions == sum(max(len(d) - 4, 0) // chunk_size for d in documents)
    assert not found.exact_last


@pytest.mark.parametrize("head", ["diffusion", "flow"])
def test_other_heads_are_scored(head):
    found = brier_lm(tiny_calm(head=head), [np.arange(30) % 8])
    assert found.positions == 6 and np.all(np.abs(found.factors) <= 2)


# -- Masked diffusion ---------------------------------------------------------------------------


def any_order_law(model, text) -> np.ndarray:
    """The law of four masks after ``text``, filled in one by one in an order drawn at random."""
    mask, size = model.config.mask_token_id, model.config.vocab_size
    canvases = list(itertools.product(range(size), repeat=4))
    rows = np.array([[*text, *canvas] for canvas in canvases])
    logits = np.array(model(jnp.asarray(rows))[0], np.float64)[:, len(text) :]
    logits[:, :, mask] = -np.inf
    logits -= logits.max(axis=-1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    p = dict(zip(canvases, p, strict=True))
    law = np.zeros((size,) * 4)
    for gram in itertools.product(range(mask), repeat=4):
        for order in itertools.permutations(range(4)):
            canvas, chance = [mask] * 4, 1 / 24
            for place in order:
                chance *= p[tuple(canvas)][place][gram[place]]
                canvas[place] = gram[place]
            law[gram] += chance
    assert law.sum() == pytest.approx(1, abs=1e-5)
    return law


def test_masked_diffusion_is_the_enumerated_score_over_all_orders():
    model = tiny_llada(vocab_size=4, mask_token_id=3, block_size=None, logit_shift=False)
    text = TEXT[:6]
    want = expected(lambda before: any_order_law(model, before), text)
    found = brier_lm(model, [text] * 400, batch_size=800)
    assert found.positions == 800
    agrees(found, want)
    greedy = brier_lm(model, [text] * 2, sampler=DenoisingSampler(model, steps=2), batch_size=4)
    assert greedy.positions == 4


# -- What a score does not depend on ------------------------------------------------------------


KINDS = {
    "recurrent": MODELS["recurrent"],
    "calm": lambda: tiny_calm(),
    "small chunks": lambda: tiny_calm(2),
    "masks": lambda: tiny_llada(block_size=None, logit_shift=False),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_packing_batches_and_neighbours_do_not_matter(name):
    model = KINDS[name]()
    rng = np.random.default_rng(4)
    documents = [rng.integers(0, 3, n).astype(np.int32) for n in (14, 21, 3, 9)]
    tokens, segments = np.full((2, 30), 2), np.zeros((2, 30), np.int32)
    tokens[0, 1:15], segments[0, 1:15] = documents[0], 1
    tokens[1] = np.concatenate([documents[1], documents[2], [0] * 6])[:30]
    segments[1, :24] = [1] * 21 + [2] * 3
    packed = {"tokens": tokens.astype(np.int32), "segment_ids": segments}
    settings = {"seed": 5, "num_positions": 4}
    alone = brier_lm(model, documents, **settings)
    together = brier_lm(model, iter([packed, documents[3]]), **settings)
    one = brier_lm(model, documents, batch_size=1, **settings)
    for other in (together, one):
        np.testing.assert_allclose(other.factors, alone.factors, atol=1e-5)
        np.testing.assert_allclose(other.standard_errors, alone.standard_errors, atol=1e-5)
        assert other.positions == alone.positions
    # A document's number is in its seed alone.
    settings["batch_size"] = 1
    first = brier_lm(model, documents[:3], **settings)
    last = brier_lm(model, documents[3:], **{**settings, "seed": 8})
    size = getattr(model.config, "chunk_size", 1)
    weights = [sum(max(len(d) - 4, 0) // size for d in x) for x in (documents[:3], documents[3:])]
    both = np.average([first.factors, last.factors], axis=0, weights=weights)
    np.testing.assert_allclose(both, alone.factors, atol=1e-5)


@pytest.mark.parametrize("name", ["table", "calm", "small chunks"])
def test_eight_devices_score_as_one(name):
    documents = [np.random.default_rng(i).integers(0, 3, 12 + i) for i in range(5)]
    if name == "table":
        model = table_model(TableConfig(4, 2), seed=2)
        eight = sharded(model)
    else:
        model = tiny_calm(4 if name == "calm" else 2)
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        placed = shardings(model.params, param_axes(model.module()), mesh, model.rules)
        eight = dataclasses.replace(model, mesh=mesh, params=jax.device_put(model.params, placed))
    for exact_last in (True, False) if name == "table" else (None,):
        settings = {"exact_last": exact_last, "seed": 2}
        one, split = (brier_lm(m, documents, **settings) for m in (model, eight))
        np.testing.assert_allclose(split.factors, one.factors, atol=1e-5)


def test_a_subsample_estimates_the_mean_over_all_positions():
    """Documents of unlike lengths: a short one does not count as much as a long one.

    Brier-1 has no randomness but which positions are taken: within five standard errors of 100
    seeds, a wrong alarm is below 1e-5.
    """
    model = MODELS["table"]()
    rng = np.random.default_rng(6)
    documents = [rng.integers(0, 3, n) for n in (6, 60)]
    every = brier_lm(model, documents, num_positions=None)
    assert every.positions == 2 + 56
    few = [brier_lm(model, documents, num_positions=7, seed=10 * i) for i in range(100)]
    assert {f.positions for f in few} == {9}
    means = np.array([f.factors[0] for f in few])
    assert np.unique(means.round(6)).size > 5
    assert abs(means.mean() - every.factors[0]) < 5 * means.std() / 10


class Oracle:
    """Knows what comes."""

    def __init__(self, text):
        self.text = np.asarray(text)

    def sample(self, prefixes, seeds):
        return np.stack([self.text[len(p) : len(p) + 4] for p in prefixes])


def test_a_perfect_sampler_scores_a_hundred_and_a_stuck_one_nothing():
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    found = brier_lm(None, [text], sampler=Oracle(text))
    assert found.score == pytest.approx(100) and found.positions == 4
    wrong = brier_lm(None, [text], sampler=Oracle([7] * 9))
    np.testing.assert_allclose(wrong.factors, -1)
    assert wrong.score == 0 and wrong.not_positive == (1, 2, 3, 4)


# -- Bad input ----------------------------------------------------------------------------------


class Short:
    def sample(self, prefixes, seeds):
        return np.zeros((len(prefixes), 3), int)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_positions": 0}, "num_positions=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"documents": [[1, 2, 0, 1]]}, "no position to score"),
        ({"documents": [[1, 2, 9, 1, 1]]}, "token id 9"),
        ({"documents": ["text"]}, "tokenizer"),
        ({"max_length": 3}, "max_length=3"),
        ({"model": None}, "model=None"),
        ({"sampler": Short()}, "sampler=Short returned"),
        ({"sampler": Short(), "exact_last": True}, "exact_last=True"),
    ],
)
def test_what_cannot_be_scored_is_named(settings, message):
    given = {"model": table_model(TableConfig(3, 1)), "documents": [[1, 2, 0, 1, 2, 1]]}
    with pytest.raises(InputError, match=message):
        brier_lm(**{**given, **settings})


def test_models_without_probabilities_or_text_are_named():
    text = [[0, 1, 2, 3] * 4]
    with pytest.raises(InputError, match="exact_last=True"):
        brier_lm(tiny_calm(), text, exact_last=True)
    with pytest.raises(InputError, match="makes no text"):
        brier_lm(handle(CALMAutoencoderConfig.tiny()), text)
    masked = tiny_llada(block_size=None, logit_shift=False)
    with pytest.raises(InputError, match="hold the mask, token 5"):
        brier_lm(masked, [[0, 5, 1, 2, 3, 4]])
    with pytest.raises(InputError, match="fills no masks in"):
        DenoisingSampler(tiny_llada())
