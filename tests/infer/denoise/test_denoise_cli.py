"""Denoising from the command line."""

import jax
import pytest

import jaxalope
import jaxalope.model
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import Model, build_model
from jaxalope.model.llada import LLaDAConfig
from jaxalope.sharding import init_params


@pytest.fixture(scope="module")
def model():
    config = LLaDAConfig.tiny()
    graphdef, params = init_params(lambda key: build_model(config, key), jax.random.key(0))
    return Model(config, graphdef, params, load_tokenizer("bytes"))


@pytest.fixture
def run(model, command_line):
    return command_line(model)


def test_denoise_prints_what_the_function_returns(model, run):
    expected = jaxalope.denoise(
        model,
        ["ab", ""],
        gen_length=8,
        block_length=4,
        rule=jaxalope.Threshold(0.02),
        policy=jaxalope.Temperature(0.5),
        cache="dual",
        seed=3,
    )
    found = run(
        "--method=denoise", "--prompt=ab", "--prompt=", "--gen_length=8", "--block_length=4",
        "--rule=threshold:0.02", "--cache=dual", "--seed=3", "--policy=temperature=0.5",
    )  # fmt: skip
    assert found.out == "".join(
        p + t + "\n" for p, t in zip(["ab", ""], expected.text, strict=True)
    )
    assert f"calls of the model: {expected.nfe}" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule=threshold:0.9"], "--rule is for --method=denoise"),
        (["--method=denoise", "--max_new_tokens=4"], "--gen_length"),
        (["--method=denoise", "--stream"], "--stream"),
        (["--method=denoise", "--rule=nothing"], "'nothing'"),
        (["--method=denoise", "--gen_length=9", "--block_length=2"], "block_length=2"),
        (["--method=sample", "--max_new_tokens=2"], "jaxalope.denoise"),
        (["--method=beam", "--max_new_tokens=2"], "jaxalope.denoise"),
        (["--method=power", "--max_new_tokens=2"], "jaxalope.denoise"),
    ],
)
def test_what_does_not_go_together_is_one_line(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run("--prompt=a", *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
