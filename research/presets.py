"""Published models and scaled ones, as values.

Published sizes: DeepSeek-V2 section 3.1.2 and appendix B, with the widths that the paper leaves out
(dense FFN, vocabulary) from the released configuration files; the others as said at each.  A model
without compression and without the decoupled key is `qk_nope_head_dim=0` with a rotary part as wide
as the head.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from research.config import AttentionConfig, AttentionKind, BalanceConfig, ModelConfig, MoEConfig


def deepseek_v2() -> ModelConfig:
    """DeepSeek-V2, 236B total, 21B activated (V2 section 3.1.2)."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12288,
        attention=AttentionConfig(
            num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            n_routed_experts=160,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=16.0,
            expert_devices=8,
            device_limit=3,
            capacity_factor=1.0,
        ),
    )


def deepseek_v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite, 15.7B total, 2.4B activated (V2 appendix B): one device per layer, alpha 1 only."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        attention=AttentionConfig(
            num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            n_shared_experts=2,
            first_k_dense_replace=1,
            balance=BalanceConfig(expert=0.001, device=0.0, communication=0.0),
        ),
    )


def _plain_attention(kind: AttentionKind, heads: int, head: int, groups: int | None = None, theta: float = 10000.0) -> AttentionConfig:
    return AttentionConfig(
        kind=kind,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        qk_nope_head_dim=0,
        qk_rope_head_dim=head,
        v_head_dim=head,
        rope_theta=theta,
    )


def _dense(layers: int, hidden: int, heads: int, groups: int | None, ffn: int, vocabulary: int, theta: float = 10000.0) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        attention=_plain_attention("gqa" if groups else "mha", heads, hidden // heads, groups, theta),
    )


def deepseek_67b() -> ModelConfig:
    """DeepSeek 67B, dense, 8 key/value heads (DeepSeek LLM, arXiv 2401.02954): what V2's cache and cost are compared with."""
    return _dense(95, 8192, 64, 8, 22016, 102400)


def llama3_70b() -> ModelConfig:
    """LLaMA3 70B, dense, 8 key/value heads (released configuration)."""
    return _dense(80, 8192, 64, 8, 28672, 128256, 500000.0)


def qwen15_72b() -> ModelConfig:
    """Qwen1.5 72B, dense, multi-head (dimensions reproduce its 72.3B; the biases of its projections are left out)."""
    return _dense(80, 8192, 64, None, 24576, 152064, 1000000.0)


_NO_LOSS = BalanceConfig(expert=0.0, device=0.0, communication=0.0)


def _batch_loss(alpha: float, *, first: bool = False) -> BalanceConfig:
    return BalanceConfig(expert=alpha, device=0.0, communication=0.0, scope="batch", count_first_choice_only=first)


def mixtral_8x22b() -> ModelConfig:
    """Mixtral 8x22B: top 2 of 8, renormalised (released configuration).

    Its auxiliary loss sums over both choices, 0.001 times; here frequencies are divided by K, so the weight is 0.002.
    """
    return ModelConfig(
        vocab_size=32000,
        hidden_size=6144,
        num_hidden_layers=56,
        intermediate_size=16384,
        attention=_plain_attention("gqa", 48, 128, 8, 1000000.0),
        moe=MoEConfig(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16384,
            first_k_dense_replace=0,
            norm_topk_prob=True,
            balance=_batch_loss(0.002),
        ),
        rms_norm_eps=1e-5,
    )


def glam_64b_64e() -> ModelConfig:
    """GLaM 64B/64E, 1.2T total, 96.6B activated (arXiv 2112.06905): top 2 of 64 in every other layer.

    Experts of two matrices and dense FFNs of three reproduce the published 96.6B; biases and layer-norm offsets are left out.
    """
    return ModelConfig(
        vocab_size=256000,
        hidden_size=8192,
        num_hidden_layers=64,
        intermediate_size=32768,
        attention=_plain_attention("mha", 128, 128),
        moe=MoEConfig(
            n_routed_experts=64,
            num_experts_per_tok=2,
            moe_intermediate_size=32768,
            first_k_dense_replace=0,
            moe_layer_freq=2,
            norm_topk_prob=True,
            second_expert="by_chance",
            gated_experts=False,
            capacity_factor=1.25,
            capacity_of="expert",
            balance=_batch_loss(0.01, first=True),
        ),
        activation="gelu",
        tie_word_embeddings=True,
    )


