"""Named expert shapes from real models, shared by tests and benchmarks."""

import dataclasses

from .. import tuning


@dataclasses.dataclass(frozen=True)
class ExpertShape:
    """Routed experts of one layer: E experts of widths D and F, k chosen for each token."""

    num_experts: int
    top_k: int
    features: int
    hidden_features: int


SHAPES = {
    "kimi_48b": ExpertShape(256, 8, 2304, 1024),  # Kimi-Linear-48B-A3B
    "kimi_653m": ExpertShape(64, 8, 1216, 512),  # smallest scaling-law model of the report
    "kimi_8m": ExpertShape(8, 2, 256, 256),  # the 8M CPU benchmark model
    "tiny": ExpertShape(8, 2, 48, 24),  # goldens
}


def shape_class(num_experts: int, weight: tuple[int, ...]) -> str:
    """Shapes that are tuned alike: as many experts, their sizes up to a power of two."""
    return f"e{num_experts} {tuning.up_to_power_of_2(max(weight[1:]))}"
