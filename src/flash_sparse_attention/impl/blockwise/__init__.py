"""The operators in blocks of PyTorch: any device, memory linear in N, forward and backward.

Attention works in tiles of queries and keys and keeps a running softmax; block scores are consumed tile by tile;
selected attention runs key/value blocks in the outer loop, as FSA does. The three attention operators are registered
with `torch.library` as opaque operators, since their loops depend on the data: `torch.compile(fullgraph=True)`, export
and activation checkpointing see one node each. Half precisions are computed in float32, the others as they are.
"""

from .attention import nsa_attention
from .block_selection import select_blocks
from .combine import combine
from .compress import compress
from .interval import interval_attention
from .kvcache import gather_windows, nsa_attention_with_kvcache, store_rows
from .selected import selected_attention

__all__ = [
    "combine",
    "compress",
    "gather_windows",
    "interval_attention",
    "nsa_attention",
    "nsa_attention_with_kvcache",
    "select_blocks",
    "selected_attention",
    "store_rows",
]
