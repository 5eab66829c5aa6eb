"""An 8.3M-parameter Kimi Linear against ``transformers``' own: training and generation.

    python bench/vs_transformers.py --output=bench/results/vs_transformers.jsonl

Same configuration, same weights, same machine, one process, in turns. Training is a whole step
(forward, backward, clip, AdamW) on batches of 4 x 256 random tokens; generation is greedy, one
prompt of 32 tokens (and 16 together), ``--new_tokens`` more. Needs the extra ``parity``.
"""

import dataclasses
import functools
import gc
import os

import jax
import jax.numpy as jnp
import models
import numpy as np
import peers
import report
import torch
import transformers
from absl import app, flags

from jaxalope import Greedy, Model, generate
from jaxalope.configs import get_experiment
from jaxalope.configs.optimizers import AdamW, Constant
from jaxalope.model import build_model
from jaxalope.sharding import init_params
from jaxalope.train.step import init_state, make_train_step

_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TURNS = flags.DEFINE_integer("turns", 5, "Measurements of each side.", lower_bound=1)
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 128, "Generated in one measurement.")
_BATCH, _LENGTH, _PROMPT = 4, 256, 32


def training(model: Model, peer) -> dict:
    """Callables that take one step each."""
    base = get_experiment("demo")
    experiment = dataclasses.replace(
        base,
        model=model.config,
        data=dataclasses.replace(base.data, batch_size=_BATCH, sequence_length=_LENGTH),
        optimizer=AdamW(),
        schedule=Constant(learning_rate=1e-3),
    )
    graphdef, state = init_state(experiment)
    step = make_train_step(experiment, graphdef)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, model.config.vocab_size, (_BATCH, _LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    batch = jax.device_put(batch)
    carry = [dataclasses.replace(state, params=jax.tree.map(jnp.copy, model.params))]

    def ours():
        carry[0], metrics = step(carry[0], batch)
        return metrics

    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.tensor(tokens.astype(np.int64))

    def theirs():
        peer.train()
        optimizer.zero_grad()
        peer(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return {"jaxalope": ours, "transformers": theirs}


def generation(model: Model, peer, rows: int = 1) -> dict:
    """Callables that generate ``--new_tokens`` tokens greedily, after each of ``rows`` prompts."""
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, model.config.vocab_size, (rows, _PROMPT))
    count, model = _NEW_TOKENS.value, model.unrolled()

    def ours():
        out = generate(model, prompt.tolist(), Greedy(), count, stop_tokens=())
        assert all(len(tokens) == count for tokens in out.tokens)

    ids = torch.tensor(prompt)

    def theirs():
        with torch.no_grad():
            out = peer.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
        assert out.shape == (rows, _PROMPT + count)

    return {"jaxalope": ours, "transformers": theirs}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    torch.set_num_threads(os.cpu_count())
    transformers.utils.logging.set_verbosity_error()
    graphdef, params = init_params(
        lambda key: build_model(models.kimi_8m(), key), jax.random.key(0)
    )
    model = Model(models.kimi_8m(), graphdef, params)
    facts = report.facts(
        torch=torch.__version__,
        transformers=transformers.__version__,
        parameters=models.kimi_8m().num_params(),
    )
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    rows, lines = [], []
    for name, make, tokens, aim in (
        ("training", training, _BATCH * _LENGTH, 10),
        ("generation", generation, _NEW_TOKENS.value, 20),
        ("generation of 16", functools.partial(generation, rows=16), 16 * _NEW_TOKENS.value, 10),
    ):
        peer = peers.to_transformers(model)
        times = report.alternate(make(model, peer), _TURNS.value, warm_up=2)
        speeds = {side: tokens / seconds for side, seconds in times.items()}
        ratios = times["transformers"] / times["jaxalope"]
        lines.append(
            (
                name,
                report.spread(speeds["jaxalope"], 0),
                report.spread(speeds["transformers"], 0),
                report.spread(ratios, 1),
                f"{aim}x",
            )
        )
        for side, seconds in times.items():
            rows.append({**facts, "what": name, "side": side, "tokens": tokens})
            rows[-1]["seconds"] = seconds.tolist()
        del peer
        gc.collect()
    print(report.table(["", "jaxalope tok/s", "transformers tok/s", "ratio", "aim"], lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
