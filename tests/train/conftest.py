"""A language model of a few hundred numbers with every sort of parameter, and experiments on it."""

import dataclasses
import socket
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.configs.experiment import Experiment, TrainConfig
from jaxalope.configs.optimizers import WSD, AdamW
from jaxalope.data.config import DataConfig
from jaxalope.sharding import constrain, einsum, take

VOCAB, D, H, K, E, F, L = 32, 16, 4, 2, 4, 8, 2


def _param(key, shape, axes, **metadata):
    return nnx.Param(0.3 * jax.random.normal(key, shape), axes=axes, **metadata)


class Box(nnx.Module):
    """A namespace of parameters, so that their paths read as a real model's."""

    def __init__(self, **params):
        for name, param in params.items():
            setattr(self, name, param)


class Toy(nnx.Module):
    """Two stacked layers of bigram mixing, heads, and softly mixed experts."""

    def __init__(self, key):
        k = iter(jax.random.split(key, 16))
        self.embed = Box(embedding=_param(next(k), (VOCAB, D), ("vocab", "embed")))
        heads = ("embed", "heads", "head_dim")
        self.block = Box(
            norm=Box(scale=nnx.Param(jnp.ones((L, D)), axes=("embed",))),
            q_proj=Box(kernel=_param(next(k), (L, D, H, K), heads)),
            k_proj=Box(kernel=_param(next(k), (L, D, H, K), heads)),
            o_proj=Box(kernel=_param(next(k), (L, H, K, D), ("heads", "head_dim", "embed"))),
            conv=Box(kernel=_param(next(k), (L, H, K, 2), ("heads", "head_dim", None))),
            A_log=_param(next(k), (L, H), ("heads",)),
            dt_bias=_param(next(k), (L, H, K), ("heads", "head_dim")),
            router=Box(
                kernel=_param(next(k), (L, D, E), ("embed", "experts")),
                bias=nnx.Param(jnp.zeros((L, E)), axes=("experts",), gradient_free=True),
            ),
            up=Box(kernel=_param(next(k), (L, E, D, F), ("experts", "embed", "mlp"))),
            down=Box(kernel=_param(next(k), (L, E, F, D), ("experts", "mlp", "embed"))),
        )
        self.lm_head = Box(kernel=_param(next(k), (D, VOCAB), ("embed", "vocab")))

    def hidden_states(self, tokens, cache=None, *, segment_ids=None, positions=None):
        hidden = ("batch", "seq", "embed")
        table = constrain(self.embed.embedding[...], "vocab", "embed")
        x = take(table, tokens, hidden)
        valid = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        inner = ("batch", "seq", "heads", "head_dim")

        def layer(x, p):
            y = x * constrain(p["norm"]["scale"], "embed")
            q = einsum("btd,dhk->bthk", y, p["q_proj"]["kernel"], inner)
            k = einsum("btd,dhk->bthk", y, p["k_proj"]["kernel"], inner)
            q = q * p["conv"]["kernel"][..., 0] + jnp.exp(p["A_log"])[:, None] + p["dt_bias"]
            x = x + einsum("bthk,hkd->btd", jnp.tanh(q * k), p["o_proj"]["kernel"], hidden)
            scores = einsum("btd,de->bte", x, p["router"]["kernel"], ("batch", "seq", None))
            gate = jax.nn.softmax(scores + constrain(p["router"]["bias"], None), axis=-1)
            up = constrain(p["up"]["kernel"], None, None, "mlp")
            down = constrain(p["down"]["kernel"], None, "mlp", None)
            u = einsum("btd,edf->btef", x, up, ("batch", "seq", None, "mlp"))
            u = jnp.tanh(u) * gate[..., None]
            x = x + einsum("btef,efd->btd", u, down, hidden)
            chosen = jax.nn.one_hot(jnp.argmax(scores, -1), E) * valid[..., None]
            return x, chosen.sum((0, 1))

        params = nnx.to_pure_dict(nnx.state(self.block))
        x, load = jax.lax.scan(layer, x, params)
        return x, None, {"block": {"router": {"bias": load}}}

    def logits(self, hidden):
        return einsum("btd,dv->btv", hidden, self.lm_head.kernel[...], ("batch", "seq", "vocab"))


def _batch(rows=8, length=8, seed=0):
    rng = np.random.default_rng(seed)
    segment_ids = np.ones((rows, length), np.int32)
    # Documents end and padding begins at different places, so that rows hold different weights.
    for r in range(rows):
        segment_ids[r, 1 + r % (length - 1) :] = 2
        segment_ids[r, length - r % 3 :] = 0
    return {
        "tokens": rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
    }


def _experiment(rows=8, length=8, **changes):
    train = TrainConfig(**{"steps": 10, "eval_every": None} | changes.pop("train", {}))
    base = Experiment(
        name="toy",
        model=None,
        data=DataConfig(sequence_length=length, batch_size=rows),
        train=train,
        optimizer=AdamW(),
        schedule=WSD(learning_rate=1e-2, warmup_steps=2, decay_steps=3),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def toy():
    """``toy.build(key)``, ``toy.batch(rows, length, seed)`` and ``toy.experiment(**changes)``."""
    return types.SimpleNamespace(build=Toy, batch=_batch, experiment=_experiment, vocab_size=VOCAB)


@pytest.fixture
def free_port():
    """A port of this machine on which the processes of a test can meet."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
