"""Logical axis names and the rules that map them to mesh axes: the only sharding vocabulary.

A module names the axes of its parameters and activations (``"embed"``, ``"heads"``, ...); an
:class:`AxisRules` says which mesh axes they lie on. Nothing else in the library spells a
``PartitionSpec``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

from jax.sharding import PartitionSpec

from ..errors import InputError

MeshAxes = str | tuple[str, ...] | None

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
LOGICAL_AXES = (
    "batch",
    "seq",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "experts",
    "latent",
    "layers",
)


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """For each logical axis, the mesh axis (or axes) it is split over; ``None`` is replicated.

    ``embed`` speaks of parameters, whose model dimension is where fully-sharded storage goes.
    Activations keep that dimension whole (``activation_embed``), because their batch dimension
    already lies on the same mesh axes; a weight is gathered when it is used.
    """

    batch: MeshAxes = ("data", "fsdp")
    seq: MeshAxes = None
    embed: MeshAxes = "fsdp"
    activation_embed: MeshAxes = None
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    experts: MeshAxes = "expert"
    latent: MeshAxes = None
    layers: MeshAxes = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for axis in _as_tuple(getattr(self, field.name)):
                if axis not in MESH_AXES:
                    raise InputError(
                        f"rules.{field.name}={axis!r} is not a mesh axis; use one of {MESH_AXES}"
                    )

    def spec(
        self, axes: Sequence[str | None], mesh_axes: Sequence[str] = MESH_AXES
    ) -> PartitionSpec:
        """The ``PartitionSpec`` of an activation with these logical ``axes``.

        Args:
            axes: one logical name a dimension; ``None`` leaves a dimension whole.
            mesh_axes: the axes that the mesh has; rules that name others are ignored.

        Raises:
            InputError: an unknown logical name, or two dimensions on one mesh axis.
        """
        return self._spec(["activation_embed" if a == "embed" else a for a in axes], mesh_axes)

    def param_spec(
        self, axes: Sequence[str | None], mesh_axes: Sequence[str] = MESH_AXES
    ) -> PartitionSpec:
        """The ``PartitionSpec`` in which a parameter with these logical ``axes`` is stored."""
        return self._spec(axes, mesh_axes)

    def _spec(self, axes: Sequence[str | None], mesh_axes: Sequence[str]) -> PartitionSpec:
        taken: dict[str, str] = {}
        entries = []
        for name in axes:
            if name is None:
                entries.append(None)
                continue
            if name not in LOGICAL_AXES and name != "activation_embed":
                raise InputError(f"unknown logical axis {name!r}; use one of {LOGICAL_AXES}")
            placed = tuple(a for a in _as_tuple(getattr(self, name)) if a in mesh_axes)
            for axis in placed:
                if axis in taken:
                    raise InputError(
                        f"logical axes {taken[axis]!r} and {name!r} of one array both map to the "
                        f"mesh axis {axis!r}; change one of them in the rules"
                    )
                taken[axis] = name
            entries.append(placed[0] if len(placed) == 1 else placed or None)
        return PartitionSpec(*entries)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


_RULES: contextvars.ContextVar[AxisRules | None] = contextvars.ContextVar("rules", default=None)


@contextlib.contextmanager
def use_rules(rules: AxisRules) -> Iterator[None]:
    """Trace the body under ``rules``.

    JAX's trace cache does not see the rules: a jitted function traced under one set must not be
    called under another. Enter this context once, around everything that a program compiles.
    """
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def current_rules() -> AxisRules:
    """The rules of the enclosing :func:`use_rules`, or the defaults."""
    return _RULES.get() or AxisRules()
