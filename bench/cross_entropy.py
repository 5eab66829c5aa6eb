"""Head and cross-entropy, loss and loss+gradients: in one pass, and by a checkpointed scan.

    python bench/cross_entropy.py --output=bench/results/cross_entropy.jsonl

The forms run in turns on the same inputs; a ratio is taken within a turn, and reported as the
median of the turns with the lowest and the highest. ``one pass`` is the operator, ``general`` its
form for heads that are any function; ``checkpointed`` differentiates a scan over chunks of the
sequence whose logits are computed again; ``no argmax`` is the same that counts hits by a maximum,
as the operator does, and not by an argmax; ``whole`` has all logits at once. Memory is what the
compiled program allocates for temporaries (`memory_analysis`), inputs and outputs not counted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import report
from absl import app, flags

from jaxalope.layers.ops.linear_cross_entropy import head_cross_entropy, linear_cross_entropy

_TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens: rows of 1024.", lower_bound=1024)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the activations.", lower_bound=1)
_VOCAB = flags.DEFINE_list("vocab", ["8192", "65536"], "Sizes of the vocabulary.")
_CHUNK = flags.DEFINE_list("chunk_size", ["256", "1024"], "Tokens a chunk.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the activations.")
_TURNS = flags.DEFINE_integer("turns", 7, "Measurements of each form.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "File to append the rows to, as JSON lines.")


def token_sums(head, z_loss, hidden, targets, weights, argmax=True):
    """The sums of all logits at once, for JAX to differentiate."""
    logits = hidden @ head.astype(hidden.dtype)
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    own = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    nll, still = log_z - own, jax.lax.stop_gradient(logits)
    right = jnp.argmax(still, axis=-1) == targets if argmax else own == jnp.max(still, axis=-1)
    loss = jnp.sum(weights * nll) + z_loss * jnp.sum(weights * log_z**2)
    return loss, jnp.sum(weights * right)


def checkpointed(hidden, head, targets, weights, *, z_loss, chunk_size, argmax=True):
    """A scan over chunks of every row, whose logits are computed again for the gradient."""
    count = hidden.shape[0] * hidden.shape[1] // chunk_size

    def parts(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(total, part):
        return jax.tree.map(jnp.add, total, token_sums(head, z_loss, *part, argmax)), None

    zero = (jnp.float32(0), jnp.float32(0))
    return jax.lax.scan(body, zero, [parts(x) for x in (hidden, targets, weights)])[0]


def whole(hidden, head, targets, weights, *, z_loss, chunk_size):
    """Without chunks."""
    del chunk_size
    return token_sums(head, z_loss, hidden, targets, weights)


def general(hidden, head, targets, weights, *, z_loss, chunk_size):
    """The operator, of a head that it knows as a function."""
    return head_cross_entropy(
        lambda x: jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32
        ),
        hidden,
        targets,
        weights,
        z_loss=z_loss,
        max_logits=chunk_size * head.shape[1],
    )


FORMS = {
    "one pass": linear_cross_entropy,
    "general": general,
    "checkpointed": checkpointed,
    "no argmax": functools.partial(checkpointed, argmax=False),
    "whole": whole,
}


def programs(form, z_loss, chunk_size):
    """The two passes as functions of the inputs."""
    loss = functools.partial(FORMS[form], z_loss=z_loss, chunk_size=chunk_size)
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return {"loss": loss, "loss+gradients": gradient}


def inputs(vocab):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (_TOKENS.value // 1024, 1024)
    return (
        jax.random.normal(keys[0], (*shape, _WIDTH.value)).astype(_DTYPE.value),
        jax.random.normal(keys[1], (_WIDTH.value, vocab)) / np.sqrt(_WIDTH.value),
        jax.random.randint(keys[2], shape, 0, vocab),
        jax.random.uniform(keys[3], shape),
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    facts = report.facts(tokens=_TOKENS.value, width=_WIDTH.value, dtype=_DTYPE.value)
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    rows, lines = [], []
    for vocab in map(int, _VOCAB.value):
        arrays = inputs(vocab)
        for chunk in map(int, _CHUNK.value):
            for name in programs("one pass", 1e-4, chunk):
                compiled = {
                    form: jax.jit(programs(form, 1e-4, chunk)[name]).lower(*arrays).compile()
                    for form in FORMS
                }
                sides = {form: functools.partial(run, *arrays) for form, run in compiled.items()}
                seconds = report.alternate(sides, _TURNS.value)
                for form, times in seconds.items():
                    memory = compiled[form].memory_analysis().temp_size_in_bytes
                    row = {"vocab": vocab, "chunk_size": chunk, "pass": name, "form": form}
                    row |= {"wall_s": times.tolist(), "temporary_bytes": memory}
                    rows.append(facts | row)
                    cells = (vocab, chunk, name, form, report.spread(times * 1e3, 0))
                    ratio = report.spread(seconds["checkpointed"] / times, 2)
                    lines.append((*cells, ratio, f"{memory / 2**20:.0f}"))
                    print(lines[-1], flush=True)
    headers = ("V", "chunk", "pass", "form", "ms", "speed-up", "temporaries, MiB")
    print(report.table(headers, lines))
    report.write_rows(_OUTPUT.value, rows)


if __name__ == "__main__":
    app.run(main)
