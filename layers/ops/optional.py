"""What operators take from packages that need not be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from ...errors import InputError


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