def switch_base_128() -> ModelConfig:
    """Switch-Base, 128 experts, 7.4B (arXiv 2101.03961): top 1 in every other layer.

    A decoder of as many layers (24) stands in for its encoder and decoder: T5-Base's widths with gated FFNs,
    without cross-attention (28M parameters) and relative position biases.
    """
    return ModelConfig(
        vocab_size=32128,
        hidden_size=768,
        num_hidden_layers=24,
        intermediate_size=2048,
        attention=_plain_attention("mha", 12, 64),
        moe=MoEConfig(
            n_routed_experts=128,
            num_experts_per_tok=1,
            moe_intermediate_size=2048,
            first_k_dense_replace=1,
            moe_layer_freq=2,
            capacity_factor=1.25,
            capacity_of="expert",
            balance=_batch_loss(0.01),
        ),
        activation="gelu",
        tie_word_embeddings=True,
    )


def deepseekmoe_16b() -> ModelConfig:
    """DeepSeekMoE 16B, 16.4B total, 2.8B activated with the input embedding (arXiv 2401.06066): 2 shared and 6 of 64 experts, MHA."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=28,
        intermediate_size=10944,
        attention=_plain_attention("mha", 16, 128),
        moe=MoEConfig(
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            n_shared_experts=2,
            balance=BalanceConfig(expert=0.001, device=0.0, communication=0.0),
        ),
    )


def ablation_small_mla() -> ModelConfig:
    """The small MLA model of V2 appendix D.2, 15.7B total, 2.4B activated: V2-Lite's sizes."""
    return deepseek_v2_lite()


def ablation_small_mha() -> ModelConfig:
    """The small MHA model of V2 appendix D.2, 15.8B total, 2.5B activated: the same with 16 heads of 128 that are cached whole."""
    return replace(deepseek_v2_lite(), attention=_plain_attention("mha", 16, 128))


def _scaled(
    *, hidden: int, layers: int, heads: int, head: int, experts: int, expert_hidden: int, vocabulary: int, latent: int | None = None
) -> ModelConfig:
    """DeepSeek-V2 shrunk by one rule; `python -m research presets --family` prints what it keeps and what not.

    Kept: n_h d_h = 3.2 d, d_c = n_h d_h / 32, d_c' = 3 d_c, d_h^R = d_h / 2, 20 experts on each of D = 8 devices, M = 3, K = 6,
    2 shared experts, first layer dense, dense FFN 2.4 d, routed_scaling_factor = experts / 10 (16 for 160).  Not kept:
    expert width over d, which shrinks with the budget.  `latent` overrules the rule for d_c, with d_c' = 3 d_c / 2.
    """
    latent_width = latent or heads * head // 32
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=int(2.4 * hidden) // 16 * 16,
        attention=AttentionConfig(
            num_attention_heads=heads,
            q_lora_rank=3 * latent_width // (2 if latent else 1),
            kv_lora_rank=latent_width,
            qk_nope_head_dim=head,
            qk_rope_head_dim=head // 2,
            v_head_dim=head,
        ),
        moe=MoEConfig(
            n_routed_experts=experts,
            num_experts_per_tok=6,
            moe_intermediate_size=expert_hidden,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=experts / 10,
            expert_devices=8,
            device_limit=3,
            capacity_factor=1.0,
        ),
        initializer_range=round(0.006 * (5120 / hidden) ** 0.5, 4),
    )


def deepseek_v2_nano() -> ModelConfig:
    """About 1M parameters, one dense layer and one of experts: for a two-core machine and minutes.

    The exception to the rule: 4 heads, 32 experts and a latent of 64, since one of 4 numbers and experts of a handful teach nothing.
    """
    return _scaled(hidden=128, layers=2, heads=4, head=32, experts=32, expert_hidden=32, vocabulary=1024, latent=64)


def deepseek_v2_micro() -> ModelConfig:
    """About 5M parameters."""
    return _scaled(hidden=160, layers=4, heads=16, head=32, experts=160, expert_hidden=16, vocabulary=2048)


def deepseek_v2_mini() -> ModelConfig:
    """About 25M parameters."""
    return _scaled(hidden=320, layers=5, heads=16, head=64, experts=160, expert_hidden=24, vocabulary=8192)


