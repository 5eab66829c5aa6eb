"""Whether the parts that a run does not train are worth building on."""

from __future__ import annotations

import jax
from flax import nnx

from ..configs.experiment import Experiment
from ..configs.objectives import NextVector
from ..errors import InputError
from ..sharding import Params
from .reconstruction import reconstruction_accuracy
from .sums import Batch


def check_parts(
    experiment: Experiment, graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> None:
    """Measure a next-vector model's autoencoder on a batch.

    Raises:
        InputError: it gives back a smaller share of the tokens than
            ``objective.min_reconstruction``.
    """
    objective = experiment.objective
    if not isinstance(objective, NextVector) or not objective.min_reconstruction:
        return

    @jax.jit
    def measure(params: Params, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return reconstruction_accuracy(model.autoencoder, batch, jax.random.key(0))

    share = float(measure(params, batch))
    if share >= objective.min_reconstruction:
        return
    sources = [part.source for part in experiment.parts if part.name == "autoencoder"]
    where = f"of {sources[0]!r} " if sources else "is a random one, and "
    raise InputError(
        f"the autoencoder {where}gives back {share:.2%} of the tokens of the first batch, and "
        f"objective.min_reconstruction={objective.min_reconstruction}: no text is better than its "
        "autoencoder. Train one for longer (--config=calm_autoencoder_demo) and name its workdir "
        "(--set model.autoencoder=WORKDIR), or lower objective.min_reconstruction"
    )
