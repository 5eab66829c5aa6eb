"""Short convolution: oracle, packing, continuation, ragged rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalope.errors import InputError
from jaxalope.layers.ops.short_conv import short_conv

BATCH, DIM, WIDTH = 2, 6, 4

ROWS = {
    "touching": [1, 1, 1, 1, 1, 2, 2, 3, 4, 4, 4],
    "left padding": [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2],
    "right padding": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
    "two tokens": [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
    "short last segment": [1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0],
    "only padding": [0] * 11,
}


def draw(length, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, length, DIM)).astype(dtype)
    weight = rng.normal(size=(DIM, WIDTH)).astype(dtype)
    state = rng.normal(size=(BATCH, WIDTH - 1, DIM)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(weight), jnp.asarray(state)


def close(got, want, tolerance=2e-6):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=tolerance), got, want)


def by_numpy(x, weight, state):
    """The definition, with explicit indices."""
    window = np.concatenate([state, x], axis=1)
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for i in range(WIDTH):
            y[:, t] += np.asarray(weight)[:, i] * window[:, t + i]
    return y, window[:, x.shape[1] :]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_definition(implementation, length):
    x, weight, state = draw(length)
    got = short_conv(x, weight, state=state, implementation=implementation)
    close(got, by_numpy(x, weight, state))
    zeros = jnp.zeros_like(state)
    close(short_conv(x, weight, implementation=implementation), by_numpy(x, weight, zeros))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_state_keeps_its_dtype(implementation, packed):
    x, weight, state = draw(5)
    x = x.astype(jnp.bfloat16)
    segment_ids = jnp.ones(x.shape[:2], jnp.int32) if packed else None

    def after(state):
        settings = {"segment_ids": segment_ids, "implementation": implementation}
        return short_conv(x, weight, state=state, **settings)

    y, wide = after(state)
    assert y.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    assert after(None)[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide, x[:, -3:].astype(jnp.float32))


def test_silu_is_applied_to_the_sum():
    x, weight, state = draw(5)
    y, _ = short_conv(x, weight, state=state)
    close(short_conv(x, weight, state=state, activation="silu")[0], jax.nn.silu(y))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("before", ["tokens", "zeros", None])
def test_packed_equals_reference_with_gradients(name, before):
    segment_ids = jnp.asarray([ROWS[name], ROWS["touching"]])
    x, weight, state = draw(segment_ids.shape[1])
    rng = np.random.default_rng(1)
    cotangents = (rng.normal(size=x.shape), rng.normal(size=state.shape))
    state = {"tokens": state, "zeros": jnp.zeros_like(state), None: None}[before]

    def loss(x, weight, state, implementation):
        out = short_conv(
            x, weight, state=state, segment_ids=segment_ids, implementation=implementation
        )
        return sum(jnp.sum(a * b) for a, b in zip(out, cotangents, strict=True)), out

    run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    close(run(x, weight, state, "xla"), run(x, weight, state, "reference"), 1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_packed_equals_each_segment_alone(name):
    row = np.asarray(ROWS[name])
    x, weight, state = draw(len(row))
    y, new_state = short_conv(x, weight, state=state, segment_ids=jnp.asarray([row] * BATCH))
    np.testing.assert_array_equal(y[:, row == 0], 0)
    carried = state
    for segment in [s for s in dict.fromkeys(row.tolist()) if s]:
        tokens = np.flatnonzero(row == segment)
        alone, carried_after = short_conv(x[:, tokens], weight, state=carried)
        close(y[:, tokens], alone)
        final, carried = carried_after, jnp.zeros_like(state)
        close(new_state if segment == row.max() else final, final)
    if not row.any():
        close(new_state, state)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (4,), (10,), (1,) * 10])
def test_any_split_gives_the_same(cuts):
    x, weight, state = draw(11)
    want = short_conv(x, weight, state=state)
    parts, carried, start = [], state, 0
    for size in (*cuts, 11 - sum(cuts)):
        y, carried = short_conv(x[:, start : start + size], weight, state=carried)
        parts.append(y)
        start += size
    close((jnp.concatenate(parts, axis=1), carried), want)


def test_ragged_rows_continue_as_if_never_padded():
    x, weight, state = draw(6)
    y, carried = short_conv(
        x, weight, state=state, segment_ids=jnp.asarray([[1] * 2 + [0] * 4, [0, 1, 1, 1, 1, 1]])
    )
    following = draw(3, seed=5)[0]
    got, _ = short_conv(following, weight, state=carried)
    for row, tokens in enumerate((slice(0, 2), slice(1, 6))):
        whole = jnp.concatenate([x[row, tokens], following[row]])[None]
        want, _ = short_conv(whole, weight, state=state[row : row + 1])
        close(got[row], want[0, -3:])
        close(y[row, tokens], want[0, :-3])


def test_bfloat16_keeps_its_dtype_and_computes_in_float32():
    x, weight, state = (a.astype(jnp.bfloat16) for a in draw(9))
    y, new_state = short_conv(x, weight, state=state)
    assert y.dtype == new_state.dtype == jnp.bfloat16
    want, _ = short_conv(*(a.astype(jnp.float32) for a in (x, weight)), state=state)
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))


def test_explicitly_sharded_channels_and_rows():
    mesh = jax.make_mesh((2, 2, 1), ("data", "tensor", "fsdp"))
    segment_ids = jnp.asarray([ROWS["touching"], ROWS["left padding"]])
    x, weight, state = draw(segment_ids.shape[1])
    want = short_conv(x, weight, state=state, segment_ids=segment_ids)
    rows = ("data", "fsdp")
    specs = (
        jax.P(rows, None, "tensor"),
        jax.P("tensor", None),
        jax.P(rows, None, "tensor"),
        jax.P(rows, None),
    )

    @jax.jit
    def run(x, weight, state, segment_ids):
        return short_conv(x, weight, state=state, segment_ids=segment_ids)

    with jax.set_mesh(mesh):
        arrays = zip((x, weight, state, segment_ids), specs, strict=True)
        got = run(*(jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in arrays))
    close(got, want)


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_names_the_argument():
    x, weight, state = draw(4)
    with pytest.raises(InputError, match=r"implementation='fft'.*reference, xla"):
        short_conv(x, weight, implementation="fft")
    with pytest.raises(InputError, match="activation='gelu'"):
        short_conv(x, weight, activation="gelu")
    with pytest.raises(InputError, match="state has shape"):
        short_conv(x, weight, state=state[:, 1:])
    with pytest.raises(InputError, match="segment_ids has shape"):
        short_conv(x, weight, segment_ids=jnp.ones((BATCH, 5), int))
    with pytest.raises(InputError, match="weight"):
        short_conv(x, weight[1:])
