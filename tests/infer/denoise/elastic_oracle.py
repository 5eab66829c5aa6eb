"""Elastic-Cache for one row, slowly, in NumPy: the published method step by step.

Reads published tensors by their names, shares no code with the library, and keeps every matrix in
full. What the batched one is held to.
"""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file


@dataclasses.dataclass
class Trace:
    tokens: np.ndarray
    steps: list  # of {"start_reset", "tracked", "decoded"}
    sims: list  # of (step, layer, similarity)
    update_ratio: float


class TinyLLaDA:
    """The parts of a LLaDA layer, float32, from a folder in the published form."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.num_heads, self.num_layers = config["n_heads"], config["n_layers"]
        self.theta, self.eps = config["rope_theta"], config["rms_norm_eps"]

    def weight(self, name):
        return self.weights[f"model.transformer.{name}.weight"]

    def embed(self, tokens):
        return self.weight("wte")[tokens]

    def norm(self, x, name):
        scale = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(self.eps))
        return x * scale * self.weight(name)

    def qkv(self, h, layer, positions):
        """Rotated queries and keys, and values: ``[heads, rows, head_dim]`` each."""
        x = self.norm(h, f"blocks.{layer}.attn_norm")
        q, k, v = (self._heads(x @ self.weight(f"blocks.{layer}.{n}_proj").T) for n in "qkv")
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _heads(self, x):
        return x.reshape(len(x), self.num_heads, -1).transpose(1, 0, 2)

    def _rotate(self, x, positions):
        half = x.shape[-1] // 2
        frequencies = (self.theta ** (-np.arange(half) / half)).astype(np.float32)
        angles = np.asarray(positions, np.float32)[:, None] * frequencies
        cos, sin = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))
        turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * cos + turned * sin

    def attention(self, q, k):
        """``[heads, rows, keys]``."""
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[-1]))
        return _softmax(scores)

    def finish(self, h, mixed, layer):
        """The rest of a layer after attention's ``[heads, rows, head_dim]``."""
        mixed = mixed.transpose(1, 0, 2).reshape(len(h), -1)
        h = h + mixed @ self.weight(f"blocks.{layer}.attn_out").T
        x = self.norm(h, f"blocks.{layer}.ff_norm")
        gate = x @ self.weight(f"blocks.{layer}.ff_proj").T
        hidden = gate / (1 + np.exp(-gate)) * (x @ self.weight(f"blocks.{layer}.up_proj").T)
        return h + hidden @ self.weight(f"blocks.{layer}.ff_out").T

    def logits(self, h):
        return self.norm(h, "ln_f") @ self.weight("ff_out").T

    def forward(self, tokens):
        """Logits of a whole row, nothing cached."""
        h, places = self.embed(np.asarray(tokens)), np.arange(len(tokens))
        for layer in range(self.num_layers):
            q, k, v = self.qkv(h, layer, places)
            h = self.finish(h, self.attention(q, k) @ v, layer)
        return self.logits(h)


def elastic(
    model,
    prompt,
    new_tokens,
    *,
    mask_id,
    eos_id=None,
    gamma,
    window,
    threshold=None,
    top_k=1,
    track_num=1,
    block_caching=True,
    drift="heads",
    exact=False,
    shift=False,
):
    """Decode one prompt greedily; ``exact`` computes everything in every step.

    With ``shift`` a masked token is asked for one place before its own.
    """
    layers = model.num_layers
    x = np.concatenate([prompt, np.full(new_tokens, mask_id)])
    masked = [int(i) for i in np.flatnonzero(x == mask_id)]
    tracked, new, total = [], [], len(x)
    inputs, queries, keys, values = ([None] * layers for _ in range(4))
    trace, steps, ended = Trace(x, [], [], 0.0), 0, False
    while masked:
        todo = masked[:window] if block_caching else list(masked)
        asked = [max(i - 1, 0) for i in todo] if shift else todo
        if steps == 0 or exact:
            places, start = list(range(total)), -1
        else:
            places, start = [*tracked, *new, *asked], layers
        h, watched = model.embed(x[places]), set()
        for layer in range(layers):
            if layer > start:
                inputs[layer] = h.copy()
            else:
                inputs[layer][places] = h
                if layer == start:
                    h = inputs[layer].copy()
            rows = list(range(total)) if layer >= start else places
            q, k, v = model.qkv(h, layer, rows)
            if layer >= start:
                queries[layer], keys[layer], values[layer] = q, k, v
                weights = model.attention(q, k)
                seen = weights[:, asked]
            else:
                old = model.attention(queries[layer][:, tracked], keys[layer])
                for buffer, fresh in zip((queries, keys, values), (q, k, v), strict=True):
                    buffer[layer][:, rows] = fresh
                weights = model.attention(q, keys[layer])
                seen = weights[:, len(rows) - len(asked) :]
                if tracked:  # Else nothing has been decoded before, and nothing is measured.
                    similarity = _similarity(old, weights[:, : len(tracked)], drift)
                    trace.sims.append((steps, layer, similarity))
                    if similarity < gamma:
                        start = layer + 1
            score = seen.sum(axis=(0, 1))
            score[masked] = 0
            # A masked token is tracked only by the released code, and only if there is no other.
            best = np.argsort(-score, kind="stable")[:track_num]
            watched |= {int(i) for i in best if i not in masked}
            h = model.finish(h, weights @ values[layer], layer)
        h = h[asked] if start < layers else h[len(h) - len(asked) :]
        tracked = sorted(watched)
        probabilities = _softmax(model.logits(h).astype(np.float64))[: min(window, len(asked))]
        best, guess = probabilities.max(axis=-1), probabilities.argmax(axis=-1)
        if threshold is None:
            chosen = np.sort(np.argsort(-best, kind="stable")[:top_k])
        else:
            chosen = np.flatnonzero(best >= min(threshold, best.max()))
        new = [todo[i] for i in chosen]
        x[new] = guess[chosen]
        masked = [i for i in masked if i not in new]
        ends = [i for i in new if eos_id is not None and x[i] == eos_id]
        if ends and not ended:
            ended, masked = True, [i for i in masked if i < min(ends)]
        trace.steps.append({"start_reset": start, "tracked": tracked, "decoded": new})
        trace.update_ratio += layers - start
        steps += 1
    trace.update_ratio /= layers * steps
    return trace


def _similarity(old, new, drift):
    """Mean cosine of attention rows ``[heads, tracked, keys]`` before and after."""
    axis = {"heads": 0, "keys": -1}[drift]
    norms = [np.maximum(np.linalg.norm(a, axis=axis), 1e-8) for a in (old, new)]
    return float(np.mean((old * new).sum(axis=axis) / (norms[0] * norms[1])))


def _softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
