"""Enumerable language models behind the zoo's doors: logits are looked up by the tokens before.

One remembers its tokens by position, as attention does; the other holds a running state that cannot
be addressed by position, as a recurrence does. Both say the same.
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import KimiLinearConfig, Model, build_model
from jaxalope.sharding import MeshConfig, constrain, init_params, make_mesh, take

_ROWS = ("batch", None)
SAMPLING = pathlib.Path(__file__).parent.parent / "fixtures" / "sampling"


@dataclasses.dataclass(frozen=True)
class TableConfig:
    """The last ``order`` tokens decide; a row's first ``skip`` (its prompt) do not count."""

    vocab_size: int
    order: int
    skip: int = 1
    recurrent: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableCache:
    """``memory`` is ``tokens [B, S]``, or the recurrent state: the last tokens ``[B, order]``."""

    memory: Any
    length: Any


class TableLM(nnx.Module):
    """``table[level][code]``: logits after ``level <= order`` tokens that spell ``code``."""

    def __init__(self, config: TableConfig, *, rngs=None, table=None):
        self.config = config
        rows = sum(config.vocab_size**level for level in range(config.order + 1))
        if table is None:
            table = jax.random.normal(rngs.params(), (rows, config.vocab_size))
        self.table = nnx.Param(jnp.asarray(table, jnp.float32), axes=(None, "vocab"))

    def init_cache(self, batch, max_length, dtype=None):
        c = self.config
        width = c.order if c.recurrent else max_length
        return TableCache(
            memory=constrain(jnp.zeros((batch, width), jnp.int32), "batch", None),
            length=constrain(jnp.zeros((batch,), jnp.int32), "batch"),
        )

    def __call__(self, tokens, cache=None, *, segment_ids=None, positions=None):
        batch, steps = tokens.shape
        valid = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        start = self.init_cache(batch, steps) if cache is None else cache

        def step(cache, now):
            token, valid = now
            cache = self._read(cache, token, valid != 0)
            return cache, self._logits(cache)

        end, logits = jax.lax.scan(step, start, (tokens.T, valid.T))
        return jnp.moveaxis(logits, 0, 1), None if cache is None else end

    def _read(self, cache, token, valid):
        if self.config.recurrent:
            moved = jnp.concatenate([cache.memory[:, 1:], token[:, None]], axis=1)
            memory = jnp.where(valid[:, None], moved, cache.memory)
        else:
            here = (jnp.arange(cache.memory.shape[1]) == cache.length[:, None]) & valid[:, None]
            memory = jnp.where(here, token[:, None], cache.memory)
        return TableCache(memory, cache.length + valid)

    def _logits(self, cache):
        c = self.config
        level = jnp.clip(cache.length - c.skip, 0, c.order)
        code = jnp.zeros_like(level)
        for back in range(c.order, 0, -1):
            if c.recurrent:
                token = cache.memory[:, c.order - back]
            else:
                place = jnp.maximum(cache.length - back, 0)
                token = jnp.take_along_axis(cache.memory, place[:, None], axis=1)[:, 0]
            code = jnp.where(back <= level, code * c.vocab_size + token, code)
        firsts = np.cumsum([0, *(c.vocab_size**n for n in range(c.order))])
        return take(self.table[...], take(jnp.asarray(firsts), level, ["batch"]) + code, _ROWS)


# Of Kimi Linear, one layer of each kind.
SMALL = dataclasses.replace(
    KimiLinearConfig.tiny(), num_layers=2, kda_layers=(1,), full_attn_layers=(2,)
)


def hybrid_model(config: KimiLinearConfig = SMALL, seed: int = 0) -> Model:
    """Recurrent and attention layers; large weights, so that distributions are not flat."""
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    return Model(config, graphdef, params, load_tokenizer("bytes"))


def table_model(config: TableConfig, table=None, seed: int = 0) -> Model:
    """A handle, as ``jaxalope.load`` returns for real models; it has no tokenizer."""
    graphdef, state = nnx.split(TableLM(config, rngs=nnx.Rngs(seed), table=table))
    return Model(config, graphdef, nnx.to_pure_dict(state))


def sharded(model: Model) -> Model:
    """The same model on eight devices: four shares of the batch, two of the vocabulary."""
    return model.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def golden() -> dict:
    """The numbers of the published toy: 4 tokens, the last of which ends; up to 4 slots."""
    return json.loads((SAMPLING / "power_toys.json").read_text())


def golden_model(recurrent: bool = False) -> Model:
    """The golden toy; its prompt is any one token."""
    numbers = golden()
    size, depth = numbers["V"], numbers["T"] - 1
    table = []
    for level in range(depth + 1):
        for prefix in itertools.product(range(size), repeat=level):
            key = ",".join(map(str, prefix))
            table.append(numbers["prefix_logits"].get(key, [0.0] * size))
    return table_model(TableConfig(size, depth, recurrent=recurrent), table)


def frequencies(rows, numbers: dict | None = None) -> np.ndarray:
    """How often each of the golden toy's sequences occurs among ``rows`` (without padding)."""
    sequences = [tuple(s) for s in (numbers or golden())["sequences"]]
    index = {s: i for i, s in enumerate(sequences)}
    counts = np.zeros(len(sequences))
    for row in rows:
        counts[index[tuple(int(t) for t in row)]] += 1
    return counts / counts.sum()


def total_variation(p, q) -> float:
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)
