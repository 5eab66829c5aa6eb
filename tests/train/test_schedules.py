import jax
import numpy as np
import pytest

from jaxalope.configs import WSD, Constant, Cosine, Linear
from jaxalope.train.schedules import make_schedule


def _rates(schedule, steps):
    rate = jax.jit(make_schedule(schedule, steps))
    return np.array([rate(i) for i in range(steps + 1)])


def test_wsd_rises_with_its_first_step_is_stable_and_falls_to_the_end():
    rates = _rates(WSD(learning_rate=2.0, warmup_steps=4, decay_steps=5, final=0.5), 15)
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4:11], 2.0)
    np.testing.assert_allclose(rates[10:], 2.0 - 1.5 * np.arange(6) / 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + np.cos(np.pi * t)) / 2),
        ("sqrt", lambda t: 1 - np.sqrt(t)),
    ],
)
def test_the_shape_of_the_decay(decay, shape):
    rates = _rates(WSD(learning_rate=1.0, decay_steps=8, decay=decay, final=0.1), 10)
    np.testing.assert_allclose(rates[2:], 0.1 + 0.9 * shape(np.arange(9) / 8), atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (
            Cosine(learning_rate=1.0, warmup_steps=2, final=0.2),
            lambda t: (1 + np.cos(np.pi * t)) / 2,
        ),
        (Linear(learning_rate=1.0, warmup_steps=2, final=0.2), lambda t: 1 - t),
        (Constant(learning_rate=1.0, warmup_steps=2), lambda t: np.ones_like(t)),
    ],
)
def test_warm_up_then_a_fall_over_what_is_left(schedule, shape):
    rates = _rates(schedule, 10)
    np.testing.assert_allclose(rates[:2], [0.5, 1.0])
    np.testing.assert_allclose(rates[2:], 0.2 + 0.8 * shape(np.arange(9) / 8), atol=1e-6)


def test_without_phases_it_is_constant():
    np.testing.assert_array_equal(_rates(WSD(learning_rate=0.25), 5), 0.25)
