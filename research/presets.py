"""Published models and scaled ones, as values.

Published sizes: DeepSeek-V2 section 3.1.2 and appendix B, with the widths that the paper leaves out
(dense FFN, vocabulary) from the released configuration files.
"""

from collections.abc import Callable

from research.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig


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


def _scaled(hidden: int, layers: int, heads: int, head: int, experts: int, expert_hidden: int, vocabulary: int) -> ModelConfig:
    """DeepSeek-V2 shrunk by one rule.

    Kept: d_h^R = d_h / 2, d_c = 2 d_h (d_c / (n_h d_h) is 1/32 in V2 and cannot be kept with few
    heads), d_c' = 3 d_c / 2 ... of V2's 3 d_c, D = 8 devices, M = 3, K = 6, 2 shared experts, first
    layer dense, dense FFN 2.4 d.  Not kept: experts per device (4 or 8 instead of 20) and expert
    width over d (0.25 instead of 0.3).  The gate is scaled so that the chosen experts start with
    weights of order one, as 16 does for 160 experts: routed_scaling_factor = experts / 10.
    """
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=int(2.4 * hidden) // 16 * 16,
        attention=AttentionConfig(
            num_attention_heads=heads,
            q_lora_rank=3 * head,
            kv_lora_rank=2 * head,
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
    """About 1M parameters: for a two-core machine and a quarter of an hour."""
    return _scaled(hidden=128, layers=3, heads=4, head=32, experts=32, expert_hidden=32, vocabulary=1024)


def deepseek_v2_micro() -> ModelConfig:
    """About 5M parameters."""
    return _scaled(hidden=192, layers=4, heads=6, head=32, experts=64, expert_hidden=32, vocabulary=4096)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "deepseek-v2": deepseek_v2,
    "deepseek-v2-lite": deepseek_v2_lite,
    "deepseek-v2-nano": deepseek_v2_nano,
    "deepseek-v2-micro": deepseek_v2_micro,
}


def preset(name: str) -> ModelConfig:
    """The model of that name; KeyError names the valid ones."""
    if name not in PRESETS:
        raise KeyError(f"no preset {name!r}; valid: {', '.join(PRESETS)}")
    return PRESETS[name]()
