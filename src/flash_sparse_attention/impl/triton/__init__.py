"""Triton kernels, for CUDA devices; in Triton's interpreter (TRITON_INTERPRET=1) also for CPU tensors."""

from .cache_write import gather_windows, plan_step, pool_windows, store_rows
from .ops.attention import nsa_attention
from .ops.block_selection import select_blocks
from .ops.combine import combine
from .ops.compress import compress
from .ops.interval import interval_attention
from .ops.kvcache import nsa_attention_with_kvcache
from .ops.selected import selected_attention

__all__ = [
    "combine",
    "compress",
    "gather_windows",
    "interval_attention",
    "nsa_attention",
    "nsa_attention_with_kvcache",
    "plan_step",
    "pool_windows",
    "select_blocks",
    "selected_attention",
    "store_rows",
]
