"""Kimi Linear: a hybrid of Kimi Delta Attention and NoPE latent attention with mixtures of experts.

Source: "Kimi Linear: An Expressive, Efficient Attention Architecture", arXiv 2510.26692, and the
configuration of the released 48B-A3B checkpoints.
"""

from __future__ import annotations

import dataclasses

from flax import nnx
from jax.typing import DTypeLike

from ..errors import InputError
from ..layers.kimi_delta_attention import KimiDeltaAttention
from ..layers.latent_attention import LatentAttention
from ..layers.mlp import SwiGLU
from ..layers.moe import MoE
from ..layers.norm import RMSNorm
from ..layers.ops.grouped_matmul import IMPLEMENTATIONS as EXPERT_IMPLEMENTATIONS
from ..layers.ops.latent_decode import IMPLEMENTATIONS as DECODE_IMPLEMENTATIONS
from ..layers.segments import is_token
from ..sharding import constrain
from .decoder import Decoder, check_config

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "kda_num_heads",
    "kda_head_dim",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "short_conv_kernel_size",
)


@dataclasses.dataclass(frozen=True)
class KimiLinearConfig:
    """The shape of a Kimi Linear model. Layer lists count from 1, as the published ones do.

    Attributes:
        vocab_size: rows of the embedding and of the (untied) output head.
        hidden_size: model width D.
        num_layers: blocks; ``kda_layers`` and ``full_attn_layers`` together name each once.
        kda_layers: blocks that mix by Kimi Delta Attention.
        full_attn_layers: blocks that mix by multi-head latent attention.
        kda_num_heads, kda_head_dim: of KDA; ``kda_num_value_heads`` is ``kda_num_heads`` if None.
        kda_gate_lower_bound: None for the softplus gate of the published weights; -5 for the
            bounded gate.
        short_conv_kernel_size: taps of KDA's short convolutions.
        num_attention_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of MLA.
        intermediate_size: hidden units of the dense feed-forward layers.
        first_k_dense_replace: the first blocks, whose feed-forward layer is dense.
        num_experts: routed experts; 0 makes every feed-forward layer dense.
        num_experts_per_token, moe_intermediate_size, num_shared_experts: of a mixture.
        num_expert_group, topk_group: expert groups, and how many of them a token may use.
        moe_renormalize: divide the chosen experts' weights by their sum.
        routed_scaling_factor: multiplies the routed experts' output.
        rms_norm_eps: of every norm but the latent's, which has 1e-6.
        initializer_range: standard deviation of the initial weights.
        bos_token_id, eos_token_id, pad_token_id: special ids, None where there is none.
        dtype: of activations and products; parameters are float32.
        scan_layers: run the repeated group of blocks by one scan.
        remat: what the backward pass keeps, a name of ``REMAT_POLICIES``.
        kda_chunk_size: tokens a chunk of the KDA operator; None is what is best on the device, as
            far as that was measured, else 64.
        kda_implementation, attention_implementation: None picks by platform.
        decode_implementation: how a few new tokens read the cache of MLA, a name of
            :func:`~jaxalope.layers.ops.latent_decode.latent_decode`; None picks by platform.
        expert_implementation: how rows are multiplied with their experts' weights, a name of
            :func:`~jaxalope.layers.ops.grouped_matmul.grouped_matmul`; None picks by platform.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    kda_layers: tuple[int, ...]
    full_attn_layers: tuple[int, ...]
    kda_num_heads: int
    kda_head_dim: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    num_expert_group: int = 1
    topk_group: int = 1
    moe_renormalize: bool = True
    routed_scaling_factor: float = 1.0
    kda_num_value_heads: int | None = None
    kda_gate_lower_bound: float | None = None
    short_conv_kernel_size: int = 4
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    kda_chunk_size: int | None = None
    kda_implementation: str | None = None
    attention_implementation: str | None = None
    decode_implementation: str | None = None
    expert_implementation: str | None = None

    def __post_init__(self):
        check_config(self, _POSITIVE)
        for name in ("kda_layers", "full_attn_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        listed = sorted(self.kda_layers + self.full_attn_layers)
        if listed != list(range(1, self.num_layers + 1)):
            raise InputError(
                f"model.kda_layers={self.kda_layers} and model.full_attn_layers="
                f"{self.full_attn_layers} must together name each of the layers "
                f"1..{self.num_layers} once"
            )
        if self.num_experts:
            self._check_experts()
        for name, known in (
            ("decode_implementation", DECODE_IMPLEMENTATIONS),
            ("expert_implementation", EXPERT_IMPLEMENTATIONS),
        ):
            if getattr(self, name) not in (None, *known):
                raise InputError(
                    f"model.{name}={getattr(self, name)!r} is not one of {', '.join(known)}; "
                    "leave it None to pick by platform"
                )
        values = self.kda_num_value_heads or self.kda_num_heads
        if values % self.kda_num_heads:
            raise InputError(
                f"model.kda_num_value_heads={values} is not a multiple of "
                f"model.kda_num_heads={self.kda_num_heads}"
            )

    def _check_experts(self):
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise InputError(
                f"model.num_experts_per_token={self.num_experts_per_token} must lie in "
                f"1..num_experts={self.num_experts}"
            )
        if self.moe_intermediate_size < 1:
            raise InputError(
                f"model.moe_intermediate_size={self.moe_intermediate_size} must be at least 1 "
                "where there are experts"
            )
        if self.num_experts % self.num_expert_group or not (
            1 <= self.topk_group <= self.num_expert_group
        ):
            raise InputError(
                f"model.num_expert_group={self.num_expert_group} must divide num_experts="
                f"{self.num_experts}, and topk_group={self.topk_group} must lie in 1..that"
            )

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """``(mixer, feed-forward)`` of every block: ``("kda" | "mla", "dense" | "moe")``."""
        full = set(self.full_attn_layers)
        return tuple(
            (
                "mla" if layer in full else "kda",
                "moe" if self.num_experts and layer > self.first_k_dense_replace else "dense",
            )
            for layer in range(1, self.num_layers + 1)
        )

    # -- Presets ----------------------------------------------------------------------------------

    @classmethod
    def kimi_linear_48b(cls) -> KimiLinearConfig:
        """The released 48B-A3B Base and Instruct models."""
        full = (4, 8, 12, 16, 20, 24, 27)
        return cls(
            vocab_size=163840,
            hidden_size=2304,
            num_layers=27,
            kda_layers=tuple(i for i in range(1, 28) if i not in full),
            full_attn_layers=full,
            kda_num_heads=32,
            kda_head_dim=128,
            num_attention_heads=32,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            intermediate_size=9216,
            moe_intermediate_size=1024,
            num_experts=256,
            num_experts_per_token=8,
            routed_scaling_factor=2.446,
            bos_token_id=163584,
            eos_token_id=163586,
            pad_token_id=163839,
            dtype="bfloat16",
            remat="full",
        )

    @classmethod
    def _scaling(cls, heads: int, hidden_size: int, expert_size: int) -> KimiLinearConfig:
        """A model of the report's scaling-law table: as many layers as heads, 3 KDA to 1 MLA.

        The table gives heads, layers, width and active parameters (64 experts, 8 active). The
        experts' width is not published: ``expert_size`` is what makes the active parameters agree
        within 1%, with the released model's one shared expert and dense width of 9 experts.
        """
        full = tuple(range(4, heads + 1, 4))
        return dataclasses.replace(
            cls.kimi_linear_48b(),
            hidden_size=hidden_size,
            num_layers=heads,
            kda_layers=tuple(i for i in range(1, heads + 1) if i not in full),
            full_attn_layers=full,
            kda_num_heads=heads,
            num_attention_heads=heads,
            intermediate_size=9 * expert_size,
            moe_intermediate_size=expert_size,
            num_experts=64,
            routed_scaling_factor=2.446,
        )

    @classmethod
    def scaling_653m(cls) -> KimiLinearConfig:
        """The report's scaling-law model with 653M active parameters."""
        return cls._scaling(16, 1216, 928)

    @classmethod
    def scaling_878m(cls) -> KimiLinearConfig:
        """The report's scaling-law model with 878M active parameters."""
        return cls._scaling(18, 1376, 960)

    @classmethod
    def scaling_1b1(cls) -> KimiLinearConfig:
        """The report's scaling-law model with 1.1B active parameters."""
        return cls._scaling(20, 1536, 928)

    @classmethod
    def scaling_1b4(cls) -> KimiLinearConfig:
        """The report's scaling-law model with 1.4B active parameters."""
        return cls._scaling(22, 1632, 1024)

    @classmethod
    def scaling_1b7(cls) -> KimiLinearConfig:
        """The report's scaling-law model with 1.7B active parameters."""
        return cls._scaling(24, 1776, 1024)

    @classmethod
    def demo(cls) -> KimiLinearConfig:
        """A byte-level model of 1.5M parameters that learns on two CPU cores in minutes."""
        return cls(
            vocab_size=320,
            hidden_size=128,
            num_layers=4,
            kda_layers=(1, 2, 3),
            full_attn_layers=(4,),
            kda_num_heads=4,
            kda_head_dim=32,
            num_attention_heads=4,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=384,
            moe_intermediate_size=96,
            num_experts=8,
            num_experts_per_token=2,
            routed_scaling_factor=1.41,
            kda_chunk_size=32,
        )

    @classmethod
    def tiny(cls) -> KimiLinearConfig:
        """For tests: every kind of layer, a repeated group and an irregular tail, all small."""
        return cls(
            vocab_size=320,
            hidden_size=32,
            num_layers=6,
            kda_layers=(1, 2, 4, 6),
            full_attn_layers=(3, 5),
            kda_num_heads=2,
            kda_head_dim=8,
            num_attention_heads=2,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_token=2,
            routed_scaling_factor=1.41,
            kda_chunk_size=16,
        )

    # -- Counts -----------------------------------------------------------------------------------

    def num_params(self, *, active: bool = False, embedding: bool = True, head: bool = True) -> int:
        """The number of parameters.

        Args:
            active: count only the experts that one token uses.
            embedding: include the input embedding.
            head: include the output head.
        """
        total = sum(self._mixer_params(mixer) for mixer, _ in self.kinds)
        total += sum(self._ffn_params(ffn, active) for _, ffn in self.kinds)
        total += self.hidden_size * (2 * self.num_layers + 1)  # norms
        return total + self.vocab_size * self.hidden_size * (embedding + head)

    def _mixer_params(self, mixer: str) -> int:
        d = self.hidden_size
        if mixer == "kda":
            keys = self.kda_num_heads * self.kda_head_dim
            heads = self.kda_num_value_heads or self.kda_num_heads
            values, rank = heads * self.kda_head_dim, self.kda_head_dim
            projections = d * (2 * keys + values) + values * d
            gates = 2 * (d * rank + rank * values) + d * heads
            convolutions = self.short_conv_kernel_size * (2 * keys + values)
            return projections + gates + convolutions + heads + values + self.kda_head_dim
        heads, qk = self.num_attention_heads, self.qk_nope_head_dim + self.qk_rope_head_dim
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        compress = d * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        return d * heads * qk + compress + expand + heads * self.v_head_dim * d

    def _ffn_params(self, ffn: str, active: bool) -> int:
        d = self.hidden_size
        if ffn == "dense":
            return 3 * d * self.intermediate_size
        experts = self.num_experts_per_token if active else self.num_experts
        router = d * self.num_experts + self.num_experts
        return router + 3 * d * self.moe_intermediate_size * (experts + self.num_shared_experts)

    def flops_per_token(self, sequence_length: int) -> float:
        """Model FLOPs a trained token costs, forward and backward (3 times forward).

        Two a multiply-add, dense products, causal attention at its average length; the KDA operator
        by its chunk form (6 K V + 6 C K + 4 C V + C² a value head). Rematerialisation is not
        counted.
        """
        matrices = self.num_params(active=True, embedding=False)
        heads = self.kda_num_value_heads or self.kda_num_heads
        width, chunk = self.kda_head_dim, self.kda_chunk_size or 64
        kda = heads * (6 * width * width + 10 * chunk * width + chunk * chunk)
        qkv = self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim
        mla = self.num_attention_heads * qkv * sequence_length  # 2 FLOPs * length / 2
        mixers = len(self.kda_layers) * kda + len(self.full_attn_layers) * mla
        return 3.0 * (2 * matrices + mixers)


