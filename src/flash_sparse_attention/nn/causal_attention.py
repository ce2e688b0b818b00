"""`CausalAttention`: full causal attention by PyTorch, what `NativeSparseAttention` is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import CuSeqlens
from ..types import SequenceLayout
from ..validation import bad
from .attention import check_attention, check_hidden_states
from .packing import positions_of
from .rotary import rotate, rotation


class CausalAttention(nn.Module):
    """Full causal attention with the projections and the rotary embedding of `NativeSparseAttention`.

    The scores go through `torch.nn.functional.scaled_dot_product_attention` without a mask, for which PyTorch has its
    fastest kernels on a GPU and on a CPU.

    Args:
        hidden_size: channels of the hidden states.
        num_heads: Hq, query heads; a multiple of num_kv_heads.
        num_kv_heads: Hk, key/value heads.
        head_dim: D, channels of a head; even where there is rotary embedding.
        rope_theta: base of the rotary frequencies; None for no rotary embedding.
        qkv_bias: whether q_proj, k_proj and v_proj have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a size that is no positive integer, heads that do not divide, or an odd head_dim with rotary.

    Example:
        >>> import torch
        >>> layer = CausalAttention(64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int = 128,
        rope_theta: float | None = 10000.0,
        qkv_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_attention(hidden_size, num_heads, num_kv_heads, head_dim, head_dim, rope_theta)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, num_heads * head_dim, qkv_bias)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim, qkv_bias)
        self.o_proj = linear(num_heads * head_dim, hidden_size, False)

    def reset_parameters(self) -> None:
        """Fills all parameters with the start of `nn.Linear`."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            module.reset_parameters()

    def forward(
        self, hidden_states: Tensor, cu_seqlens: CuSeqlens = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """As `NativeSparseAttention.forward`, over all earlier tokens.

        Args:
            hidden_states: packed `[N, hidden_size]` or batched `[B, S, hidden_size]`.
            cu_seqlens: bounds of the packed sequences, int32 `[B + 1]`, or a `SequenceLayout`; None for one sequence,
                and for a batch.
            position_ids: positions for the rotary embedding, int64 or int32 `[N]` or `[B, S]`.

        Returns:
            Of the shape of `hidden_states`.

        Raises:
            ValueError: for arguments of a wrong shape or dtype, or `cu_seqlens` with a batch.
        """
        token_dims = check_hidden_states(hidden_states, self.hidden_size)
        layout = SequenceLayout.of("hidden_states", hidden_states, token_dims == 2, cu_seqlens)
        if layout.with_past is not None:
            raise bad("cu_seqlens", "the layout of all tokens", "one with a past", "full attention keeps no keys")
        positions = positions_of("hidden_states", hidden_states, token_dims, position_ids, layout)
        hidden = hidden_states.flatten(0, -2)
        q = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rope_theta is not None:
            by = rotation(positions, self.head_dim, self.rope_theta, q.dtype)
            q, k = rotate(q, by), rotate(k, by)
        return self.o_proj(causal_attention(q, k, v, layout).flatten(1)).view(hidden_states.shape)

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"rope_theta={self.rope_theta}"
        )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, softmax_scale: float | None = None
) -> Tensor:
    """Causal attention within each sequence, `[N, H, D]` in and out: one call where all lengths are equal."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True).transpose(
            1, 2
        )

    if len(set(layout.lengths)) <= 1:
        return attend(*(x.unflatten(0, (layout.batch, layout.max_length)) for x in (q, k, v))).flatten(0, 1)
    # scaled_dot_product_attention has no bounds of sequences on a CPU, and a mask would cost it its fast kernels.
    parts = zip(*(x.split(layout.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(q[None], k[None], v[None])[0] for q, k, v in parts])
