"""A kernel that is named and lowered for a platform that it is not for: an error that says so."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ....errors import InputError

REMEDY = 'use implementation="xla", or None for the best one where the code is lowered'


def only_on(platform: str, implementation: str) -> Callable[[jax.Array], jax.Array]:
    """An identity that raises InputError when it is lowered for another platform.

    Which platform a program is for is known only then.
    """
    primitive = Primitive(f"latent_decode_{implementation}_platform")
    primitive.def_impl(lambda x: jax.jit(primitive.bind)(x))
    primitive.def_abstract_eval(lambda x: x)
    batching.primitive_batchers[primitive] = lambda xs, dims: (primitive.bind(*xs), dims[0])

    def elsewhere(ctx, x):
        platforms = ", ".join(ctx.module_context.platforms)
        raise InputError(
            f"latent_decode: implementation={implementation!r} is being lowered for {platforms}: "
            f"{REMEDY}"
        )

    mlir.register_lowering(primitive, elsewhere)
    mlir.register_lowering(primitive, lambda ctx, x: [x], platform=platform)
    return primitive.bind
