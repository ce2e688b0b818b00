"""`NativeSparseAttention`: the attention of a transformer layer, from hidden states to hidden states.

    hidden -> q, k, v, gates                 projections; k and v once, or once for each branch
    k, v   -> compressed k, v                the compressors, with rotary embedding before or after
    q, ... -> compressed, selected, window   functional.nsa_attention
           -> gated sum -> hidden            output projection

Shape suffixes: N tokens, M compressed tokens, X branches, H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import FEW_TOKENS, Branches, LayerCache, NSACache, Step
from ..config import NSAConfig, config_or_default
from ..functional import LOOP_ORDERS, RECOMPUTE, CuSeqlens, nsa_attention, nsa_attention_with_kvcache
from ..impl import IMPLEMENTATIONS
from ..precision import no_autocast
from ..types import NSAOutput, SequenceLayout
from ..validation import FLOAT_DTYPES, bad, check_choice, check_heads, check_positive, check_tensor
from .compressors import Compressor
from .packing import positions_of
from .rotary import Rotary, Rotation, check_rotary, rotate, rotation

BRANCHES = ("compressed", "selected", "window")


class AttentionRecord(NamedTuple):
    """What one layer did in one forward pass, detached. Batched inputs are recorded packed, N = B * S.

    Attributes:
        block_indices: the blocks that each query selected, int32 `[N, Hk, T]`, -1 in unused slots.
        gates: the weights of the compressed, the selected and the window branch, after the sigmoid: `[N, Hq, 3]`, or
            `[N, 1, 3]` for one gate per token.
    """

    block_indices: Tensor
    gates: Tensor


class BranchGate(nn.Linear):
    """The logits of the gates: for every head (or for all of them together) one of each branch.

    Args:
        hidden_size: channels of the hidden states.
        num_gates: heads with gates of their own; 1 for all together.
        start: weights that the compressed, the selected and the window branch start with, between 0 and 1.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if `start` is not three numbers between 0 and 1.
    """

    start: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)

    def __init__(
        self,
        hidden_size: int,
        num_gates: int,
        start: Sequence[float] = start,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if len(start) != len(BRANCHES) or not all(0 < x < 1 for x in start):
            raise bad("start", f"a number between 0 and 1 for each of {', '.join(BRANCHES)}", list(start))
        super().__init__(hidden_size, num_gates * len(BRANCHES), device=device, dtype=dtype)
        self.start = tuple(start)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts every gate at `start`, for every token; by default at 1/3.

        Near the start of a sequence the selected and the window branch are each the full attention, and the compressed
        one resembles it, so that weights which sum to 1 make about full attention: a converted model begins where it
        was, and one trained from scratch begins with an output of the usual size. Zero weights, since a gate
        that already differs between tokens at random teaches nothing; their gradient is not zero.
        """
        nn.init.zeros_(self.weight)
        # sigmoid(b) = x  <=>  b = log(x / (1 - x))
        logits = torch.tensor([math.log(x / (1 - x)) for x in self.start], dtype=torch.float64)
        self.bias.copy_(logits.repeat(self.out_features // len(BRANCHES)))


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention as a layer: projections, rotary embedding, compression, three branches, gates.

    Parameters are `q_proj`, `k_proj`, `v_proj` and `o_proj` as in Llama, `branch_gate_proj`, and those of
    `compressor_k` and `compressor_v`. With `branch_kv="independent"`, `k_proj` and `v_proj` hold three projections,
    stacked in the order compressed, selected, window: one product makes them all.

    With `rope="before"`, scores of the compressed branch depend on distances alone only where rotated keys are pooled
    (`mean` or `weighted`, without position embedding); `linear` and `mlp` mix channels that turn at different speeds.

    Runs in the dtype of its parameters, or in that of `torch.autocast` where it is enabled. Source: NSA, arXiv
    2502.11089, section 3.

    Args:
        hidden_size: channels of the hidden states.
        num_heads: Hq, query heads; a multiple of num_kv_heads.
        num_kv_heads: Hk, key/value heads.
        config: sizes, kind of compression, gates and so on; `NSAConfig()`, the paper's, by default.
        head_dim: Dk, channels of a query or key head; even where there is rotary embedding.
        head_dim_v: Dv, channels of a value head; head_dim by default.
        rope_theta: base of the rotary frequencies; None for no rotary embedding.
        qkv_bias: whether q_proj, k_proj and v_proj have a bias.
        qk_norm_eps: epsilon of RMS norms over the channels of each query and key head (`q_norm`, `k_norm`), before
            compression and rotary embedding, as in Qwen3; None for no norms.
        softmax_scale: factor of the scores; head_dim ** -0.5 by default.
        impl: implementation of the operators: `auto`, `reference`, `blockwise` or `triton`.
        loop_order: of selected attention; see `functional.selected_attention`.
        recompute: what the Triton kernels compute again in the backward pass instead of keeping it: any of
            `compressed`, `selected`, `window` and `index`; see `functional.nsa_attention`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a size that is no positive integer, heads that do not divide, or an odd head_dim with rotary.

    Example:
        >>> import torch
        >>> layer = NativeSparseAttention(64, num_heads=4, num_kv_heads=2, config=NSAConfig.preset("fsa"), head_dim=16)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        config: NSAConfig | None = None,
        *,
        head_dim: int = 128,
        head_dim_v: int | None = None,
        rope_theta: float | None = 10000.0,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
        softmax_scale: float | None = None,
        impl: str = "auto",
        loop_order: str = "auto",
        recompute: Collection[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_attention(hidden_size, num_heads, num_kv_heads, head_dim, head_dim_v, rope_theta)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.rope_theta = rope_theta
        self.softmax_scale = softmax_scale
        self.config = config = config_or_default(config)
        self.impl = impl
        self.loop_order = loop_order
        self.recompute = (recompute,) if isinstance(recompute, str) else tuple(recompute)
        check_options(impl, loop_order, self.recompute)
        self._recorders: list[Callable[[AttentionRecord], None]] = []

        # Both k and v of the three branches come from one product; 1 where the branches share them.
        self.num_kv_pairs = len(BRANCHES) if config.branch_kv == "independent" else 1
        gate_heads = num_heads if config.gate == "per_head" else 1

        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def compressor(dim: int, position_embedding: bool) -> Compressor:
            return Compressor(
                config.compression,
                num_kv_heads,
                dim,
                config.kernel_size,
                config.kernel_stride,
                position_embedding,
                impl=impl,
                **factory,
            )

        self._make_projections(qkv_bias, qk_norm_eps, factory)
        # Not `gate_proj`, which is the SwiGLU's in Llama and would be caught by tools that go by names.
        self.branch_gate_proj = BranchGate(hidden_size, gate_heads, **factory)
        self.compressor_k = compressor(head_dim, config.position_embedding in ("k", "kv"))
        self.compressor_v = compressor(head_dim_v, config.position_embedding == "kv")
        # After a norm, hidden states are about sqrt(hidden_size) long. At that length an optimizer that moves every
        # weight alike (Adam) shuts gates within its first steps, while attention is still noise, and they open slowly.
        self._gate_scale = hidden_size**-0.5
        self.reset_gates()

    def _make_projections(self, qkv_bias: bool, qk_norm_eps: float | None, factory: dict[str, Any]) -> None:
        """The modules between hidden states and heads."""
        pairs, hidden_size = self.num_kv_pairs * self.num_kv_heads, self.hidden_size
        self.q_proj = nn.Linear(hidden_size, self.num_heads * self.head_dim, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(hidden_size, pairs * self.head_dim, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(hidden_size, pairs * self.head_dim_v, bias=qkv_bias, **factory)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim_v, hidden_size, bias=False, **factory)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **factory)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=qk_norm_eps, **factory)

    def reset_parameters(self) -> None:
        """Fills all parameters with their start: `nn.Linear`'s, `Compressor`'s, and that of `reset_gates`."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.compressor_k, self.compressor_v):
            module.reset_parameters()
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, nn.RMSNorm):
                norm.reset_parameters()
        self.reset_gates()

    def reset_gates(self) -> None:
        """Starts the gates as `BranchGate.reset_parameters` says."""
        self.branch_gate_proj.reset_parameters()

    def new_cache(
        self,
        batch: int,
        capacity: int | None = None,
        *,
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> NSACache:
        """An empty cache for layers like this one.

        Args:
            batch: sequences.
            capacity: tokens that a sequence may have; None to grow as needed.
            num_layers: layers that it serves.
            device: of the cache; that of the parameters by default.
            dtype: of keys and values: that of the parameters by default, or of `torch.autocast` where it is enabled.
            **options: `page_size`, `num_pages`, `max_crop` and `pools` of `NSACache`; others replace what follows from
                the layer.

        Example:
            >>> NativeSparseAttention(64, num_heads=4, num_kv_heads=2, head_dim=16).new_cache(2, 1000).capacity
            1000
        """
        # A parameter that is left as it is where projections are quantized, or wrapped to be fine-tuned.
        parameter = self.branch_gate_proj.bias
        device = parameter.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else parameter.dtype
        own: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "rotary": self.rope_theta is not None,
            "device": device,
            "dtype": dtype,
        }
        return NSACache(self.config, num_layers=num_layers, batch=batch, capacity=capacity, **own | options)

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: CuSeqlens = None,
        position_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention within each sequence; a token sees nothing after itself.

        Args:
            hidden_states: packed `[N, hidden_size]` or batched `[B, S, hidden_size]`.
            cu_seqlens: bounds of the packed sequences, int32 `[B + 1]`, or a `SequenceLayout`; None for one sequence,
                and for a batch.
            position_ids: positions for the rotary embedding, int64 or int32 `[N]` or `[B, S]`; counted from the start
                of each sequence by default. A key compressed before rotation takes that of its window's first token.
                They do not change which tokens are visible.
            cache: of this layer in an `NSACache` that is being extended by these tokens: they follow those that it
                holds, attend to them, and are kept. Not with `position_ids`. No gradients.

        Returns:
            Of the shape of `hidden_states`.

        Raises:
            ValueError: for arguments of a wrong shape or dtype, `cu_seqlens` with a batch, or a cache that was made for
                another attention or is being extended by other tokens.
        """
        token_dims = check_hidden_states(hidden_states, self.hidden_size)
        layout = SequenceLayout.of("hidden_states", hidden_states, token_dims == 2, cu_seqlens)
        hidden = hidden_states.flatten(0, -2)
        if cache is not None:
            with torch.no_grad():
                self._check_cache(layout, position_ids, cache)
                return self._forward(hidden, layout, self._step_rotary(cache.step), cache).view(hidden_states.shape)
        positions = positions_of("hidden_states", hidden_states, token_dims, position_ids, layout)
        return self._forward(hidden, layout, self._rotary(positions), None).view(hidden_states.shape)

    def _forward(
        self, hidden: Tensor, layout: SequenceLayout, rotary: Rotary | None, cache: LayerCache | None
    ) -> Tensor:
        """Attention of packed tokens `[N, hidden_size]`."""
        q_NHD, k_NXHD, v_NXHD = self._heads(hidden)
        gates_NHX = self.branch_gate_proj(hidden * self._gate_scale).unflatten(-1, (-1, len(BRANCHES)))
        # The operators accumulate in float32 by themselves; autocast would round their scores to its own dtype.
        with no_autocast(hidden):
            out_NHD = self._attend(q_NHD, k_NXHD, v_NXHD, gates_NHX, layout, rotary, cache)
        return self.o_proj(out_NHD.flatten(1))

    def _heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[N, Hq, D]`, keys and values of the branches `[N, X, Hk, D]`, not rotated."""
        q_NHD = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        k_NXHD = self.k_proj(hidden).unflatten(-1, (self.num_kv_pairs, self.num_kv_heads, self.head_dim))
        v_NXHD = self.v_proj(hidden).unflatten(-1, (self.num_kv_pairs, self.num_kv_heads, self.head_dim_v))
        return _normed(q_NHD, self.q_norm), _normed(k_NXHD, self.k_norm), v_NXHD

    def _attend(
        self,
        q_NHD: Tensor,
        k_NXHD: Tensor,
        v_NXHD: Tensor,
        gates_NHX: Tensor,
        layout: SequenceLayout,
        rotary: Rotary | None,
        cache: LayerCache | None,
    ) -> Tensor:
        """The gated sum of the branches. Indexing by branch works for shared and for independent keys alike."""
        by = None if rotary is None else rotary.tokens
        compressed, selected, window = range(3) if self.num_kv_pairs == 3 else (0, 0, 0)
        k_selected = _rotated(k_NXHD[:, selected], by)
        k_window = k_selected if window == selected else _rotated(k_NXHD[:, window], by)
        k_first = k_NXHD[:, compressed]
        if self.config.rope == "before":
            k_first = k_selected if compressed == selected else _rotated(k_first, by)
        q_NHD = _rotated(q_NHD, by)
        k = Branches(k_first, k_selected, k_window)
        v = Branches(*(v_NXHD[:, branch] for branch in (compressed, selected, window)))
        if cache is not None:
            out, block_indices = self._attend_cached(q_NHD, k, v, gates_NHX, rotary, cache)
        else:
            k_compressed = self.compressor_k(k.compressed, layout)
            if self.config.rope == "after":
                starts = layout.window_starts(self.config.kernel_size, self.config.kernel_stride)
                k_compressed = _rotated(k_compressed, None if by is None else by.at(starts))
            out, block_indices = self._attend_packed(
                q_NHD, k, v, k_compressed, self.compressor_v(v.compressed, layout), gates_NHX, layout
            )
        for record in self._recorders:
            record(AttentionRecord(block_indices, gates_NHX.detach().sigmoid()))
        return out

    def _attend_packed(
        self,
        q: Tensor,
        k: Branches,
        v: Branches,
        k_compressed: Tensor,
        v_compressed: Tensor,
        gates: Tensor,
        layout: SequenceLayout,
    ) -> NSAOutput:
        """`nsa_attention` on packed tensors."""
        return nsa_attention(
            q,
            k.selected,
            v.selected,
            gates,
            self.config,
            k_compressed=k_compressed,
            v_compressed=v_compressed,
            k_window=k.window,
            v_window=v.window,
            cu_seqlens=layout,
            softmax_scale=self.softmax_scale,
            impl=self.impl,
            loop_order=self.loop_order,
            recompute=self.recompute,
        )

    def _attend_cached(
        self, q: Tensor, k: Branches, v: Branches, gates: Tensor, rotary: Rotary | None, cache: LayerCache
    ) -> NSAOutput:
        """Keeps the new tokens, and attends to them and to all before."""
        step = cache.step
        if k.selected.dtype != cache.shared.dtype:
            raise bad("cache", f"of {k.selected.dtype}, as the keys are", cache.shared.dtype, "make it with that dtype")
        by = None
        if step.windows is not None and self.config.rope == "after" and rotary is not None:
            by = rotary.at(step.windows.starts)
        dtype = k.selected.dtype
        cache.append(k, v, self.compressor_k.compression(dtype), self.compressor_v.compression(dtype), by, self.impl)
        if step.fresh:
            return self._attend_packed(q, k, v, *cache.packed_compressed(), gates, step.new_layout)
        if step.tokens is not None and step.tokens <= FEW_TOKENS:
            sizes = (step.new_layout.batch, step.tokens)
            result = nsa_attention_with_kvcache(
                q.unflatten(0, sizes),
                gates.unflatten(0, sizes),
                cache.pages,
                self.config,
                softmax_scale=self.softmax_scale,
                impl=self.impl,
            )
            return NSAOutput(*(x.flatten(0, 1) for x in result))
        if cache.shared.capturing():
            expected = f"of one number of tokens for all sequences, at most {FEW_TOKENS}, in a CUDA graph"
            raise bad("hidden_states", expected, list(step.new_layout.lengths))
        k_all, v_all, k_window, v_window = cache.packed()
        k, v = Branches(k_all, k_all, k_window), Branches(v_all, v_all, v_window)
        return self._attend_packed(q, k, v, *cache.packed_compressed(), gates, step.layout)

    def _rotary(self, positions: Tensor) -> Rotary | None:
        """The rotations of tokens at these positions, and of any others."""
        if self.rope_theta is None:
            return None
        return Rotary(self._rotation(positions), self._rotation)

    def _step_rotary(self, step: Step) -> Rotary | None:
        """The same of a step, computed once for all layers with the same frequencies."""
        if self.rope_theta is None:
            return None
        key = self.head_dim, self.rope_theta, self.q_proj.weight.dtype == torch.float64
        if key not in step.memory:
            step.memory[key] = Rotary(self._rotation(step.positions), self._rotation)
        return step.memory[key]

    def _rotation(self, positions: Tensor) -> Rotation:
        assert self.rope_theta is not None
        return rotation(positions, self.head_dim, self.rope_theta, self.q_proj.weight.dtype)

    def _check_cache(self, layout: SequenceLayout, position_ids: Tensor | None, cache: LayerCache) -> None:
        """The cache is of this layer, and is being extended by these tokens."""
        if not isinstance(cache, LayerCache):
            cure = "one of `layers` of an NSACache, within `with cache.extend(layout):`"
            raise bad("cache", "a LayerCache or None", type(cache).__name__, cure)
        of = cache.shared
        sizes = {
            "config": (of.config, self.config),
            "num_kv_heads": (cache.k.shape[2], self.num_kv_heads),
            "head_dim": (cache.k.shape[3], self.head_dim),
            "head_dim_v": (cache.v.shape[3], self.head_dim_v),
            "rotary": (of.rotary, self.rope_theta is not None),
            "device": (of.device, self.q_proj.weight.device),
        }
        for name, (got, wanted) in sizes.items():
            if got != wanted:
                raise bad("cache", f"made for {name}={wanted}", got, "new_cache of the layer makes one")
        if position_ids is not None:
            raise bad("position_ids", "left out with a cache", "both", "positions are counted on")
        if layout.lengths != cache.step.new_layout.lengths:
            expected = f"of the lengths {list(cache.step.new_layout.lengths)} by which the cache is extended"
            raise bad("hidden_states", expected, list(layout.lengths))

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"head_dim_v={self.head_dim_v}, rope_theta={self.rope_theta}, softmax_scale={self.softmax_scale}, "
            f"impl={self.impl!r}, loop_order={self.loop_order!r}, recompute={self.recompute}, config={self.config}"
        )


@contextmanager
def record_attention(module: nn.Module) -> Iterator[dict[str, AttentionRecord]]:
    """While active, keeps what every `NativeSparseAttention` in `module` selects and how it gates.

    Args:
        module: a model or a layer.

    Yields:
        A dictionary from the name of the layer in `module` (empty for `module` itself) to the `AttentionRecord` of its
        latest forward pass. It stays valid afterwards, and stays empty for a module without such layers.

    Example:
        >>> import torch
        >>> layer = NativeSparseAttention(64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> with record_attention(layer) as records:
        ...     _ = layer(torch.randn(100, 64))
        >>> records[""].block_indices.shape, records[""].gates.shape
        (torch.Size([100, 2, 16]), torch.Size([100, 4, 3]))
    """
    records: dict[str, AttentionRecord] = {}
    recorders = []
    for name, layer in module.named_modules():
        if isinstance(layer, NativeSparseAttention):
            recorders.append((layer, _recorder(records, name)))
    for layer, recorder in recorders:
        layer._recorders.append(recorder)
    try:
        yield records
    finally:
        for layer, recorder in recorders:
            layer._recorders.remove(recorder)


def check_attention(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, head_dim_v: int, rope_theta: float | None
) -> None:
    """The sizes of an attention layer fit each other.

    Raises:
        ValueError: if they do not.
    """
    sizes = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
    }
    for name, size in sizes.items():
        check_positive(name, size)
    check_heads(num_heads, num_kv_heads)
    if rope_theta is not None:
        check_rotary(head_dim, rope_theta)


def check_options(impl: str, loop_order: str, recompute: Collection[str]) -> None:
    """The options of a layer exist.

    Raises:
        ValueError: if they do not.
    """
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    check_choice("loop_order", loop_order, LOOP_ORDERS)
    for part in recompute:
        check_choice("recompute", part, RECOMPUTE)


def check_hidden_states(hidden_states: Tensor, hidden_size: int) -> int:
    """Number of token dimensions of `hidden_states`: 1 if packed, 2 if batched.

    Raises:
        ValueError: if it is neither, or of another hidden size.
    """
    batched = isinstance(hidden_states, Tensor) and hidden_states.dim() == 3
    token_dims: dict[str, int | None] = {"B": None, "S": None} if batched else {"N": None}
    cure = "pack it as [N, hidden_size] with cu_seqlens, or batch it as [B, S, hidden_size]"
    check_tensor("hidden_states", hidden_states, {**token_dims, "hidden_size": hidden_size}, FLOAT_DTYPES, cure)
    return len(token_dims)


def _rotated(x: Tensor, by: Rotation | None) -> Tensor:
    return x if by is None else rotate(x, by)


def _normed(x: Tensor, norm: Any) -> Tensor:
    """Autocast leaves norms their float32 weights, and PyTorch's wants `x` of the same dtype."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


def _recorder(records: dict[str, AttentionRecord], name: str) -> Callable[[AttentionRecord], None]:
    return lambda record: records.__setitem__(name, record)
