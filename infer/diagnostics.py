"""What samples are worth: how many independent ones, and how often one of k is right.

Host NumPy, in float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ..errors import InputError


def effective_sample_size(trace: Float[np.ndarray, "steps chains"]) -> float:
    """How many independent draws ``chains`` chains of ``steps`` correlated ones are worth together.

    ``steps * chains / tau``, where ``tau`` is 1 + twice the sum of the autocorrelations, as far as
    their sums over pairs of lags stay positive and no longer than they fall. Autocorrelations
    count what separates the chains' means as well, so chains that are each stuck in a place of
    their own are not mistaken for well mixed ones.

    The chains are independent of each other: they are worth at least one draw each, which is also
    what chains that never moved get. At most every draw counts as one, though chains that swing
    around their mean can do better. It does not see a start far from the target: drop those steps.

    Source: Geyer, "Practical Markov chain Monte Carlo" (1992), section 3.3; Vehtari et al.
    (arXiv 1903.08008), equations 2, 10 and 11.

    Args:
        trace: a scalar of every chain after every step.

    Raises:
        InputError: it is not a matrix with an entry, or not finite.
    """
    trace = np.asarray(trace, np.float64)
    if trace.ndim != 2 or 0 in trace.shape:
        raise InputError(f"trace has shape {trace.shape}; give [steps, chains], at least one each")
    if not np.isfinite(trace).all():
        raise InputError("trace holds values that are not finite; drop those chains")
    steps, chains = trace.shape
    if steps == 1 or np.ptp(trace) == 0:
        return float(chains)
    means = trace.mean(0)
    # Zeros behind each chain, so that the transform's end does not meet its beginning.
    spectrum = np.fft.rfft(trace - means, 2 * steps, axis=0)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[:steps].mean(1) / steps
    within = covariance[0] * steps / (steps - 1)
    total = covariance[0] + (means.var(ddof=1) if chains > 1 else 0)
    correlation = 1 - (within - covariance) / total
    correlation[0] = 1
    pairs = correlation[: steps // 2 * 2].reshape(-1, 2).sum(1)
    positive = np.append(pairs, -1) <= 0
    pairs = np.minimum.accumulate(pairs[: positive.argmax()])
    return float(steps * chains / np.clip(2 * pairs.sum() - 1, 1, steps))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of ``k`` samples is correct, from ``n`` samples of which ``c`` are.

    Unbiased: ``1 - C(n - c, k) / C(n, k)``, the average over all subsets of size ``k``, as a
    product in which nothing overflows. Source: arXiv 2107.03374, equation 1.

    Raises:
        InputError: ``c`` is not in 0..n, or ``k`` not in 1..n.
    """
    if not 0 <= c <= n:
        raise InputError(f"c={c} correct samples must lie in 0..n, and n={n}")
    if not 1 <= k <= n:
        raise InputError(f"k={k} must lie in 1..n, and n={n}: draw more samples or ask for less")
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))
