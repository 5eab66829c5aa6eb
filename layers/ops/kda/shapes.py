"""Named KDA shapes from real models, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KdaShape:
    """Heads and widths of one KDA layer: H query/key heads, Hv value heads, K and V per head."""

    num_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int


SHAPES = {
    "kimi_48b": KdaShape(32, 32, 128, 128),  # Kimi-Linear-48B-A3B
    "kimi_653m": KdaShape(16, 16, 128, 128),  # smallest scaling-law model of the report
    "synthetic": KdaShape(2, 2, 128, 128),  # the report's palindrome / MQAR / stack models
    "kimi_8m": KdaShape(4, 4, 32, 32),  # the 8M CPU benchmark model
    "gva": KdaShape(2, 4, 16, 24),  # grouped value heads and V != K, for tests
    "tiny": KdaShape(2, 2, 16, 16),  # goldens
}


def shape_class(key_dim: int, value_dim: int) -> str:
    """Shapes that are tuned alike: heads of these widths."""
    return f"k{key_dim} v{value_dim}"