def deepseek_v2_small() -> ModelConfig:
    """About 120M parameters: for a GPU."""
    return _scaled(hidden=640, layers=7, heads=32, head=64, experts=160, expert_hidden=40, vocabulary=16384)


def _validation(moe: MoEConfig | None) -> ModelConfig:
    """The set-up of DeepSeekMoE's comparison (arXiv 2401.06066, section 4.1) at the size of `deepseek-v2-nano`.

    Multi-head attention; every FFN is of experts that together are 16 FFNs of width 336; no shared scaling, no dropping
    but where the router has it.
    """
    return replace(_nano_of_heads(), intermediate_size=336, moe=moe)


def _nano_of_heads() -> ModelConfig:
    return replace(deepseek_v2_nano(), attention=_plain_attention("mha", 4, 32))


def dense_nano() -> ModelConfig:
    """Dense: one FFN of width 336."""
    return _validation(None)


def _sixteen(chosen: int, balance: BalanceConfig, **changes: Any) -> MoEConfig:
    return MoEConfig(
        n_routed_experts=16,
        num_experts_per_tok=chosen,
        moe_intermediate_size=336,
        first_k_dense_replace=0,
        expert_devices=8,
        balance=balance,
        **changes,
    )


def hash_nano() -> ModelConfig:
    """Hash layers: 1 of 16 experts by the token's id."""
    return _validation(_sixteen(1, _NO_LOSS, selection="hash"))


def switch_nano() -> ModelConfig:
    """Switch Transformer: top 1 of 16 with capacity and its batch loss."""
    return _validation(_sixteen(1, _batch_loss(0.01), capacity_factor=1.25, capacity_of="expert"))


def gshard_nano() -> ModelConfig:
    """GShard: top 2 of 16, renormalised, second expert by chance, with capacity."""
    loss = _batch_loss(0.01, first=True)
    return _validation(_sixteen(2, loss, norm_topk_prob=True, second_expert="by_chance", capacity_factor=1.25, capacity_of="expert"))


def glam_nano() -> ModelConfig:
    """GLaM: as GShard, in every other layer."""
    config = gshard_nano()
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, moe_layer_freq=2))


def mixtral_nano() -> ModelConfig:
    """Mixtral: top 2 of 16, renormalised, dropless."""
    return _validation(_sixteen(2, _batch_loss(0.002), norm_topk_prob=True))


def deepseekmoe_nano() -> ModelConfig:
    """DeepSeekMoE: 1 shared and 7 of 63 experts of a quarter of the width (on one device: 8 do not divide 63)."""
    moe = MoEConfig(
        n_routed_experts=63,
        num_experts_per_tok=7,
        moe_intermediate_size=84,
        n_shared_experts=1,
        first_k_dense_replace=0,
        routed_scaling_factor=6.3,
        balance=BalanceConfig(expert=0.01, device=0.0, communication=0.0),
    )
    return _validation(moe)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek-v2": deepseek_v2,
    "deepseek-v2-lite": deepseek_v2_lite,
    "deepseek-67b": deepseek_67b,
    "llama3-70b": llama3_70b,
    "mixtral-8x22b": mixtral_8x22b,
    "qwen1.5-72b": qwen15_72b,
    "glam-64b-64e": glam_64b_64e,
    "switch-base-128": switch_base_128,
    "deepseekmoe-16b": deepseekmoe_16b,
    "ablation-small-mla": ablation_small_mla,
    "ablation-small-mha": ablation_small_mha,
    "deepseek-v2-nano": deepseek_v2_nano,
    "deepseek-v2-micro": deepseek_v2_micro,
    "deepseek-v2-mini": deepseek_v2_mini,
    "deepseek-v2-small": deepseek_v2_small,
    "dense-nano": dense_nano,
    "hash-nano": hash_nano,
    "switch-nano": switch_nano,
    "gshard-nano": gshard_nano,
    "glam-nano": glam_nano,
    "mixtral-nano": mixtral_nano,
    "deepseekmoe-nano": deepseekmoe_nano,
}
"""The first eleven are published, the next four are DeepSeek-V2 scaled, the last seven one size of model with seven kinds of FFN."""


def preset(name: str) -> ModelConfig:
    """The model of that name; KeyError names the valid ones."""
    if name not in PRESETS:
        raise KeyError(f"no preset {name!r}; valid: {', '.join(PRESETS)}")
    return PRESETS[name]()
