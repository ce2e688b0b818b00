"""The public operators: each checks its arguments, picks an implementation, calls it, returns a tensor or NamedTuple.

Tensors are packed, `[N, H, D]` with `cu_seqlens` (the layout of the varlen functions of flash-attn), or batched,
`[B, S, H, D]` without; what comes back has the form of what went in. Packed tensors without `cu_seqlens` are one
sequence. All tensors of a call share a device and a floating dtype (float16, bfloat16, float32 or float64). Nothing
ever crosses the bound of a sequence.

Every operator takes
    cu_seqlens: bounds of the packed sequences, int32 `[B + 1]`, or a `SequenceLayout`, which saves a copy to the host.
    cu_seqlens_k: those that have queries: bounds of the packed tokens that have keys, alike, where these are more than
        the queries (a prompt that is read in pieces, or continued): the queries of a sequence are its last tokens, as
        in flash-attn. By default every token has a query.
    impl: `auto`, or `reference`, `blockwise` or `triton`; an explicit choice that cannot run is an error.
and raises `ValueError` for an argument of a wrong shape, dtype, device or value.

Gradients are those of a backward pass, once: forward mode, second derivatives and the transforms of `torch.func` need
`impl="reference"`, which is made of PyTorch's own operators; with others they are errors. Only within `torch.compile`
forward mode goes unnoticed, and has tangents of zero.

Sources: NSA, arXiv 2502.11089, equations 5 to 12; FSA, arXiv 2508.18224.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import geometry
from .config import NSAConfig, compression_kinds, config_or_default
from .geometry import Interval
from .impl import OPERATORS, WHOLE, WITH_KVCACHE, Capability, load, resolve
from .precision import no_autocast
from .types import AttentionOutput, Compression, KVPages, NSAOutput, SequenceLayout
from .validation import (
    FLOAT_DTYPES,
    bad,
    check_choice,
    check_heads,
    check_multiple,
    check_positive,
    check_same,
    check_tensor,
)

CuSeqlens = Tensor | SequenceLayout | None
# Of selected attention, where an implementation has both.
LOOP_ORDERS = ("auto", "kv_outer", "query_outer")
# What `nsa_attention` may compute again in its backward pass.
RECOMPUTE = ("compressed", "selected", "window", "index")


def compress(
    x: Tensor,
    *,
    kind: str = "mean",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_out: Tensor | None = None,
    bias_out: Tensor | None = None,
    position_embedding: Tensor | None = None,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: CuSeqlens = None,
    impl: str = "auto",
) -> Tensor:
    """Summarises windows of keys or values: compressed token i stands for tokens [i * d, i * d + l). NSA equation 7.

    A sequence of L tokens yields max(0, (L - l) // d + 1) compressed tokens: none if it is shorter than a window.

    Args:
        x: keys or values `[N, Hk, D]` or `[B, S, Hk, D]`.
        kind: `mean`; `linear`: the window, flattened to l * D, times a matrix a head; `mlp`: two layers with GELU
            (the paper's phi); `weighted`: a weighted sum over the positions of the window.
        weight: `linear`: `[Hk, l * D, D]`; `mlp`: `[Hk, l * D, E]`; `weighted`: `[Hk, l]`; not for `mean`.
        bias: `mlp` only: `[Hk, E]`.
        weight_out: `mlp` only: `[Hk, E, D]`.
        bias_out: `mlp` only: `[Hk, D]`.
        position_embedding: `[l, D]`, added to the tokens of each window first.
        kernel_size: l, tokens of a window.
        kernel_stride: d, tokens between windows; divides l.
        cu_seqlens: see the module.
        impl: see the module.

    Returns:
        The compressed tokens `[M, Hk, D]`, sequence after sequence, or `[B, S', Hk, D]`. Differentiable in `x` and all
        weights.

    Example:
        >>> import torch
        >>> compress(torch.arange(8.0).reshape(8, 1, 1), kernel_size=4, kernel_stride=2).flatten()
        tensor([1.5000, 3.5000, 5.5000])
    """
    _check_windows(kernel_size, kernel_stride)
    pack = _Pack.of("x", x, "Hk", "D", cu_seqlens)
    if pack.layout.with_past is not None:
        raise bad("cu_seqlens", "the layout of all tokens of x", "one of the last tokens", "pass layout.keys")
    compression = Compression(kind, weight, bias, weight_out, bias_out, position_embedding)
    _check_compression(x, compression, kernel_size)
    row = resolve("compress", impl, x.device, x.dtype, x.shape[-1])
    out = _compute(row, pack.flat(x), compression, kernel_size, kernel_stride, pack.layout)
    return pack.restore(out)


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    interval: Interval,
    *,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Attention of query t to the contiguous keys [interval.start(t), interval.end(t)).

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k: keys `[M, Hk, Dk]` (`[B, M / B, Hk, Dk]`), where a sequence of L tokens has `interval.num_keys(L)` keys; Hk
            divides Hq, and query head h belongs to key/value head h // (Hq / Hk).
        v: values `[M, Hk, Dv]`; Dv may differ from Dk.
        interval: which keys a query sees.
        cu_seqlens, cu_seqlens_k: bounds of the queries, and of the tokens that have keys; see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.

    Returns:
        `out [N, Hq, Dv]` (`[B, S, Hq, Dv]`) and `lse [N, Hq]` (`[B, S, Hq]`); both differentiable. A query that sees no
        key has output 0 and lse -inf.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(2, 100, 4, 16)
        >>> causal = interval_attention(q, k, v, Interval())
        >>> causal.out.shape, causal.lse.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 100, 4]))
    """
    pack = _Pack.of("q", q, "Hq", "Dk", cu_seqlens, cu_seqlens_k)
    scale = _check_qkv(pack, q, k, v, interval, softmax_scale, suffix="")
    row = resolve("interval_attention", impl, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    result = _compute(row, *map(pack.flat, (q, k, v)), interval, pack.layout, scale)
    return AttentionOutput(*map(pack.restore, result))


def compressed_attention(
    q: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Attention to the compressed tokens whose windows lie wholly at or before the query. NSA equations 5 to 7.

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k_compressed: compressed keys `[M, Hk, Dk]`, from `compress`.
        v_compressed: compressed values `[M, Hk, Dv]`.
        kernel_size: l, tokens of a window.
        kernel_stride: d, tokens between windows; divides l.
        cu_seqlens, cu_seqlens_k: bounds of the tokens, not of the compressed ones; see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.

    Returns:
        As `interval_attention`. The first l - 1 queries of a sequence see nothing.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(100, 8, 16), torch.randn(100, 2, 16), torch.randn(100, 2, 16)
        >>> compressed_attention(q, compress(k), compress(v)).out.shape
        torch.Size([100, 8, 16])
    """
    _check_windows(kernel_size, kernel_stride)
    pack = _Pack.of("q", q, "Hq", "Dk", cu_seqlens, cu_seqlens_k)
    keys = Interval(kernel_size, kernel_stride)
    _check_qkv(pack, q, k_compressed, v_compressed, keys, softmax_scale, suffix="_compressed")
    return interval_attention(
        q,
        k_compressed,
        v_compressed,
        Interval(kernel_size, kernel_stride),
        cu_seqlens=None if pack.batched else pack.layout,
        softmax_scale=softmax_scale,
        impl=impl,
    )


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int = 512,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> AttentionOutput:
    """Attention to the newest `window_size` tokens, the query's own included.

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k: keys `[N, Hk, Dk]` or `[B, S, Hk, Dk]`.
        v: values `[N, Hk, Dv]` or `[B, S, Hk, Dv]`.
        window_size: w, tokens that a query sees, exactly; some other code counts one more.
        cu_seqlens, cu_seqlens_k: see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.

    Returns:
        As `interval_attention`.

    Example:
        >>> import torch
        >>> x = torch.randn(10, 1, 4)
        >>> torch.equal(sliding_window_attention(x, x, x, window_size=1).out, x)
        True
    """
    interval = Interval(window_size=check_positive("window_size", window_size))
    return interval_attention(
        q, k, v, interval, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, softmax_scale=softmax_scale, impl=impl
    )


def select_blocks(
    q: Tensor,
    k_compressed: Tensor,
    lse: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    num_selected_blocks: int = 16,
    num_init_blocks: int = 1,
    num_local_blocks: int = 2,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """The blocks that each query keeps, by the attention it pays to compressed tokens. NSA equations 8 to 12.

    The importance of a block is the probability that the heads of a group give to the windows that overlap it, each
    weighted with the chunks of d tokens that both share. The first `num_init_blocks` and the newest `num_local_blocks`
    blocks of a query are always kept, the rest by importance; where two tie, the lower one is kept.

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k_compressed: compressed keys `[M, Hk, Dk]`.
        lse: of `compressed_attention` on the same q and keys, with the same `softmax_scale`.
        kernel_size: l, tokens of a window.
        kernel_stride: d, tokens between windows; divides l and l'.
        block_size: l', tokens of a block.
        num_selected_blocks: T, blocks kept, the forced ones included.
        num_init_blocks: first blocks, always kept.
        num_local_blocks: newest blocks, always kept, the query's own included.
        cu_seqlens, cu_seqlens_k: see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.

    Returns:
        `block_indices`, int32 `[N, Hk, T]` or `[B, S, Hk, T]`: ascending, unused slots -1 at the end. No gradient.

    Example:
        >>> import torch
        >>> q, k = torch.randn(200, 8, 16), torch.randn(200, 2, 16)
        >>> k_cmp = compress(k)
        >>> lse = compressed_attention(q, k_cmp, k_cmp).lse
        >>> select_blocks(q, k_cmp, lse, num_selected_blocks=4)[130, 0].tolist()
        [0, 1, 2, -1]
    """
    _check_windows(kernel_size, kernel_stride)
    check_multiple("block_size", check_positive("block_size", block_size), "kernel_stride", kernel_stride)
    check_positive("num_init_blocks", num_init_blocks, 0)
    check_positive("num_local_blocks", num_local_blocks, 0)
    forced = num_init_blocks + num_local_blocks
    if check_positive("num_selected_blocks", num_selected_blocks) < forced:
        raise bad("num_selected_blocks", f"at least num_init_blocks + num_local_blocks = {forced}", num_selected_blocks)
    pack = _Pack.of("q", q, "Hq", "Dk", cu_seqlens, cu_seqlens_k)
    keys = Interval(kernel_size, kernel_stride)
    scale = _check_qkv(pack, q, k_compressed, k_compressed, keys, softmax_scale, suffix="_compressed")
    check_tensor("lse", lse, pack.shape(Hq=q.shape[-2]), FLOAT_DTYPES)
    check_same("device", q=q, lse=lse)
    reach = geometry.windows_reach(kernel_size, kernel_stride, block_size)
    compute = load(resolve("select_blocks", impl, q.device, q.dtype, q.shape[-1], reach, num_selected_blocks))
    tensors = map(pack.flat, (q, k_compressed, lse))
    blocks = block_size, num_selected_blocks, num_init_blocks, num_local_blocks
    with no_autocast(q):
        return pack.restore(compute(*tensors, kernel_size, kernel_stride, *blocks, pack.layout, scale))


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 64,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
    loop_order: str = "auto",
    workspace_mib: int = 1024,
    save_index: bool = True,
) -> AttentionOutput:
    """Attention of query t to the tokens s <= t of the blocks it selected.

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k: keys `[N, Hk, Dk]` or `[B, S, Hk, Dk]`.
        v: values `[N, Hk, Dv]` or `[B, S, Hk, Dv]`.
        block_indices: int32 `[N, Hk, T]` or `[B, S, Hk, T]`, blocks counted from the start of the query's sequence, in
            any order. Entries that are negative, out of range or in the future count as unused; a repeated block
            counts once.
        block_size: l', tokens of a block.
        cu_seqlens, cu_seqlens_k: see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.
        loop_order: schedule of the kernels: `kv_outer` (FSA: blocks in the outer loop, the queries that selected one in
            the inner loop), `query_outer` (NSA: the reverse), or `auto`, which takes what is faster for the shape in
            each pass.
        workspace_mib: what the Triton kernels may take beyond inputs, outputs and what is saved, MiB; less costs time.
            Partial results keep a quarter of it, however long the sequence: 1024 are enough for 1,048,576 tokens of 32
            query and 8 key/value heads in half precision. Others ignore it.
        save_index: whether the Triton kernels keep their inverted index of the selection for the backward pass, about
            12 bytes an entry of `block_indices`, or build it again. Others ignore it.

    Returns:
        As `interval_attention`. A query whose entries are all unused has output 0 and lse -inf.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(100, 8, 16), torch.randn(100, 2, 16), torch.randn(100, 2, 16)
        >>> indices = torch.zeros(100, 2, 1, dtype=torch.int32)
        >>> selected_attention(q, k, v, indices).out.shape
        torch.Size([100, 8, 16])
    """
    check_positive("block_size", block_size)
    pack = _Pack.of("q", q, "Hq", "Dk", cu_seqlens, cu_seqlens_k)
    scale = _check_qkv(pack, q, k, v, Interval(), softmax_scale, suffix="")
    check_tensor(
        "block_indices",
        block_indices,
        pack.shape(Hk=k.shape[-2], T=None),
        (torch.int32,),
        cure="one selection per KV head, not per query head",
    )
    if block_indices.shape[-1] == 0:
        raise bad("block_indices", "of at least one slot T", list(block_indices.shape), "put -1 in what is unused")
    check_same("device", q=q, block_indices=block_indices)
    check_positive("workspace_mib", workspace_mib)
    row = resolve("selected_attention", impl, q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    _check_loop_order(loop_order, row)
    schedule: dict[str, Any] = {"loop_order": loop_order, "workspace_mib": workspace_mib, "save_index": save_index}
    tensors = map(pack.flat, (q, k, v, block_indices))
    options = schedule if row.impl == "triton" else {}
    result = _compute(row, *tensors, block_size, pack.layout, scale, **options)
    return AttentionOutput(*map(pack.restore, result))


def combine(
    out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The gated sum of the branches: sum of sigmoid(gate) * out. NSA equation 5.

    Args:
        out_compressed: `[N, Hq, Dv]` or `[B, S, Hq, Dv]`, and so are the other two.
        out_selected: output of the selected branch.
        out_window: output of the sliding window.
        gates: gates before the sigmoid, `[N, Hq, 3]` in the order compressed, selected, window; or `[N, 1, 3]`, one for
            all heads. Batched alike. Any floating dtype.
        impl: see the module.

    Returns:
        `[N, Hq, Dv]` or `[B, S, Hq, Dv]`, differentiable in all inputs.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 1, 1)
        >>> combine(ones, ones, ones, torch.zeros(1, 1, 3)).item()
        1.5
    """
    pack = _Pack.of("out_compressed", out_compressed, "Hq", "Dv", None)
    heads, dim = out_compressed.shape[-2:]
    named = {"out_compressed": out_compressed, "out_selected": out_selected, "out_window": out_window}
    for name, out in named.items():
        check_tensor(name, out, pack.shape(Hq=heads, Dv=dim), FLOAT_DTYPES)
    check_same("dtype", **named)
    _check_gates(pack, gates, heads)
    check_same("device", **named, gates=gates)
    row = resolve("combine", impl, out_window.device, out_window.dtype, dim)
    result = _compute(row, *map(pack.flat, named.values()), pack.flat(gates))
    return pack.restore(result)


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    config: NSAConfig | None = None,
    *,
    k_compressed: Tensor | None = None,
    v_compressed: Tensor | None = None,
    k_window: Tensor | None = None,
    v_window: Tensor | None = None,
    compression_k: Compression | None = None,
    compression_v: Compression | None = None,
    cu_seqlens: CuSeqlens = None,
    cu_seqlens_k: CuSeqlens = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
    loop_order: str = "auto",
    workspace_mib: int = 1024,
    recompute: Collection[str] = (),
) -> NSAOutput:
    """Native Sparse Attention: all operators in a row.

    Keys and values are compressed; each query attends to the compressed tokens, by that selects blocks and attends to
    them, and attends to a sliding window; a gated sum combines the three. By default the three
    branches share `k` and `v`; give the others to make them independent.

    Args:
        q: queries `[N, Hq, Dk]` or `[B, S, Hq, Dk]`.
        k: keys of the selected branch `[N, Hk, Dk]` or `[B, S, Hk, Dk]`.
        v: values of the selected branch `[N, Hk, Dv]` or `[B, S, Hk, Dv]`.
        gates: gates before the sigmoid, `[N, Hq, 3]` or `[N, 1, 3]` (batched alike): compressed, selected, window.
        config: the sizes (windows, blocks, T, window); `NSAConfig()` by default. What it says of learned parts
            (compression, gates, rotary embedding) is for `nn.NativeSparseAttention`.
        k_compressed: compressed keys `[M, Hk, Dk]`, made by the caller; `compress(k, ...)` by default.
        v_compressed: compressed values `[M, Hk, Dv]`; `compress(v, ...)` by default.
        k_window: keys of the sliding window; `k` by default.
        v_window: values of the sliding window; `v` by default.
        compression_k: how `k` is compressed where `k_compressed` is not given; the mean by default.
        compression_v: how `v` is compressed where `v_compressed` is not given; the mean by default.
        cu_seqlens, cu_seqlens_k: see the module.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.
        loop_order: of selected attention; see `selected_attention`.
        workspace_mib: of selected attention; see `selected_attention`.
        recompute: what the Triton kernels compute again in the backward pass instead of keeping it: the outputs of
            branches (`compressed`, `selected`, `window`: Hq * Dv elements a token each) and the inverted index of the
            selection (`index`: 8 bytes an entry). By default they keep all, besides the inputs, the selection (4 bytes
            an entry) and 12 bytes a token and query head. Others ignore it.

    Returns:
        `out [N, Hq, Dv]` (`[B, S, Hq, Dv]`), differentiable, and the `block_indices` that were selected.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 300, 8, 16), torch.randn(1, 300, 2, 16), torch.randn(1, 300, 2, 16)
        >>> nsa_attention(q, k, v, gates=torch.zeros(1, 300, 8, 3)).out.shape
        torch.Size([1, 300, 8, 16])
    """
    config = config_or_default(config)
    pack = _Pack.of("q", q, "Hq", "Dk", cu_seqlens, cu_seqlens_k)
    k_window, v_window = k if k_window is None else k_window, v if v_window is None else v_window
    _check_qkv(pack, q, k, v, Interval(), softmax_scale, suffix="")
    _check_qkv(pack, q, k_window, v_window, Interval(), softmax_scale, suffix="_window")
    _check_gates(pack, gates, q.shape[-2])
    check_same("device", q=q, gates=gates)
    check_positive("workspace_mib", workspace_mib)
    recompute = (recompute,) if isinstance(recompute, str) else tuple(recompute)
    for part in recompute:
        check_choice("recompute", part, RECOMPUTE)
    for side, given, how in (("k", k_compressed, compression_k), ("v", v_compressed, compression_v)):
        if given is not None and how is not None:
            raise bad(f"compression_{side}", f"left out where {side}_compressed is given", "both", "pass one of them")
    bounds: dict[str, Any] = {"cu_seqlens": None if pack.batched else pack.layout}
    windows: dict[str, Any] = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
    key_bounds: dict[str, Any] = {"cu_seqlens": None if pack.batched else pack.layout.keys}
    if k_compressed is None:
        k_compressed = compress(k, **(compression_k or Compression())._asdict(), **windows, **key_bounds, impl=impl)
    if v_compressed is None:
        v_compressed = compress(v, **(compression_v or Compression())._asdict(), **windows, **key_bounds, impl=impl)
    common: dict[str, Any] = {**bounds, "softmax_scale": softmax_scale, "impl": impl}
    keys = Interval(config.kernel_size, config.kernel_stride)
    scale = _check_qkv(pack, q, k_compressed, v_compressed, keys, softmax_scale, suffix="_compressed")
    num_kv_heads, dim_v = v.shape[-2:]
    for name, x, sizes in (
        ("k_compressed", k_compressed, pack.shape(keys, Hk=num_kv_heads, Dk=q.shape[-1])),
        ("v_compressed", v_compressed, pack.shape(keys, Hk=num_kv_heads, Dv=dim_v)),
        ("v_window", v_window, pack.shape(Interval(), Hk=k_window.shape[-2], Dv=dim_v)),
    ):
        check_tensor(
            name,
            x,
            sizes,
            FLOAT_DTYPES,
            cure="the values of all branches are as wide as v, and the compressed branch has the heads of k",
        )
    row = _whole(q, v, config, impl)
    if row is not None:
        _check_loop_order(loop_order, row)
        tensors = map(pack.flat, (q, k, v, k_compressed, v_compressed))
        # The gradients of what both branches take are then added up in place.
        shared = k_window is k and v_window is v
        own = (None, None) if shared else (pack.flat(k_window), pack.flat(v_window))
        options = config, pack.layout, scale, loop_order, workspace_mib, recompute
        result = _compute(row, *tensors, *own, pack.flat(gates), *options)
        return NSAOutput(*map(pack.restore, result))
    out_compressed, lse = compressed_attention(q, k_compressed, v_compressed, **windows, **common)
    block_indices = select_blocks(
        q,
        k_compressed,
        lse,
        **windows,
        block_size=config.block_size,
        num_selected_blocks=config.num_selected_blocks,
        num_init_blocks=config.num_init_blocks,
        num_local_blocks=config.num_local_blocks,
        **common,
    )
    selected = selected_attention(
        q, k, v, block_indices, block_size=config.block_size, loop_order=loop_order, workspace_mib=workspace_mib,
        **common,
    )  # fmt: skip
    window = sliding_window_attention(q, k_window, v_window, window_size=config.window_size, **common)
    return NSAOutput(combine(out_compressed, selected.out, window.out, gates, impl=impl), block_indices)


def nsa_attention_with_kvcache(
    q: Tensor,
    gates: Tensor,
    pages: KVPages,
    config: NSAConfig | None = None,
    *,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> NSAOutput:
    """Native Sparse Attention of new tokens over a cache that holds them and all tokens before: decoding.

    The new tokens are the last ones of their sequences: token i of S stands at position `seq_lens[b] - S + i`. One at a
    negative position, of a sequence shorter than S, has output 0 and no block. `cache.NSACache` makes and fills caches.

    Made for a few new tokens; only what they attend to is read. Nothing waits for the device in the Triton kernels, and
    lengths and pages may change between replays of a CUDA graph. No gradients.

    Args:
        q: queries of the new tokens, `[B, S, Hq, Dk]`.
        gates: gates before the sigmoid, `[B, S, Hq, 3]` or `[B, S, 1, 3]`: compressed, selected, window.
        pages: keys and values, those of the new tokens included. No content of its `page_table` and `seq_lens` leads
            to an access out of bounds; a token whose page is none is not attended to (`reference` wants all pages).
        config: the sizes (windows, blocks, T, window); `NSAConfig()` by default.
        softmax_scale: factor of the scores; Dk ** -0.5 by default.
        impl: see the module.

    Returns:
        `out [B, S, Hq, Dv]` and `block_indices [B, S, Hk, T]`.

    Example:
        >>> import torch
        >>> from flash_sparse_attention.types import KVPages
        >>> k, k_compressed = torch.randn(2, 1024, 2, 16), torch.randn(2, 64, 2, 16)
        >>> table, lengths = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([1000, 7], dtype=torch.int32)
        >>> pages = KVPages(k, k, k, k, k_compressed, k_compressed, table, lengths)
        >>> nsa_attention_with_kvcache(torch.randn(2, 1, 8, 16), torch.zeros(2, 1, 8, 3), pages).out.shape
        torch.Size([2, 1, 8, 16])
    """
    config = config_or_default(config)
    check_tensor("q", q, {"B": None, "S": None, "Hq": None, "Dk": None}, FLOAT_DTYPES)
    batch, tokens, num_heads, head_dim = q.shape
    check_pages(pages, config)
    num_kv_heads, dim_v = pages.v.shape[2:]
    check_heads(num_heads, num_kv_heads)
    if pages.k.shape[3] != head_dim:
        raise bad("q", f"of the head dimension of the cache, Dk={pages.k.shape[3]}", list(q.shape))
    if len(pages.seq_lens) != batch:
        raise bad("q", f"of the B={len(pages.seq_lens)} sequences of the cache", list(q.shape))
    shared = isinstance(gates, Tensor) and gates.dim() == 4 and gates.shape[2] == 1
    gate_shape: dict[str, int | None] = {"B": batch, "S": tokens, "Hq": 1 if shared else num_heads, "branches": 3}
    check_tensor("gates", gates, gate_shape, FLOAT_DTYPES, cure="one gate per head and branch, or one head for all")
    check_same("dtype", **{"pages.k": pages.k}, q=q)
    check_same("device", **{"pages.k": pages.k}, q=q, gates=gates)
    if 0 in q.shape[:2]:
        empty = q.new_empty(batch, tokens, num_kv_heads, config.num_selected_blocks, dtype=torch.int32)
        return NSAOutput(q.new_empty(batch, tokens, num_heads, dim_v), empty)
    reach = geometry.windows_reach(config.kernel_size, config.kernel_stride, config.block_size)
    sizes = max(head_dim, dim_v), reach, config.num_selected_blocks
    compute = load(resolve(WITH_KVCACHE, impl, q.device, q.dtype, *sizes))
    scale = float(head_dim) ** -0.5 if softmax_scale is None else float(softmax_scale)
    with no_autocast(q):
        return NSAOutput(*compute(q, gates, pages, config, scale))


def check_pages(pages: KVPages, config: NSAConfig) -> None:
    """The tensors of a cache fit each other and the configuration; their contents are not read.

    Raises:
        ValueError: if they do not.
    """
    if not isinstance(pages, KVPages):
        raise bad("pages", "a KVPages", type(pages).__name__, "`pages` of a layer of an NSACache is one")
    check_tensor("pages.k", pages.k, dict.fromkeys(("P", "page_size", "Hk", "Dk")), FLOAT_DTYPES)
    check_tensor("pages.v", pages.v, dict.fromkeys(("P", "page_size", "Hk", "Dv")), FLOAT_DTYPES)
    count, page_size, num_kv_heads, dim = pages.k.shape
    dim_v, rows = pages.v.shape[3], page_size // config.kernel_stride
    if page_size == 0 or page_size % config.block_size:
        raise bad("pages.k", f"of pages of a multiple of block_size={config.block_size} tokens", page_size)
    for name, size, width in (
        ("v", page_size, dim_v),
        ("k_window", page_size, dim),
        ("v_window", page_size, dim_v),
        ("k_compressed", rows, dim),
        ("v_compressed", rows, dim_v),
    ):
        shape: dict[str, int | None] = {"P": count, "rows": size, "Hk": num_kv_heads, "D": width}
        check_tensor(f"pages.{name}", getattr(pages, name), shape, FLOAT_DTYPES)
    check_tensor("pages.page_table", pages.page_table, {"B": None, "pages": None}, (torch.int32,))
    check_tensor("pages.seq_lens", pages.seq_lens, {"B": len(pages.page_table)}, (torch.int32,))
    if 0 in (count, num_kv_heads, dim, dim_v, pages.page_table.shape[1]):
        raise bad("pages.k", "of at least one page, head and channel", list(pages.k.shape))
    named = {f"pages.{name}": value for name, value in vars(pages).items()}
    check_same("device", **named)
    del named["pages.page_table"], named["pages.seq_lens"]
    check_same("dtype", **named)


def _whole(q: Tensor, v: Tensor, config: NSAConfig, impl: str) -> Capability | None:
    """The row that computes the whole attention at once, or None if its operators are to be called one by one."""
    if impl == "reference":
        return None
    reach = geometry.windows_reach(config.kernel_size, config.kernel_stride, config.block_size)
    sizes = q.device, q.dtype, max(q.shape[-1], v.shape[-1]), reach, config.num_selected_blocks
    row = resolve(WHOLE, impl, *sizes)
    # Where there are kernels for some operators and not for the whole, those are taken.
    if (
        impl == "auto"
        and row.impl == "blockwise"
        and any(resolve(op, impl, *sizes).impl != row.impl for op in OPERATORS)
    ):
        return None
    return row


@dataclass(frozen=True)
class _Pack:
    """The form of a call's tensors: packed with a layout, or batched, which is a layout of equal lengths."""

    layout: SequenceLayout
    batched: bool

    @classmethod
    def of(
        cls, name: str, x: Tensor, heads: str, dim: str, cu_seqlens: CuSeqlens, cu_seqlens_k: CuSeqlens = None
    ) -> _Pack:
        """The form of the call whose first tensor is `x`."""
        batched = isinstance(x, Tensor) and x.dim() == 4
        shape: dict[str, int | None] = dict.fromkeys((*(("B", "S") if batched else ("N",)), heads, dim))
        check_tensor(
            name,
            x,
            shape,
            FLOAT_DTYPES,
            cure=f"pack it as [N, {heads}, {dim}] with cu_seqlens, or batch it as [B, S, {heads}, {dim}]",
        )
        for what, size in zip(shape, x.shape, strict=True):
            if size == 0 and what not in ("N", "S"):
                raise bad(name, f"a tensor [{', '.join(shape)}] with {what} of at least 1", list(x.shape))
        layout = SequenceLayout.of(name, x, batched, cu_seqlens)
        if cu_seqlens_k is not None:
            if batched:
                raise bad("cu_seqlens_k", f"left out for a batched {name} [B, S, ...]", "both", "pack the batch")
            if isinstance(cu_seqlens_k, Tensor):
                cu_seqlens_k = SequenceLayout.from_cu_seqlens(cu_seqlens_k)
            if not isinstance(cu_seqlens_k, SequenceLayout):
                got = type(cu_seqlens_k).__name__
                raise bad("cu_seqlens_k", "an int32 tensor [B + 1], a SequenceLayout or None", got)
            layout = layout.after(cu_seqlens_k)
        return cls(layout, batched)

    def shape(self, keys: Interval | None = None, **dims: int | None) -> dict[str, int | None]:
        """The expected shape of a tensor over the keys of an interval (over the queries by default)."""
        lengths = self.layout.lengths
        counts = lengths if keys is None else tuple(map(keys.num_keys, self.layout.keys.lengths))
        if self.batched:
            return {"B": len(counts), "S": counts[0] if counts else 0, **dims}
        return {"N" if counts == lengths else "M": sum(counts), **dims}

    def flat(self, x: Tensor) -> Tensor:
        """`x` packed."""
        return x.flatten(0, 1) if self.batched else x

    def restore(self, x: Tensor) -> Tensor:
        """A packed result in the form of the call."""
        batch = self.layout.batch
        return x.reshape(batch, x.shape[0] // max(batch, 1), *x.shape[1:]) if self.batched else x


def _compute(row: Capability, x: Tensor, *args: Any, **options: Any) -> Any:
    """Computes the operator of a row; `x` is the first of what it is given.

    Raises:
        NotImplementedError: for tangents of forward-mode differentiation, if it would leave them out in silence. Not
            while `torch.compile` traces: its tracer was seen to follow the question with torch 2.13 alone.
    """
    if row.backward_only and not torch.compiler.is_compiling():
        given = (value for arg in (x, *args) for value in (arg if isinstance(arg, tuple) else (arg,)))
        if any(isinstance(value, Tensor) and unpack_dual(value).tangent is not None for value in given):
            raise NotImplementedError(
                f"{row.operator} with impl={row.impl!r} has no derivative of forward mode (jvp): use impl='reference', "
                "or the backward pass"
            )
    with no_autocast(x):
        return load(row)(x, *args, **options)


def _check_qkv(
    pack: _Pack, q: Tensor, k: Tensor, v: Tensor, keys: Interval, softmax_scale: float | None, suffix: str
) -> float:
    """Checks q, k and v against each other; returns the factor of the scores."""
    num_heads, head_dim = q.shape[-2:]
    check_tensor(f"k{suffix}", k, pack.shape(keys, Hk=None, Dk=head_dim), FLOAT_DTYPES)
    check_heads(num_heads, k.shape[-2])
    check_tensor(f"v{suffix}", v, pack.shape(keys, Hk=k.shape[-2], Dv=None), FLOAT_DTYPES)
    named = {"q": q, f"k{suffix}": k, f"v{suffix}": v}
    check_same("dtype", **named)
    check_same("device", **named)
    if softmax_scale is None:
        return float(head_dim) ** -0.5
    if not isinstance(softmax_scale, (int, float)):
        raise bad("softmax_scale", "a number or None", type(softmax_scale).__name__)
    return float(softmax_scale)


def _check_loop_order(loop_order: str, row: Capability) -> None:
    """The loop order is one between which the implementation lets a caller choose."""
    check_choice("loop_order", loop_order, LOOP_ORDERS)
    if loop_order != "auto" and loop_order not in row.loop_orders:
        choices = " or ".join(map(repr, ("auto", *row.loop_orders)))
        cure = "pass loop_order='auto', or another impl"
        raise bad("loop_order", f"{choices} with impl={row.impl!r}", repr(loop_order), cure)


def _check_windows(kernel_size: int, kernel_stride: int) -> None:
    check_positive("kernel_stride", kernel_stride)
    check_multiple("kernel_size", check_positive("kernel_size", kernel_size), "kernel_stride", kernel_stride)


def _check_gates(pack: _Pack, gates: Tensor, num_heads: int) -> None:
    shared = isinstance(gates, Tensor) and gates.dim() >= 2 and gates.shape[-2] == 1
    shape = pack.shape(Hq=1 if shared else num_heads, branches=3)
    check_tensor("gates", gates, shape, FLOAT_DTYPES, cure="one gate per head and branch, or one head for all")


def _check_compression(x: Tensor, compression: Compression, kernel_size: int) -> None:
    """The weights are those that the kind needs, of the right shapes."""
    num_kv_heads, dim = x.shape[-2:]
    kind, flat = compression.kind, kernel_size * dim
    check_choice("kind", kind, compression_kinds())
    hidden = compression.weight.shape[-1] if kind == "mlp" and isinstance(compression.weight, Tensor) else None
    weights: dict[str, dict[str, dict[str, int | None]]] = {
        "mean": {},
        "weighted": {"weight": {"Hk": num_kv_heads, "l": kernel_size}},
        "linear": {"weight": {"Hk": num_kv_heads, "l * D": flat, "D": dim}},
        "mlp": {
            "weight": {"Hk": num_kv_heads, "l * D": flat, "E": None},
            "weight_out": {"Hk": num_kv_heads, "E": hidden, "D": dim},
        },
    }
    needed = weights[kind]
    optional: dict[str, dict[str, int | None]] = {"position_embedding": {"l": kernel_size, "D": dim}}
    if kind == "mlp":
        optional |= {"bias": {"Hk": num_kv_heads, "E": hidden}, "bias_out": {"Hk": num_kv_heads, "D": dim}}
    # Weights may be wider than half-precision tokens, as parameters often are; float64 goes with float64 alone.
    dtypes = [dtype for dtype in FLOAT_DTYPES if (dtype == torch.float64) == (x.dtype == torch.float64)]
    for name, value in compression._asdict().items():
        if name == "kind" or (value is None and name not in needed):
            continue
        if value is None:
            raise bad(name, f"a tensor for kind={kind!r}", None)
        if name not in needed and name not in optional:
            raise bad(name, f"left out for kind={kind!r}", "a tensor")
        check_tensor(name, value, {**needed, **optional}[name], dtypes)
        check_same("device", x=x, **{name: value})
