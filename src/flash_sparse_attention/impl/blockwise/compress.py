"""Compression by chunks.

Shape suffixes: C chunks, T tokens of a chunk, K key/value heads, D head dimension, M compressed tokens, W a flattened
chunk, E width of a compressed token, l positions of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...precision import wide
from ...types import Compression, SequenceLayout


def compress(
    x: Tensor, compression: Compression, kernel_size: int, kernel_stride: int, layout: SequenceLayout
) -> Tensor:
    """As `reference.compress`, without the windows: a window is l / d neighbouring chunks of d tokens, and every kind
    begins with a sum over its chunks, each of which is computed once."""
    chunks, windows = layout.chunks(kernel_stride), layout.compressed(kernel_size, kernel_stride)
    # A chunk is a window of one stride.
    starts_C = layout.window_starts(kernel_stride, kernel_stride)
    x_CTKD = wide(x)[starts_C[:, None] + torch.arange(kernel_stride, device=x.device)]
    # Window i of a sequence begins with its chunk i, since geometry.window_start(i) == i * kernel_stride.
    first_M = chunks.cu_seqlens[windows.sequence_ids()] + windows.positions()
    num_kv_heads, dim = x.shape[1:]
    chunks_per_window = kernel_size // kernel_stride
    position = compression.position_embedding
    if compression.kind in ("mean", "weighted"):
        weight_Kl = x_CTKD.new_full((num_kv_heads, kernel_size), 1 / kernel_size)
        if compression.weight is not None:
            weight_Kl = wide(compression.weight)
        parts = [torch.einsum("ctkd,kt->ckd", x_CTKD, part) for part in weight_Kl.split(kernel_stride, 1)]
        constant = None if position is None else weight_Kl @ wide(position)
    else:
        assert compression.weight is not None, "validated at the public boundary"
        weight_KWE = wide(compression.weight)
        flat_KCW = x_CTKD.permute(2, 0, 1, 3).reshape(num_kv_heads, -1, kernel_stride * dim)
        parts = [torch.bmm(flat_KCW, part).transpose(0, 1) for part in weight_KWE.split(kernel_stride * dim, 1)]
        constant = None if position is None else wide(position).flatten() @ weight_KWE
    out_MKE = sum(part[first_M + index] for index, part in enumerate(parts))
    assert isinstance(out_MKE, Tensor)
    assert len(parts) == chunks_per_window
    if constant is not None:
        out_MKE = out_MKE + constant
    if compression.kind == "mlp":
        assert compression.weight_out is not None, "validated at the public boundary"
        hidden_MKE = F.gelu(out_MKE if compression.bias is None else out_MKE + wide(compression.bias))
        out_MKE = torch.einsum("mke,ked->mkd", hidden_MKE, wide(compression.weight_out))
        if compression.bias_out is not None:
            out_MKE = out_MKE + wide(compression.bias_out)
    return out_MKE.to(x.dtype)
