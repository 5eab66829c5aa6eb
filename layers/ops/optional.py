"""What operators take from packages that need not be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

import jax

from ...errors import InputError
from .platform import REMEDY

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX 0.12 announces that the Triton lowering will go.
    triton = None


def tokamax(operator: str, module: str = "tokamax") -> ModuleType:
    """A module of tokamax, for ``implementation="tokamax"`` of an operator.

    Raises:
        InputError: it is not installed, or too old to have this module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'{operator}: implementation="tokamax" needs {module} ({error}): '
            "pip install jaxalope[kernels], on Python 3.12 with jax 0.11 or newer; or leave "
            "implementation None"
        ) from error


def check_triton(implementation: str) -> None:
    """Raises InputError where JAX no longer lowers Pallas kernels through Triton."""
    if triton is None:
        raise InputError(
            f'implementation="{implementation}" needs the Triton lowering of Pallas, which jax '
            f"{jax.__version__} does not have: {REMEDY}"
        )
