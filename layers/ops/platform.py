"""Kernels for one platform, in programs whose platform is known only when they are lowered."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ...errors import InputError

REMEDY = 'use implementation="xla", or None for the best one where the code is lowered'


def by_platform(choices: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """One function that runs the choice for the platform that it is lowered for.

    Args:
        choices: functions by platform, one of them ``"default"``, of the same arrays and static
            keywords. One that raises an InputError when it is traced, as it cannot take these
            arrays, gives way to the default, with a warning.
    """
    if len(choices) == 1:
        return choices["default"]

    def run(*arrays, **static):
        default = functools.partial(choices["default"], **static)

        def or_default(fn):
            def one(*arrays):
                try:
                    return fn(*arrays, **static)
                except InputError as error:
                    warnings.warn(f"the default is used instead: {error}", stacklevel=2)
                    return default(*arrays)

            return one

        others = {name: or_default(fn) for name, fn in choices.items() if name != "default"}
        return jax.lax.platform_dependent(*arrays, default=default, **others)

    return run


@functools.cache
def only_on(platform: str, implementation: str, operator: str) -> Callable[[jax.Array], jax.Array]:
    """An identity that raises InputError when it is lowered for another platform.

    Which platform a program is for is known only then.
    """
    primitive = Primitive(f"{operator}_{implementation}_platform")
    primitive.def_impl(lambda x: jax.jit(primitive.bind)(x))
    primitive.def_abstract_eval(lambda x: x)
    ad.deflinear2(primitive, lambda cotangent, x: [cotangent])
    batching.primitive_batchers[primitive] = lambda xs, dims: (primitive.bind(*xs), dims[0])

    def elsewhere(ctx, x):
        named = f'{operator}: implementation="{implementation}"'
        platforms = ", ".join(ctx.module_context.platforms)
        raise InputError(f"{named} is being lowered for {platforms}: {REMEDY}")

    mlir.register_lowering(primitive, elsewhere)
    mlir.register_lowering(primitive, lambda ctx, x: [x], platform=platform)
    return primitive.bind


def check_floats(implementation: str, **arrays: jax.Array) -> None:
    """Raises InputError for an array, by its name, that is neither float32 nor bfloat16."""
    for name, x in arrays.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise InputError(
                f'{name} has dtype {x.dtype}; implementation="{implementation}" takes float32 and '
                f"bfloat16: cast it, or {REMEDY}"
            )
