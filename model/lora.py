"""LoRA (arXiv 2106.09685) on any family: adapters beside its linear maps, and folding them in."""

from __future__ import annotations

import dataclasses
import zlib
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import InputError
from ..layers.lora import LoRA
from ..sharding import split
from .handle import Model
from .targets import check_patterns, linears, matching


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters ``lora.a`` and ``lora.b`` on linear maps, in scanned blocks too.

    Fresh ones add zeros: the model is what it was. They are trained by an optimizer whose
    ``trainable`` is ``LoRAConfig.trainable``.

    Attributes:
        rank: of the adapters.
        alpha: an adapter's output is scaled by ``alpha / rank``.
        targets: regular expressions; every linear map is adapted in whose path
            (``stack.body.0.mixer.q_proj``) one of them is found.
    """

    kind: ClassVar[str] = "lora"
    trainable: ClassVar[str] = r".*\.lora\.[ab]"

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"_proj$",)

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"retrofits.rank={self.rank} must be 1 or more; 8 is a usual one")
        if not self.alpha > 0:
            raise InputError(
                f"retrofits.alpha={self.alpha} must be above 0; twice the rank is usual"
            )
        object.__setattr__(self, "targets", check_patterns(self.targets, "retrofits.targets"))

    def attach(self, module: nnx.Module, key: jax.Array) -> None:
        """Set ``lora`` on the linear maps; an adapter's values depend on its path and no other's.

        Raises:
            InputError: a target is found in no path.
        """
        found = linears(module)
        for name in matching(found, self.targets, "retrofits.targets"):
            linear = found[name]
            linear.lora = LoRA(
                linear.kernel.shape,
                linear.kernel.get_metadata()["axes"],
                len(linear.out_axes),
                rank=self.rank,
                alpha=self.alpha,
                rngs=nnx.Rngs(jax.random.fold_in(key, zlib.crc32(name.encode()))),
            )


def adapted(module: nnx.Module) -> dict[str, nnx.Module]:
    """The linear maps that have an adapter, by path."""
    return {name: x for name, x in linears(module).items() if getattr(x, "lora", None) is not None}


def merge_lora(model: Model) -> Model:
    """The model without adapters, whose kernels do what kernels and adapters did together.

    The sums are made in float32 and kept in the kernels' dtype. All other arrays are shared.

    Raises:
        InputError: it has no adapters, or they stand on int8 weights.
    """
    module = model.module()
    if not (found := adapted(module)):
        raise InputError("merge_lora: the model has no adapters; attach them with LoRAConfig")
    for name, linear in found.items():
        if hasattr(linear, "kernel_scale"):
            raise InputError(
                f"merge_lora: {name} is int8, which cannot hold the sum; merge into "
                "dequantize_weights(model), or into the model that was quantized"
            )
        kernel, (graphdef, lora) = linear.kernel[...], split(linear.lora)
        with model.context():
            fold = jax.jit(_fold, static_argnums=1, out_shardings=kernel.sharding)
            linear.kernel[...] = fold(kernel, graphdef, lora)
        del linear.lora
    kept = tuple(r for r in getattr(module, "retrofits", ()) if r.kind != LoRAConfig.kind)
    del module.retrofits
    if kept:
        module.retrofits = kept
    graphdef, params = split(module)
    return dataclasses.replace(model, graphdef=graphdef, params=params)


def _fold(kernel, graphdef, lora):
    delta = nnx.merge(graphdef, lora).delta()
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
