"""What settings are checked by."""

from __future__ import annotations

from ..errors import InputError


def require(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raise an InputError that names the field, its value and the remedy, unless ``ok``."""
    if not ok:
        raise InputError(f"{field}={value!r}: {remedy}")
