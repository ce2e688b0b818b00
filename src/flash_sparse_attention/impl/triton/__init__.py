"""Triton kernels, for CUDA devices; in Triton's interpreter (TRITON_INTERPRET=1) also for CPU tensors."""

from .ops.attention import nsa_attention
from .ops.block_selection import select_blocks
from .ops.combine import combine
from .ops.compress import compress
from .ops.interval import interval_attention
from .ops.selected import selected_attention

__all__ = ["combine", "compress", "interval_attention", "nsa_attention", "select_blocks", "selected_attention"]
