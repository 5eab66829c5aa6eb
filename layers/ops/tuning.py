"""What was measured to be best on a kind of device: block sizes, and which implementation.

``tuning.json``, beside this file, maps ``operator -> device kind -> shape class -> choices``, and
``bench/tune.py`` rewrites the entries of the device that it runs on; sizes of KDA's TPU kernel may
come from ``bench/tpu_schedule.py``, which needs none. Operators look their choices up while they
are traced, for the device kind of the mesh in force, or of this host's first device where there is
none. A kind or a class that is not in the table has the defaults of the code. An entry that names
an ``implementation`` is how a kernel becomes what ``implementation=None`` runs: on the kind of
device that it was timed on, and nowhere else.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from ...errors import InputError

PATH = pathlib.Path(__file__).with_name("tuning.json")
# What can be chosen, by operator: the type of each choice.
CHOICES: dict[str, dict[str, type]] = {
    "grouped_matmul": {
        "implementation": str,
        "block": int,  # rows a turn, of the form for CPUs
        # Of the GPU kernels: sides of a tile, warps of a program, stages of its pipeline.
        "row_tile": int,
        "column_tile": int,
        "depth_tile": int,
        "warps": int,
        "stages": int,
    },
    "kda": {
        "implementation": str,
        "chunk_size": int,  # of what `implementation=None` runs
        # Of the device's kernel, where it is asked for by name.
        "pallas_chunk_size": int,
        "heads": int,  # a grid step, on TPU
        # Of the TPU kernels: chains that fill each other's gaps, a grid step.
        "tasks": int,
        # On GPU: columns of the state and key channels a program, warps where each is cut up.
        "value_block": int,
        "key_block": int,
        "carry_warps": int,
        "transpose_warps": int,
    },
    "latent_decode": {"implementation": str},
    "linear_cross_entropy": {"chunk_size": int},
}
# What else an entry holds: how it was found, by "time" or by the compiler's "schedule" of a device
# that nobody had.
FACTS = ("by", "date", "jax", "speedup")
# Choices that say what `implementation=None` runs, and how: they are made by time.
_TIMED = ("implementation", "chunk_size")

Table = dict[str, dict[str, dict[str, dict[str, Any]]]]
_TRIED: contextvars.ContextVar[Mapping[str, Mapping[str, Any]] | None] = contextvars.ContextVar(
    "tried", default=None
)


def device() -> tuple[str, str]:
    """Platform and kind (``"cpu"``, ``"TPU v6 lite"``, ...) of what is being traced for.

    A platform has the name that code is lowered for: of a GPU it is ``"cuda"`` or ``"rocm"``.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    if found is None:
        found = jax.devices()[0]
    platform, kind = found.platform, found.device_kind
    if platform == "gpu":
        platform = "cuda" if kind.startswith("NVIDIA") else "rocm"
    return platform, kind


def chosen(operator: str, shape_class: str) -> dict[str, Any]:
    """The choices for this operator and class of shapes on :func:`device`; {} where none is known.

    Sizes count where the code is lowered for another platform too: every size is right anywhere. An
    implementation is not; see :func:`chosen_implementation`.
    """
    tried = _TRIED.get() or {}
    if operator in tried:
        return dict(tried[operator])
    kinds = _committed().get(operator, {})
    # Without an entry of the operator, no device has to be asked for.
    entry = kinds.get(device()[1], {}).get(shape_class, {}) if kinds else {}
    return {name: entry[name] for name in CHOICES[operator] if name in entry}


def chosen_implementation(operator: str, shape_class: str) -> dict[str, str]:
    """``{platform: implementation}`` where the table names one, {} where it does not.

    For ``jax.lax.platform_dependent``: a program may be lowered for another platform than that of
    the device that it is traced for.
    """
    name = chosen(operator, shape_class).get("implementation")
    return {} if name is None else {device()[0]: name}


@contextlib.contextmanager
def trying(operator: str, **choices: Any) -> Iterator[None]:
    """Trace the body with these choices for an operator, whatever the table says.

    JAX's trace cache does not see them: trace a new function under each.
    """
    _check_choices(operator, choices, "trying")
    token = _TRIED.set({**(_TRIED.get() or {}), operator: choices})
    try:
        yield
    finally:
        _TRIED.reset(token)


def read(path: pathlib.Path = PATH) -> Table:
    """The table.

    Raises:
        InputError: an operator, a choice, a type or a way of finding it that is unknown, or a
            default that was not timed.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    for operator, kinds in table.items():
        for kind, classes in kinds.items():
            for name, entry in classes.items():
                where = f"{path.name}: {operator} / {kind} / {name}"
                _check_entry(operator, entry, where)
    return table


def write(
    operator: str,
    kind: str,
    entries: Mapping[str, Mapping[str, Any] | None],
    path: pathlib.Path = PATH,
) -> None:
    """Replace the entries of some shape classes; None removes one. All at once, and sorted."""
    table = read(path) if path.exists() else {}
    classes = table.setdefault(operator, {}).setdefault(kind, {})
    for name, entry in entries.items():
        if entry is None:
            classes.pop(name, None)
            continue
        _check_entry(operator, entry, f"{operator} / {kind} / {name}")
        classes[name] = dict(entry)
    if not classes:
        del table[operator][kind]
    if not table[operator]:
        del table[operator]
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    new = path.with_suffix(".json.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
    _committed.cache_clear()


@functools.cache
def _committed() -> Table:
    return read(PATH)


def _check_entry(operator: str, entry: Mapping[str, Any], where: str) -> None:
    _check_choices(operator, {k: v for k, v in entry.items() if k not in FACTS}, where)
    by = entry.get("by", "time")
    if by not in ("time", "schedule"):
        raise InputError(f"{where}: {by=} must be 'time' or 'schedule'")
    wrong = [name for name in _TIMED if name in entry]
    if by == "schedule" and wrong:
        raise InputError(
            f"{where}: {wrong[0]!r} decides what implementation=None runs, and {by=} is not a time"
        )


def _check_choices(operator: str, choices: Mapping[str, Any], where: str) -> None:
    if operator not in CHOICES:
        raise InputError(f"{where}: {operator!r} is not one of {sorted(CHOICES)}")
    for name, value in choices.items():
        kind = CHOICES[operator].get(name)
        if kind is None:
            raise InputError(f"{where}: {name!r} is not one of {sorted(CHOICES[operator])}")
        if type(value) is not kind or (kind is int and value < 1):
            raise InputError(
                f"{where}: {name}={value!r} must be a {'positive ' * (kind is int)}{kind.__name__}"
            )


def up_to_power_of_2(size: int) -> int:
    """The least power of two that is no smaller: a class of sizes."""
    return 1 << (size - 1).bit_length()
