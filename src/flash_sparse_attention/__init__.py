"""Flash Sparse Attention: Native Sparse Attention for PyTorch.

`nsa_attention` is the whole attention, the other functions are its parts; `flash_sparse_attention.nn` has the layer.
"""

from .cache import NSACache
from .config import NSAConfig
from .functional import (
    combine,
    compress,
    compressed_attention,
    interval_attention,
    nsa_attention,
    nsa_attention_with_kvcache,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from .geometry import Interval
from .types import AttentionOutput, Compression, KVPages, NSAOutput, SequenceLayout

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "Compression",
    "Interval",
    "KVPages",
    "NSACache",
    "NSAConfig",
    "NSAOutput",
    "SequenceLayout",
    "__version__",
    "combine",
    "compress",
    "compressed_attention",
    "interval_attention",
    "nsa_attention",
    "nsa_attention_with_kvcache",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]
