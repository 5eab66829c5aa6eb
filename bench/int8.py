"""What int8 weights cost and save: bytes, error against the float weights, time of a decoded token.

    python -m jaxalope.train --config=demo --workdir=runs/demo
    python bench/int8.py --model=runs/demo --output=bench/results/int8.jsonl

The error is on held-out rows of the run's own corpus: the root mean square of the difference of the
log-probabilities relative to their spread, the mean loss, and how often the likeliest token is
another one. Times are of greedy decoding, layers apart (as one decodes on a CPU), in turns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags

import jaxalope
from jaxalope import Greedy, generate, quantize_weights
from jaxalope.configs.experiment import experiment_from_dict
from jaxalope.data.pipeline import eval_batches
from jaxalope.model.checkpoint import read_document

_MODEL = flags.DEFINE_string("model", "runs/demo", "A training workdir.")
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")
_TILES = flags.DEFINE_multi_integer("tiles", [16], "Tile sizes to run beside whole columns.")
_BATCHES = flags.DEFINE_integer("batches", 4, "Held-out batches.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens decoded in a turn.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 9, "Turns of decoding.", lower_bound=1)


def log_probs(model, batches):
    """``(log-probabilities [N, V], of the next tokens [N])`` of all real positions."""
    found, chosen = [], []
    for batch in batches:
        tokens, segments = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
        logits = model(tokens, segment_ids=segments)[0]
        p = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
        real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        found.append(p[real])
        chosen.append(np.take_along_axis(p, tokens[:, 1:, None], -1)[..., 0][real])
    return np.concatenate(found), np.concatenate(chosen)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    model = jaxalope.load(_MODEL.value)
    data = experiment_from_dict(read_document(_MODEL.value, "experiment")).data
    batches = list(eval_batches(data, model.tokenizer, _BATCHES.value))
    models = {"float32": model, "int8": quantize_weights(model)}
    for size in _TILES.value:
        models[f"int8, tiles of {size}"] = quantize_weights(model, tile_size=size)
    apart = {name: each.unrolled() for name, each in models.items()}
    prompt = ["def main(argv):\n    "]
    sides = {
        name: lambda m=m: jnp.asarray(
            generate(m, prompt, policy=Greedy(), max_new_tokens=_TOKENS.value).tokens[0]
        )
        for name, m in apart.items()
    }
    seconds = report.alternate(sides, _TURNS.value)
    wanted, truth = log_probs(model, batches)
    facts = report.facts(model=_MODEL.value, positions=len(truth))
    rows, lines = [], []
    for name, each in models.items():
        p, chosen = log_probs(each, batches)
        weights = jax.tree.leaves(each.params)
        row = {
            "bytes": sum(x.nbytes for x in weights),
            "rms": float(np.sqrt(np.mean((p - wanted) ** 2) / np.mean(np.var(wanted, axis=-1)))),
            "loss": float(-chosen.mean()),
            "other_token": float(np.mean(p.argmax(-1) != wanted.argmax(-1))),
            "seconds_per_token": (seconds[name] / _TOKENS.value).tolist(),
        }
        rows.append({**facts, "weights": name, **row})
        lines.append(
            (
                name,
                f"{row['bytes'] / 1e6:.2f}",
                f"{100 * row['rms']:.2f}%",
                f"{row['loss']:.4f}",
                f"{100 * row['other_token']:.2f}%",
                report.spread(seconds[name] / _TOKENS.value * 1e3, 2),
            )
        )
    print(" ".join(f"{k}={v}" for k, v in facts.items()))
    headers = ["weights", "MB", "log-probs off", "loss", "other first token", "ms a token"]
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
