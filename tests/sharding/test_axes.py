"""Axis rules: what they map, and what they refuse."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxalope import InputError
from jaxalope.sharding import AxisRules, current_rules, use_rules


def test_default_rules():
    rules = AxisRules()
    assert rules.spec(("batch", "seq", "embed")) == P(("data", "fsdp"), None, None)
    assert rules.spec(("batch", "seq", "heads", "head_dim")) == P(
        ("data", "fsdp"), None, "tensor", None
    )
    assert rules.param_spec(("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)
    assert rules.param_spec(("experts", "embed", "mlp")) == P("expert", "fsdp", "tensor")


def test_axes_that_the_mesh_lacks_are_left_out():
    assert AxisRules().spec(("batch", "heads"), ("data",)) == P("data", None)


def test_collisions_are_refused():
    with pytest.raises(InputError, match=r"'heads' and 'mlp'.*mesh axis 'tensor'"):
        AxisRules().spec(("heads", "mlp"))


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown logical axis 'heds'"):
        AxisRules().spec(("heds",))
    with pytest.raises(InputError, match=r"rules.mlp='model' is not a mesh axis"):
        AxisRules(mlp="model")


def test_rules_hold_inside_their_context_only():
    other = AxisRules(mlp=None)
    with use_rules(other):
        assert current_rules() is other
    assert current_rules() == AxisRules()
