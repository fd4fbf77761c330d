"""Fused operations: one a module, Triton kernels for CUDA tensors and vectorised torch for CPU tensors."""
