"""A model ready to be called: structure, parameters, configuration, tokenizer and mesh together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..errors import InputError
from ..layers.stack import unroll
from ..sharding import AxisRules, Params, param_axes, shardings, split, use_mesh
from .exchange import Origin
from .generation_defaults import GenerationDefaults


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What :func:`jaxalope.load` returns.

    Attributes:
        config: of its family.
        graphdef: the module's structure; ``nnx.merge(graphdef, params)`` is the module.
        params: nested dict of arrays.
        tokenizer: that its text goes through; None for models without text.
        mesh: the devices its parameters lie on; None is one device.
        rules: that laid them out there.
        add_bos: whether a text begins with the tokenizer's begin-of-sequence token, as in training.
        defaults: how it should be sampled where a caller does not say.
        origin: of a model that was read from a published checkpoint, so that it is written back as
            it was.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Any = None
    mesh: Mesh | None = None
    rules: AxisRules = dataclasses.field(default_factory=AxisRules)
    add_bos: bool = False
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    origin: Origin | None = None

    def module(self) -> nnx.Module:
        """The ``nnx.Module`` itself, for surgery or for use inside another jitted function."""
        return nnx.merge(self.graphdef, self.params)

    def unrolled(self) -> Model:
        """The same model, its layers apart instead of stacked for a scan.

        Faster to decode with on a CPU and on a GPU, where a scan copies each layer's weights before
        it uses them; slower to compile. Call it once and keep what it returns: it holds copies of
        the parameters that were stacked. Its config says ``scan_layers=False``; a model that has
        nothing stacked is returned as it is.
        """
        if not getattr(self.config, "scan_layers", False):
            return self

        def apart(params):
            return split(unroll(nnx.merge(self.graphdef, params)))

        with self.context():
            graphdef, params = jax.jit(apart)(self.params)
        config = dataclasses.replace(self.config, scan_layers=False)
        return dataclasses.replace(self, config=config, graphdef=graphdef, params=params)

    def on(self, mesh: Mesh, rules: AxisRules | None = None) -> Model:
        """The same model, its parameters laid out on ``mesh`` by ``rules`` (None: the usual).

        For a model that is in memory already; ``jaxalope.load(path, mesh=mesh)`` reads every shard
        where it belongs and never holds the whole.

        Raises:
            InputError: a dimension does not divide over its mesh axis.
        """
        rules = rules or AxisRules()
        places = shardings(self.params, param_axes(self.module()), mesh, rules)
        params = jax.device_put(self.params, places)
        return dataclasses.replace(self, params=params, mesh=mesh, rules=rules)

    def context(self) -> contextlib.AbstractContextManager:
        """The mesh and rules under which this model is traced and run."""
        return contextlib.nullcontext() if self.mesh is None else use_mesh(self.mesh, self.rules)

    def batch_ways(self) -> int:
        """How many shares the mesh splits a batch into; a batch is a multiple of it."""
        if self.mesh is None:
            return 1
        (entry,) = self.rules.spec(("batch",), self.mesh.axis_names)
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def check_tokens(self, tokens: Any) -> np.ndarray:
        """``tokens`` as an int32 array, once every id is known to be in the vocabulary.

        Raises:
            InputError: an id outside it; names the id and where it stands.
        """
        tokens = np.asarray(tokens)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"tokens have dtype {tokens.dtype}; token ids are integers")
        outside = np.argwhere((tokens < 0) | (tokens >= self.config.vocab_size))
        if len(outside):
            where = tuple(int(i) for i in outside[0])
            raise InputError(
                f"token id {int(tokens[where])} at {where} is outside the vocabulary of "
                f"{self.config.vocab_size}; was the text encoded by another tokenizer?"
            )
        return tokens.astype(np.int32)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """An empty cache for ``batch`` rows of up to ``max_length`` tokens."""
        with self.context():
            return self.module().init_cache(batch, max_length, dtype)

    def __call__(self, tokens: Any, cache: Any = None, **kwargs: Any) -> tuple[jax.Array, Any]:
        """``(logits [B, T, vocab] float32, cache)`` of ``tokens [B, T]``, jit-compiled.

        ``kwargs`` (``segment_ids``, ``positions``) are the module's.
        """
        if not isinstance(tokens, jax.Array):
            tokens = self.check_tokens(tokens)
        with self.context():
            return self._forward(self.params, tokens, cache, kwargs)

    @functools.cached_property
    def _forward(self):
        def forward(params, tokens, cache, kwargs):
            return nnx.merge(self.graphdef, params)(tokens, cache, **kwargs)

        return jax.jit(forward)