class KimiLinearBlock(nnx.Module):
    """A pre-norm residual block: ``x + mixer(norm(x))``, then ``x + ffn(norm(x))``."""

    def __init__(self, config: KimiLinearConfig, kind: tuple[str, str], *, rngs: nnx.Rngs):
        c, (mixer, ffn) = config, kind
        init = {"rngs": rngs, "stddev": c.initializer_range}
        self.input_norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        if mixer == "kda":
            self.mixer = KimiDeltaAttention(
                c.hidden_size,
                c.kda_num_heads,
                c.kda_head_dim,
                num_value_heads=c.kda_num_value_heads,
                conv_size=c.short_conv_kernel_size,
                gate_lower_bound=c.kda_gate_lower_bound,
                epsilon=c.rms_norm_eps,
                chunk_size=c.kda_chunk_size,
                implementation=c.kda_implementation,
                **init,
            )
        else:
            self.mixer = LatentAttention(
                c.hidden_size,
                c.num_attention_heads,
                kv_lora_rank=c.kv_lora_rank,
                qk_nope_head_dim=c.qk_nope_head_dim,
                qk_rope_head_dim=c.qk_rope_head_dim,
                v_head_dim=c.v_head_dim,
                implementation=c.attention_implementation,
                decode_implementation=c.decode_implementation,
                **init,
            )
        self.post_norm = RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps)
        if ffn == "dense":
            self.ffn = SwiGLU(c.hidden_size, c.intermediate_size, **init)
        else:
            self.ffn = MoE(
                c.hidden_size,
                c.moe_intermediate_size,
                num_experts=c.num_experts,
                top_k=c.num_experts_per_token,
                num_shared_experts=c.num_shared_experts,
                num_expert_groups=c.num_expert_group,
                topk_groups=c.topk_group,
                renormalize=c.moe_renormalize,
                routed_scaling_factor=c.routed_scaling_factor,
                implementation=c.expert_implementation,
                **init,
            )

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike):
        """The mixer's cache."""
        if isinstance(self.mixer, KimiDeltaAttention):
            return self.mixer.init_cache(batch, dtype)
        return self.mixer.init_cache(batch, max_length, dtype)

    def __call__(self, x, cache=None, *, length=None, segment_ids=None, positions=None):
        """``(x, cache, stats)``; see :class:`~jaxalope.layers.stack.Stack`."""
        del positions
        normed = self.input_norm(x)
        if isinstance(self.mixer, KimiDeltaAttention):
            mixed, cache = self.mixer(normed, cache, segment_ids=segment_ids)
        else:
            mixed, cache = self.mixer(normed, cache, length=length, segment_ids=segment_ids)
        x = x + mixed
        normed = self.post_norm(x)
        if isinstance(self.ffn, SwiGLU):
            return constrain(x + self.ffn(normed), "batch", "seq", "embed"), cache, {}
        valid = None if segment_ids is None else is_token(segment_ids)
        out, load = self.ffn(normed, valid=valid)
        stats = {"ffn": {"router": {"bias": load}}}
        return constrain(x + out, "batch", "seq", "embed"), cache, stats


class KimiLinear(Decoder):
    """The language model; nothing in it depends on ``positions``."""

    def __init__(self, config: KimiLinearConfig, *, rngs: nnx.Rngs):
        norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        super().__init__(config, KimiLinearBlock, norm, rngs=rngs)
