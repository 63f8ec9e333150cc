"""Models of odd sizes with decisive random weights, and Hugging Face's model with the same weights, for the tests beside this file."""

import math
import os
import shutil
import warnings

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from research.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, YarnConfig
from research.model.huggingface import config_to_hf, to_hf_state_dict
from research.model.transformer import Transformer

# Where there is a compiler, kernels that do not compile are a failure and no reason to skip.
NEEDS_COMPILER = pytest.mark.skipif(
    os.environ.get("MOELAB_KERNELS") == "off" or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="no C compiler here: the plain forms are what runs, and they have their own tests",
)
YARN = YarnConfig(factor=6.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.707)


def small(*, q=9, limit=None, dense=1, shared=1, scaling=1.0, yarn=None, tied=False, vocab=41, **sizes):
    """Three layers of sizes that are no powers of two; `sizes` overrides them.

    Unpatched, the reference views slices as complex numbers where they lie: nope width and latent must be even there.
    """
    s = {"heads": 3, "head": 7, "latent": 10, "nope": 6, "rope": 8, "value": 5, "experts": 9, "devices": 3, "chosen": 3, "width": 7} | sizes
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=s["heads"] * s["head"],
        num_hidden_layers=3,
        intermediate_size=17,
        tie_word_embeddings=tied,
        attention=AttentionConfig(
            num_attention_heads=s["heads"],
            q_lora_rank=q,
            kv_lora_rank=s["latent"],
            qk_nope_head_dim=s["nope"],
            qk_rope_head_dim=s["rope"],
            v_head_dim=s["value"],
            rope_theta=100.0,
            yarn=yarn,
        ),
        moe=MoEConfig(
            n_routed_experts=s["experts"],
            num_experts_per_tok=s["chosen"],
            moe_intermediate_size=s["width"],
            n_shared_experts=shared,
            first_k_dense_replace=dense,
            routed_scaling_factor=scaling,
            expert_devices=s["devices"],
            device_limit=limit,
            balance=BalanceConfig(expert=0.001, device=0.0, communication=0.0),
        ),
    )


def random_model(config, dtype=torch.float32, seed=0, experts=0.35):
    """Activations of order one whatever the sizes, logits somewhat less; gains away from 1; gates wide enough that no two experts tie.

    The experts' outputs are smaller, as a routed_scaling_factor of 16 is meant for 160 of them: over 9 (`experts=1.0`) it makes
    a few tokens so ill-conditioned that either implementation is 1e-5 away from its own float64 values.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                width = {"gate": 2.0, "lm_head": 0.5, "embed_tokens": 0.5, "experts": experts}.get(name.split(".")[-2], 1.0)
                parameter.copy_(noise * width / math.sqrt(parameter.shape[-1]))
    return model.to(dtype)


def its_twin(model):
    """The reference with the same weights.  Its eager experts know odd widths, as its grouped product does not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # n_shared_experts 0: it builds a shared MLP of width 0
        twin = DeepseekV2ForCausalLM(DeepseekV2Config(**config_to_hf(model.config), experts_implementation="eager"))
    twin = twin.to(model.lm_head.weight.dtype)
    twin.load_state_dict(to_hf_state_dict(model), strict=True)
    return twin.train()
