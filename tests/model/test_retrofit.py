import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalope.errors import InputError
from jaxalope.layers.linear import Embedding, Linear
from jaxalope.model import DecodingHeadsConfig, Model, add_decoding_heads, attach
from jaxalope.model.registry import FAMILIES, decoding_of
from jaxalope.model.retrofit import attached, build, hidden_size, retrofits_from_list
from jaxalope.sharding import MeshConfig, abstract, make_mesh, path_name, split, use_mesh

KEY, HEADS = jax.random.key(0), jax.random.key(1)


class Small(nnx.Module):
    """The two doors and nothing else; in bfloat16, as large models compute."""

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.embed = Embedding(24, 16, rngs=rngs, stddev=1.0)
        self.head = Linear({"embed": 16}, {"vocab": 24}, rngs=rngs, stddev=1.0)

    def hidden_states(self, tokens, cache=None, *, segment_ids=None, positions=None):
        return self.embed(tokens, jnp.bfloat16), None, {}

    def logits(self, hidden):
        return self.head(hidden).astype(jnp.float32)

    def __call__(self, tokens, cache=None):
        return self.logits(self.hidden_states(tokens)[0]), None


def _flat(params):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_with_the_doors_takes_heads_and_any_other_is_refused(family):
    config_type, model_type = FAMILIES[family].config, FAMILIES[family].model
    config = config_type.tiny() if hasattr(config_type, "tiny") else config_type()

    def make():
        return abstract(lambda key: build(config, [DecodingHeadsConfig(width=8)], key))

    doors = hasattr(model_type, "hidden_states") and hasattr(model_type, "logits")
    if not doors or decoding_of(config) == "next_vector":
        with pytest.raises(InputError, match=f"model={model_type.__name__} has no"):
            make()
        return
    _, shapes, axes = make()
    base = abstract(lambda key: build(config, [], key))[1]
    ours, theirs = _flat(shapes), _flat(base)
    assert theirs.items() <= ours.items()
    assert {n.split(".")[0] for n in ours.keys() - theirs.keys()} == {"decoding_heads"}
    assert axes["decoding_heads"]["top_p"]["hidden"]["kernel"] == ("embed", "mlp")


def test_base_weights_and_outputs_are_byte_identical_and_heads_do_not_depend_on_them():
    base = Small(KEY)
    before = _flat(split(base)[1])
    copies = {name: np.asarray(x).tobytes() for name, x in before.items()}
    logits = base(jnp.arange(6)[None])[0]
    module = attach(Small(KEY), [DecodingHeadsConfig(width=8)], HEADS)
    after = _flat(split(module)[1])
    assert {n: np.asarray(after[n]).tobytes() for n in copies} == copies
    np.testing.assert_array_equal(module(jnp.arange(6)[None])[0], logits)
    assert attached(module) == ("decoding_heads",) and attached(base) == ()
    other = _flat(split(attach(Small(HEADS), [DecodingHeadsConfig(width=8)], HEADS))[1])
    new = after.keys() - before.keys()
    assert new and all(np.array_equal(after[n], other[n]) for n in new)
    hidden = module.hidden_states(jnp.arange(6)[None])[0]
    temperature, top_p = module.decoding_heads(hidden, module.logits(hidden))
    assert temperature.shape == top_p.shape == (1, 6)
    assert temperature.dtype == jnp.float32


@pytest.mark.parametrize("explicit", [True, False])
def test_under_a_mesh_whose_axes_a_row_would_not_divide(explicit):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, explicit=explicit))
    with use_mesh(mesh):
        module = nnx.eval_shape(lambda: attach(Small(KEY), [DecodingHeadsConfig()], HEADS))
        assert hidden_size(module) == 16


def test_a_handle_gets_heads_on_its_mesh_and_shares_the_arrays_of_the_base():
    graphdef, params = split(Small(KEY))
    plain = Model(None, graphdef, params)
    tokens = jnp.arange(8)[:, None]
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        model = dataclasses.replace(plain, mesh=mesh)
        with_heads = add_decoding_heads(model, HEADS, width=8, initial_top_p=0.8)
        new, old = _flat(with_heads.params), _flat(model.params)
        assert all(new[n] is old[n] for n in old)
        assert not hasattr(model.module(), "decoding_heads")

        def run(params, graphdef=with_heads.graphdef):
            module = nnx.merge(graphdef, params)
            hidden = module.hidden_states(tokens)[0]
            return module.decoding_heads(hidden, module.logits(hidden))

        with with_heads.context():
            _, top_p = jax.jit(run)(with_heads.params)
        np.testing.assert_allclose(top_p, np.full((8, 1), 0.8), rtol=1e-6)
        if mesh is not None:
            kernel = with_heads.params["decoding_heads"]["top_p"]["hidden"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (8, 4)
    with pytest.raises(InputError, match="has decoding_heads already"):
        add_decoding_heads(with_heads, HEADS)


@dataclasses.dataclass(frozen=True)
class _LowRank:
    """A retrofit as they are to be: new attributes deep in the module, old paths as they were."""

    kind: ClassVar[str] = "low_rank"

    def attach(self, module, key):
        module.head.low_rank = Linear(
            {"embed": 16}, {"vocab": 24}, rngs=nnx.Rngs(key), stddev=self.stddev
        )

    stddev: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Wrapper:
    """One that moves what was there."""

    kind: ClassVar[str] = "wrapper"

    def attach(self, module, key):
        module.outer, module.head = (
            module.head,
            Linear({"embed": 16}, {"vocab": 24}, rngs=nnx.Rngs(key)),
        )


def test_the_door_is_for_any_surgery_that_leaves_parameters_where_they_are():
    module = attach(Small(KEY), [_LowRank(), DecodingHeadsConfig(width=8)], HEADS)
    assert attached(module) == ("low_rank", "decoding_heads")
    assert "head.low_rank.kernel" in _flat(split(module)[1])
    with pytest.raises(InputError, match="has low_rank already"):
        attach(module, [_LowRank()], HEADS)
    with pytest.raises(TypeError, match=r"_Wrapper.* replaced or moved the parameter head.kernel"):
        attach(Small(KEY), [_Wrapper()], HEADS)


def test_a_module_without_doors_is_refused():
    with pytest.raises(InputError, match=r"model=Linear has no `hidden_states`"):
        attach(Linear({"embed": 4}, {"mlp": 4}, rngs=nnx.Rngs(0)), [DecodingHeadsConfig()], KEY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lora_"}, r"retrofits.kind='lora_' is not one of \['decoding_heads'"),
        (
            {"kind": "decoding_heads", "depth": 3},
            r"retrofits.depth is no field of 'decoding_heads'",
        ),
        ({"kind": "decoding_heads", "width": 0}, r"retrofits.width=0 must be 1 or more"),
        (
            {"kind": "decoding_heads", "initial_top_p": 1.0},
            r"initial_top_p=1.0 must be above 0 and",
        ),
        (
            {"kind": "decoding_heads", "initial_top_p": 1.5},
            r"initial_top_p=1.5 must be above 0 and",
        ),
        (
            {"kind": "decoding_heads", "initial_temperature": 2.0},
            r"initial_temperature=2.0 must be",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(InputError, match=message):
        retrofits_from_list([values])


def test_settings_are_read_back():
    heads = DecodingHeadsConfig(width=8)
    values = {"kind": heads.kind, **dataclasses.asdict(heads)}
    assert retrofits_from_list([values]) == (heads,)
    assert re.fullmatch(r"[a-z_]+", heads.kind)
