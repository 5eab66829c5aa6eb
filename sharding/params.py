"""Parameters: a module's plain nested dict of arrays, its logical axes, and its creation on a mesh.

``abstract -> shardings -> init``: shapes first, then where each tensor lies, then one jitted
initialisation whose outputs are born sharded, so that no device ever holds a whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..errors import InputError
from .axes import AxisRules

Params = dict[Any, Any]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The module's structure and its parameters as a nested dict of arrays."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def abstract(build: Callable[[jax.Array], nnx.Module]) -> tuple[nnx.GraphDef, Params, Params]:
    """``(graphdef, shapes, axes)`` of the module that ``build(key)`` makes, without making it.

    ``shapes`` holds a ``ShapeDtypeStruct`` and ``axes`` a tuple of logical names at every leaf.
    """
    module = nnx.eval_shape(lambda: build(jax.random.key(0)))
    graphdef, shapes = split(module)
    return graphdef, shapes, param_axes(module)


def param_axes(module: nnx.Module) -> Params:
    """The logical axes of every parameter, in the shape of the parameter dict.

    A parameter with more dimensions than it names is stacked: the leading ones are ``layers``.
    """
    tree: Params = {}
    for path, param in nnx.to_flat_state(nnx.state(module)):
        axes = param.get_metadata().get("axes")
        if axes is None:
            raise TypeError(f"parameter {path_name(path)} has no `axes` metadata")
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = ("layers",) * (len(param.shape) - len(axes)) + tuple(axes)
    return tree


def path_name(path: tuple[Any, ...]) -> str:
    """A parameter's path as users see it: ``stack.body.0.mixer.q_proj.kernel``."""
    return ".".join(str(getattr(key, "key", key)) for key in path)


def shardings(shapes: Params, axes: Params, mesh: Mesh, rules: AxisRules) -> Params:
    """A ``NamedSharding`` for every parameter.

    Raises:
        InputError: a dimension does not divide over its mesh axis; names tensor, both, and sizes.
    """

    def one(path, shape, names):
        spec = rules.param_spec(names, mesh.axis_names)
        for size, name, entry in zip(shape.shape, names, spec, strict=True):
            mesh_axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
            for mesh_axis in mesh_axes:
                if size % mesh.shape[mesh_axis]:
                    raise InputError(
                        f"tensor `{path_name(path)}` dim `{name}`={size} does not divide mesh "
                        f"axis `{mesh_axis}`={mesh.shape[mesh_axis]}; change mesh.{mesh_axis} or "
                        f"the rule for `{name}`"
                    )
                size //= mesh.shape[mesh_axis]
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(one, shapes, axes)


def init_params(
    build: Callable[[jax.Array], nnx.Module],
    key: jax.Array,
    mesh: Mesh | None = None,
    rules: AxisRules | None = None,
) -> tuple[nnx.GraphDef, Params]:
    """``(graphdef, params)`` of ``build(key)``, every parameter created on its own shard.

    The values do not depend on the mesh.
    """
    graphdef, shapes, axes = abstract(build)

    def init(key):
        return split(build(key))[1]

    if mesh is None:
        return graphdef, jax.jit(init, compiler_options=init_compiler_options())(key)
    places = shardings(shapes, axes, mesh, rules or AxisRules())
    with jax.set_mesh(mesh):
        return graphdef, jax.jit(
            init, out_shardings=places, compiler_options=init_compiler_options()
        )(key)


def init_compiler_options(platform: str | None = None) -> dict[str, int] | None:
    """Options for a jitted initialisation on ``platform`` (the default backend if None).

    It runs once and is nearly all random draws, whose code XLA's CPU backend takes several times
    longer to optimise than to run.
    """
    cpu = (platform or jax.default_backend()) == "cpu"
    return {"xla_backend_optimization_level": 0} if cpu else None
