"""Fine-tuning of a masked diffusion model on prompts and answers, from a JSONL file on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxalope.configs.llada import llada_tiny
from jaxalope.configs.objectives import MaskedDiffusion
from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.data.pipeline import Pipeline
from jaxalope.data.tokenizers import ByteTokenizer, Published, load_tokenizer
from jaxalope.model import build_model
from jaxalope.train.loop import train
from jaxalope.train.noise import add_noise

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def experiment(tmp_path):
    folder = tmp_path / "tokenizer"
    ByteTokenizer(Published({"chat_template.jinja": TEMPLATE.encode()})).save(folder)
    turns = [("abc", "WX"), ("a", "Y" * 9), ("b" * 6, "Z")]
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats * 8))
    return dataclasses.replace(
        llada_tiny(),
        data=DataConfig(
            sequence_length=40,
            batch_size=8,
            sources=(SourceConfig(str(path), field="messages", chat=True),),
            holdout_fraction=0.25,
            tokenizer=str(folder),
            packing="single",
        ),
        objective=MaskedDiffusion(normalization="sequence", eos_padding=True, random_length=0),
    )


def test_prompts_are_neither_masked_nor_scored_and_answers_end_with_eos(tmp_path):
    pytest.importorskip("jinja2")
    tuned = experiment(tmp_path)
    model = build_model(tuned.model, jax.random.key(0))
    with Pipeline(tuned.data, load_tokenizer(tuned.data.tokenizer)) as pipeline:
        batches = [next(pipeline) for _ in range(6)]
    masked_ever, answers = 0, [*b"WXYZ", 258]
    for i, batch in enumerate(batches):
        out = jax.device_get(add_noise(tuned.objective, model, batch, jax.random.key(i)))
        longest = (batch["segment_ids"] > 0).sum(1).max()
        assert longest < 40
        inside = np.arange(40) < longest
        # Behind an answer up to the longest row: the end of a text, learnt as the answer is.
        learnt = np.isin(out["tokens"], answers) & inside
        padding = (batch["segment_ids"] == 0) & inside
        assert (out["tokens"][padding] == 258).all() and learnt[padding].all()
        np.testing.assert_array_equal(out["segment_ids"], np.tile(inside, (8, 1)))
        np.testing.assert_array_equal(out["counts"] > 0, learnt)
        np.testing.assert_allclose(out["counts"].sum(1), 1, rtol=1e-6)
        assert not (out["masked"] & ~learnt).any() and not out["weights"][~learnt].any()
        np.testing.assert_array_equal(out["noisy"][~learnt], out["tokens"][~learnt])
        masked_ever += (out["masked"] & padding).sum()
    assert masked_ever > 0


def test_a_run_from_a_file_of_chats(tmp_path):
    """On eight devices, evaluated on chats that were held out."""
    pytest.importorskip("jinja2")
    metrics = train(experiment(tmp_path), tmp_path / "run", quiet=True).metrics
    assert np.isfinite([metrics["loss"], metrics["eval_nll"]]).all()
    # Uniform guesses, more or less, at this few steps; a loss of nothing would be none.
    assert metrics["eval_nll"] > 1
