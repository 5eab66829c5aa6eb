"""Power sampling: draws from ``p(response | prompt) ** alpha`` over whole responses.

Karan & Du, "Reasoning with sampling" (arXiv 2510.14901). The law of whole responses is not that of
low temperature, which sharpens every token alone: ``p ** alpha`` also weighs what can follow. Three
methods share one door: Metropolis-Hastings chains, sequential Monte Carlo, and look-ahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import InputError
from ..model.handle import Model
from .diagnostics import effective_sample_size
from .lookahead import sample_lookahead
from .metropolis import CUTS, REUSE, Metropolis
from .policy import COLDEST
from .programs import program_of
from .request import Batch, Prompts, integer, is_finite, make_batch
from .samples import PowerSamples, collect
from .smc import sample_smc

METHODS = ("mh", "smc", "lookahead")
_SHARED = {"model", "batch", "alpha", "t_max", "tau", "n", "block"}
# What only one method has.
_OWN = {
    "mh": set(),
    "smc": set(inspect.signature(sample_smc).parameters) - _SHARED,
    "lookahead": set(inspect.signature(sample_lookahead).parameters) - _SHARED,
}
# Of arguments that not every method has: those that do.
_METHODS_OF = dict.fromkeys(
    ("n_mcmc", "cut", "share_cut", "cut_seed", "reuse", "stride", "progress"), ("mh",)
)
_METHODS_OF |= {"block": ("mh", "lookahead"), "tau": ("mh", "smc")}


def power_sample(
    model: Model,
    prompts: Prompts,
    *,
    alpha: float = 4.0,
    block: int | None = None,
    n_mcmc: int = 10,
    t_max: int = 3072,
    tau: float | None = None,
    cut: str = "padded",
    method: str = "mh",
    n: int = 1,
    seed: int | Sequence[int] = 0,
    stop_tokens: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    share_cut: bool = True,
    cut_seed: int = 0,
    reuse: str = "shadow",
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings,
) -> PowerSamples:
    """Responses drawn from ``p ** alpha``, in the limit of many steps, particles or roll-outs.

    Args:
        model: any autoregressive model of the zoo.
        prompts: text, or token ids; of any lengths.
        alpha: exponent, at least 1; with 1 every proposal is accepted and this is plain sampling.
        block: ``"mh"``: slots by which the text grows, 192 if None; ``"lookahead"``: tokens of a
            choice, 1 if None.
        n_mcmc: Metropolis-Hastings steps in every block.
        t_max: tokens that a response may get.
        tau: ``"mh"`` and ``"smc"``: temperature of the proposal; ``1 / alpha`` if None. Any gives
            the same law.
        cut: how ``"mh"`` cuts, one of ``CUTS``; see :class:`~.metropolis.Metropolis`.
        method: ``"mh"``, ``"smc"`` or ``"lookahead"``.
        n: samples a prompt.
        seed: one a prompt, or an int: prompt ``i`` then has seed ``seed + i``. A sample depends on
            its own seed and number only, not on its neighbours.
        stop_tokens: ids that end a response; the tokenizer's end-of-sequence if None.
        share_cut: ``"mh"``: all chains cut at the same slot, drawn without looking at them; each
            chain's law is the same either way, and shared cuts decode least.
        cut_seed: ``"mh"``: of the shared cuts.
        reuse: ``"mh"``: ``"shadow"`` or ``"reread"``; see :class:`~.metropolis.Metropolis`.
        stride: ``"mh"``: slots between two snapshots of a recurrent state; ``block`` if None.
        progress: ``"mh"``: called with (blocks done, blocks) after each.
        **settings: of ``"smc"`` and ``"lookahead"``: see :func:`~.smc.sample_smc` and
            :func:`~.lookahead.sample_lookahead`.

    Returns:
        The samples, and how they came about.

    Raises:
        InputError: a setting out of range, or of another method; names it.
    """
    given = locals()
    _one_of("method", method, METHODS)
    for name, methods in _METHODS_OF.items():
        default = inspect.signature(power_sample).parameters[name].default
        if method not in methods and given[name] != default:
            raise InputError(
                f"{name}={given[name]!r} is of method={' or '.join(methods)}, not of {method!r}; "
                "leave it out"
            )
    _one_of("cut", cut, CUTS)
    _one_of("reuse", reuse, REUSE)
    if block is None:
        block = 192 if method == "mh" else 1
    _check(alpha=alpha, block=block, n_mcmc=n_mcmc, t_max=t_max, tau=tau, n=n, stride=stride)
    for name in settings:
        if name not in _OWN[method]:
            raise InputError(
                f"{name}={settings[name]!r} is no setting of method={method!r}; it has "
                f"{', '.join(sorted(_OWN[method])) or 'no further ones'}"
            )
    batch = make_batch(model, prompts, None, t_max, seed, stop_tokens)
    shared = {"alpha": alpha, "t_max": t_max, "n": n, **settings}
    if method == "smc":
        return sample_smc(model, batch, tau=tau, **shared)
    if method == "lookahead":
        return sample_lookahead(model, batch, block=block, **shared)
    tau = 1 / alpha if tau is None else tau
    if tau <= COLDEST:
        raise InputError(
            f"tau={tau} (1 / alpha if not given) is greedy, and a greedy proposal does not reach "
            f"everything that p does; give a tau above {COLDEST}"
        )
    block = min(block, t_max)
    chains = program_of(
        model, Metropolis, t_max, block, n_mcmc, cut, share_cut, reuse, stride or block
    )
    return sample_mh(
        model, batch, chains, alpha=alpha, tau=tau, n=n, cut_seed=cut_seed, progress=progress
    )


def sample_mh(
    model: Model,
    batch: Batch,
    chains: Metropolis,
    *,
    alpha: float,
    tau: float,
    n: int = 1,
    cut_seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PowerSamples:
    """``n`` Metropolis-Hastings chains of every request; see :func:`power_sample`."""
    many, rows = batch.repeat(n, model.batch_ways())
    traces = []
    with model.context():
        state = chains.start(
            model.params,
            batch.prompts,
            batch.lengths,
            rows,
            many.seeds,
            many.samples,
            capacity=batch.capacity,
        )
        settings = jnp.float32(alpha), jnp.float32(tau), many.stop_tokens, jnp.uint32(cut_seed)
        for index in range(chains.num_blocks):
            state, trace = chains.run_block(model.params, state, jnp.int32(index), *settings)
            traces.append(trace)
            if progress is not None:
                jax.block_until_ready(trace)
                progress(index + 1, chains.num_blocks)
    trace = jax.tree.map(lambda *x: np.stack(x)[..., : many.count], *jax.device_get(traces))
    sizes = None
    if chains.steps:
        per_prompt = np.split(trace.logprob[-1], batch.count, axis=1)
        sizes = np.array([effective_sample_size(x) for x in per_prompt])
    return collect(
        model,
        many,
        state.state,
        tokens_decoded=trace.decoded.sum() + trace.extended.sum(),
        acceptance=_mean(trace.accepted),
        moved=_mean(trace.moved),
        trace=trace.logprob,
        effective_sample_size=sizes,
    )


def expected_tokens(t_max: int, block: int, n_mcmc: int) -> float:
    """Tokens that one chain decodes if no response ends early, in expectation over the cuts."""
    ends = [min((k + 1) * block, t_max) for k in range(-(-t_max // block))]
    return t_max + n_mcmc * sum((end + 1) / 2 for end in ends)


def _mean(x: np.ndarray) -> np.ndarray:
    """Over steps and chains; NaN where there were no steps."""
    return np.full(len(x), np.nan) if x.shape[1] == 0 else x.mean((1, 2))


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is not one of {', '.join(known)}")


def _check(*, alpha, block, n_mcmc, t_max, tau, n, stride) -> None:
    if not (is_finite(alpha) and alpha >= 1):
        raise InputError(
            f"alpha={alpha} must be a number of at least 1; to flatten a model use a temperature"
        )
    if tau is not None and not (is_finite(tau) and tau > 0):
        raise InputError(
            f"tau={tau} must be positive: the proposal must reach everything that p does"
        )
    for name, value, least in (
        ("block", block, 1),
        ("n_mcmc", n_mcmc, 0),
        ("t_max", t_max, 1),
        ("n", n, 1),
        ("stride", 1 if stride is None else stride, 1),
    ):
        integer(name, value, least)
