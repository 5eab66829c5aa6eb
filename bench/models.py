"""Models that several benchmarks run."""

import dataclasses

from jaxalope.model import KimiLinearConfig


def kimi_8m() -> KimiLinearConfig:
    """8 layers of width 256: 6 KDA and 2 MLA, 4 heads of 32, 8 experts of which 2 are active."""
    return dataclasses.replace(
        KimiLinearConfig.demo(),
        vocab_size=259,
        hidden_size=256,
        num_layers=8,
        kda_layers=(1, 2, 3, 5, 6, 7),
        full_attn_layers=(4, 8),
        intermediate_size=1024,
        moe_intermediate_size=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
