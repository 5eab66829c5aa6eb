"""Named shapes of latent attention from real models, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LatentShape:
    """N heads that read one cached latent: V columns of values, and a shared key behind them."""

    num_heads: int
    value_dim: int
    shared_key_dim: int

    @property
    def width(self) -> int:
        """C, the columns that are cached of a token."""
        return self.value_dim + self.shared_key_dim


SHAPES = {
    "kimi_48b": LatentShape(32, 512, 64),  # Kimi-Linear-48B-A3B
    "kimi_653m": LatentShape(16, 512, 64),  # smallest scaling-law model of the report
    "deepseek_v3": LatentShape(128, 512, 64),  # DeepSeek-V2 and V3
    "kimi_8m": LatentShape(4, 64, 16),  # the 8M CPU benchmark model
    "tiny": LatentShape(3, 20, 8),  # goldens
}


def shape_class(width: int, value_dim: int) -> str:
    """Shapes that are tuned alike: latents of these widths."""
    return f"c{width} v{value_dim}"
