"""Operations on activations: the same values and gradients on any mesh as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.sharding import (
    AxisRules,
    MeshConfig,
    constrain,
    einsum,
    init_params,
    kernel_map,
    make_mesh,
    psum_over,
    take,
    use_mesh,
)

MESHES = {
    "data-fsdp-tensor": MeshConfig(2, 2, 1, 1, 2),
    "fsdp-expert-tensor": MeshConfig(1, 2, 2, 1, 2),
    "data": MeshConfig(8),
    "auto": MeshConfig(1, 2, 2, 1, 2, explicit=False),
}


class Toy(nnx.Module):
    """A look-up, a column-parallel product, and a local kernel that adds over experts."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        normal = jax.random.normal
        self.table = nnx.Param(normal(rngs(), (32, 16)), axes=("vocab", "embed"))
        self.up = nnx.Param(normal(rngs(), (16, 4, 8)), axes=("embed", "heads", "head_dim"))
        self.experts = nnx.Param(normal(rngs(), (4, 8, 6)), axes=("experts", "head_dim", "mlp"))

    def __call__(self, tokens):
        x = take(constrain(self.table[...], "vocab", "embed"), tokens, ("batch", "seq", "embed"))
        x = einsum("btd,dnk->btnk", x, self.up[...], ("batch", "seq", "heads", "head_dim"))

        def local(x, experts):
            return psum_over(jnp.einsum("btnk,ekf->btnf", x, experts), "experts")

        whole = ("batch", "seq", None, None)
        axes = (whole, ("experts", None, "mlp"))
        return kernel_map(local, axes, ("batch", "seq", None, "mlp"))(x, self.experts[...])


@pytest.mark.parametrize("config", MESHES.values(), ids=MESHES)
def test_values_and_gradients_do_not_depend_on_the_mesh(config):
    tokens = np.arange(32, dtype=np.int32).reshape(8, 4)

    def loss(graphdef, params, tokens):
        return jnp.mean(jnp.square(nnx.merge(graphdef, params)(tokens)))

    step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    graphdef, params = init_params(Toy, jax.random.key(0))
    expected = step(graphdef, params, tokens)
    mesh = make_mesh(config)
    with use_mesh(mesh):
        _, sharded = init_params(Toy, jax.random.key(0), mesh)
        place = jax.NamedSharding(mesh, AxisRules().spec(("batch", "seq")))
        found = step(graphdef, sharded, jax.device_put(tokens, place))
    assert sharded["up"].sharding.spec == AxisRules().param_spec(("embed", "heads", "head_dim"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )


def test_without_a_mesh_they_are_the_plain_operations():
    x = jnp.arange(6.0).reshape(1, 2, 3)
    assert constrain(x, "batch", "seq", "embed") is x
    np.testing.assert_array_equal(
        einsum("btd,df->btf", x, jnp.ones((3, 2)), ("batch", "seq", "mlp")), x @ jnp.ones((3, 2))
    )
    assert kernel_map(max, (), ()) is max
