"""Triton kernels, for CUDA devices; in Triton's interpreter (TRITON_INTERPRET=1) also for CPU tensors."""

from .ops.selected import selected_attention

__all__ = ["selected_attention"]
