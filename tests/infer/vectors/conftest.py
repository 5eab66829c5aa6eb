"""Small CALM models of random weights whose draws vary."""

import jax
import pytest

from jaxalope import Model
from jaxalope.data.tokenizers import load_tokenizer
from jaxalope.model import CALMConfig, build_model
from jaxalope.sharding import init_params

TINY = CALMConfig.tiny()


def build(bias: float) -> Model:
    """The head's last layer starts at zero; the larger the bias, the fewer chunks are likely."""
    graphdef, params = init_params(lambda key: build_model(TINY, key), jax.random.key(0))
    last = params["latent_head"]["final_proj"]
    last["kernel"] = jax.random.normal(jax.random.key(5), last["kernel"].shape)
    last["bias"] = bias * jax.random.normal(jax.random.key(6), last["bias"].shape)
    return Model(TINY, graphdef, params, load_tokenizer("bytes"))


@pytest.fixture(scope="session")
def varied():
    """Hundreds of chunks are about as likely."""
    return build(0.0)


@pytest.fixture(scope="session")
def peaked():
    """A few chunks have most of the probability."""
    return build(1.0)
