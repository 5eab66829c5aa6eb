"""What the toy models say, in plain Python and float64: the laws that decoders are held against."""

import itertools

import numpy as np


def logits_of(model):
    """``f(tokens) -> [V]`` of a table model: its logits after these tokens."""
    table = np.asarray(model.module().table[...], np.float64)
    config = model.config

    def of(tokens):
        recent = tuple(tokens)[config.skip :][-config.order :] if config.order else ()
        first = sum(config.vocab_size**level for level in range(len(recent)))
        code = 0
        for token in recent:
            code = code * config.vocab_size + int(token)
        return table[first + code]

    return of


def log_softmax(logits):
    top = np.max(logits)
    return logits - top - np.log(np.exp(logits - top).sum())


def responses(vocab_size, stop, slots):
    """Every response that ends with ``stop`` or fills the slots."""
    for length in range(1, slots + 1):
        for response in itertools.product(range(vocab_size), repeat=length):
            if stop not in response[:-1] and (response[-1] == stop or length == slots):
                yield response


def law(model, prompt, stop, slots, processed=lambda logits, prompt, output: logits):
    """``{response: probability}`` under logits processed by ``f(logits, prompt, output)``."""
    logits, known = logits_of(model), {}

    def log_p(output):
        if output not in known:
            raw = logits([*prompt, *output])
            known[output] = log_softmax(processed(raw, prompt, output))
        return known[output]

    return {
        r: float(np.exp(sum(log_p(r[:i])[t] for i, t in enumerate(r))))
        for r in responses(model.config.vocab_size, stop, slots)
    }


def chi_square_accepts(rows, expected, z=3.8):
    """Pearson's test that ``rows`` were drawn by the law ``expected``; rare responses count as one.

    The bound is Wilson and Hilferty's approximation of the chi-square quantile; at z = 3.8 a right
    sampler fails once in 14,000 times.
    """
    counts = dict.fromkeys(expected, 0)
    for row in rows:
        counts[tuple(int(t) for t in row)] += 1
    likely = [r for r, p in expected.items() if p * len(rows) >= 5]
    seen = np.array([counts[r] for r in likely] + [len(rows) - sum(counts[r] for r in likely)])
    hoped = np.array([expected[r] for r in likely])
    hoped = len(rows) * np.append(hoped, 1 - hoped.sum())
    if hoped[-1] < 5:
        seen, hoped = seen[:-1], hoped[:-1]
    statistic, freedom = np.sum((seen - hoped) ** 2 / hoped), len(seen) - 1
    spread = 2 / (9 * freedom)
    return statistic < freedom * (1 - spread + z * np.sqrt(spread)) ** 3
