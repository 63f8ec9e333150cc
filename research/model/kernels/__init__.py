"""Fused CPU kernels with their plain PyTorch twins elsewhere; absent without a C compiler, and then nothing else changes."""
