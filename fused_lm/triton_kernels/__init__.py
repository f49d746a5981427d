"""Triton kernels: the operators of ``fused_lm.reference`` for NVIDIA GPUs and the interpreter."""
