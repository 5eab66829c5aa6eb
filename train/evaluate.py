"""Held-out evaluation during training."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from flax import nnx

from ..configs.experiment import Experiment
from ..data.pipeline import eval_batches
from ..data.tokenizers import ByteTokenizer, Tokenizer
from ..model.registry import decoding_of
from ..sharding import Params
from .feed import Feed
from .step import TrainState, make_eval_step, summarise

Evaluate = Callable[[TrainState], dict[str, float]]


def make_evaluation(
    experiment: Experiment,
    graphdef: nnx.GraphDef,
    tokenizer: Tokenizer,
    feed: Feed,
) -> Evaluate:
    """A function from a state to its held-out numbers, on the same batches every time.

    They are ``eval_loss`` and the objective's own metrics as means per token,
    ``eval_perplexity`` and, where tokens are bytes, ``eval_bits_per_byte`` of objectives that are
    likelihoods or bounds on them, and all of them as ``eval_ema_*`` for the average of the
    parameters, if there is one.

    Args:
        experiment: its settings.
        graphdef: the module's structure.
        tokenizer: the run's.
        feed: puts batches on the devices, and knows which rows this process reads.

    Raises:
        InputError: nothing is held out.
    """
    count = experiment.train.eval_batches
    batches = list(eval_batches(experiment.data, tokenizer, count, feed.rows))
    eval_step = make_eval_step(experiment, graphdef)
    in_bytes = isinstance(tokenizer, ByteTokenizer)
    # A vector's loss is a distance, and a text that was read is given back for nothing.
    likelihood = decoding_of(experiment.model) not in ("next_vector", "reconstruction")

    def measure(params: Params) -> dict[str, float]:
        total = None
        for number, batch in enumerate(batches):
            sums = eval_step(params, feed.put(batch), number)
            total = sums if total is None else jax.tree.map(jax.numpy.add, total, sums)
        means = {k: float(v) for k, v in jax.device_get(summarise(total)).items() if k != "weight"}
        if likelihood:
            nll = means.get("nll", means["loss"])
            means["perplexity"] = math.exp(nll) if nll < 700 else math.inf
            if in_bytes:
                means["bits_per_byte"] = nll / math.log(2)
        return means

    def evaluate(state: TrainState) -> dict[str, float]:
        numbers = {f"eval_{name}": value for name, value in measure(state.params).items()}
        if state.ema is not None:
            numbers |= {f"eval_ema_{name}": value for name, value in measure(state.ema).items()}
        return numbers

    return evaluate
