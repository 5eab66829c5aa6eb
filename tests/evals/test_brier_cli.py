"""``python -m jaxalope.evals``: numbers, JSON, and one clear error."""

import dataclasses
import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

import jaxalope.model
from jaxalope.data.config import DataConfig, SourceConfig
from jaxalope.data.pipeline import eval_batches
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.evals import __main__ as cli
from jaxalope.evals import brier_lm
from jaxalope.model import LLaDAConfig, Model, build_model
from jaxalope.sharding import init_params


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(
        LLaDAConfig.tiny(), block_size=1, logit_shift=True, num_layers=1, scan_layers=False
    )
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params, load_tokenizer("bytes"))


@pytest.fixture
def run(model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jaxalope.model, "load", lambda path, step=None, ema=False: model)
    (tmp_path / "config.json").write_text("{}")  # As of a published model.
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(40)))

    def call(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            for name in flags.FLAGS:
                flags.FLAGS[name].present = 0
            flags.FLAGS(["evals", *arguments])
            status = cli.main(["evals"])
        found = capsys.readouterr()
        return status, found.out, found.err

    return call


def test_the_numbers_are_those_of_brier_lm(model, run, tmp_path):
    path, output = str(tmp_path / "text.txt"), tmp_path / "out.json"
    status, out, err = run(
        f"--model={tmp_path}", f"--data={path}", "--sequence_length=64", "--batch_size=4",
        "--num_batches=1", "--num_positions=6", "--seed=3", f"--output={output}",
    )  # fmt: skip
    assert status == 0, err
    data = DataConfig(64, 4, eval_sources=(SourceConfig(path),))
    want = brier_lm(
        model, eval_batches(data, model.tokenizer, 1), num_positions=6, batch_size=4, seed=3
    )
    assert out == f"{want}\n" and "exact last factor" in out and want.positions == 24
    values = json.loads(output.read_text())
    assert values["factors"] == want.factors.tolist() and values["seed"] == 3
    assert values["positions"] == 24 and values["exact_last"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model=HERE"], "--data is missing"),
        (["--model=HERE", "--data=HERE/none"], "HERE/none"),
        (["--model=HERE", "--num_positions=-1"], "--num_positions=-1"),
        (["--model=HERE", "--data=HERE/text.txt", "--batch_size=0"], "batch_size=0"),
        (["--model=HERE", "--data=HERE/text.txt", "--output=HERE/no/x"], "--output=HERE/no/x"),
    ],
)
def test_bad_input_is_one_line_and_status_two(run, tmp_path, arguments, message):
    here = str(tmp_path)
    status, out, err = run(*(a.replace("HERE", here) for a in arguments))
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("HERE", here) in err
