"""The model: Multi-head Latent Attention and DeepSeekMoE, and the attentions they stand against."""
