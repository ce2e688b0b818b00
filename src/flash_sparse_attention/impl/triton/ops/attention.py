"""The whole attention as one operator: three branches and their gated sum.

Its backward pass is more than those of the operators in a row. The gates become shifts of the softmax (see
`..delta`), so that all branches share the gradient of the output; the gradient of q is added up in place; and what is
not wanted in memory is computed again, a branch at a time.

    forward    compressed -> selection -> selected     window     gated sum
    saved      q, k, v, ... and the selection; out and lse of each branch, but for those to be computed again
    backward   shifts, d_gates -> selected (dq =) -> window (dq +=) -> compressed (dq +=)
               of long sequences shifts and d_gates of a branch, and what is computed again, when it is its turn
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....config import NSAConfig
from ....types import NSAOutput, SequenceLayout
from ....validation import bad
from ..block_scores import launch_select_blocks
from ..combine import launch_combine
from ..delta import branches_at_once, launch_gated_shifts
from ..interval import IntervalSizes, launch_interval_dkv, launch_interval_dq, launch_interval_fwd
from ..primitives import dense_rows, on_its_device
from ..tuning import interval_schedule, score_tiles
from .interval import key_bounds, query_and_key_bounds
from .selected import MAX_PAIRS, attend_selected, differentiate_selected, kept_index, nothing

BRANCHES = ("compressed", "selected", "window")


class Sizes(NamedTuple):
    """The numbers of a call, as the custom operators take them.

    Attributes:
        max_length: tokens of the longest sequence, those without queries included.
        kernel_size, ..., window_size: as in `NSAConfig`.
        softmax_scale, loop_order, workspace_mib: as in `nsa_attention`.
        recompute: names of what is computed again, with a comma between them.
    """

    max_length: int
    kernel_size: int
    kernel_stride: int
    block_size: int
    num_selected_blocks: int
    num_init_blocks: int
    num_local_blocks: int
    window_size: int
    softmax_scale: float
    loop_order: str
    workspace_mib: int
    recompute: str

    @property
    def compressed(self) -> IntervalSizes:
        """Of the compressed branch."""
        return IntervalSizes.of(self.kernel_size, self.kernel_stride, 0, self.softmax_scale)

    @property
    def window(self) -> IntervalSizes:
        """Of the sliding window."""
        return IntervalSizes.of(1, 1, self.window_size, self.softmax_scale)

    @property
    def selected(self) -> tuple[int, float, str, int]:
        """What selected attention takes."""
        return self.block_size, self.softmax_scale, self.loop_order, self.workspace_mib

    def keeps(self, part: str) -> bool:
        """Whether a part is saved for the backward pass."""
        return part not in self.recompute.split(",")


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    gates: Tensor,
    config: NSAConfig,
    layout: SequenceLayout,
    softmax_scale: float,
    loop_order: str = "auto",
    workspace_mib: int = 1024,
    recompute: tuple[str, ...] = (),
) -> NSAOutput:
    """The gated sum of the branches `[N, Hq, Dv]` and the selection int32 `[N, Hk, T]`, by Triton kernels.

    Args:
        q: `[N, Hq, Dk]`; k, k_window: `[N, Hk, Dk]`; v, v_window: `[N, Hk, Dv]`; k_compressed: `[M, Hk, Dk]`;
            v_compressed: `[M, Hk, Dv]`; gates: `[N, Hq, 3]` or `[N, 1, 3]`. Keys may be of more tokens than q.
            None for both k_window and v_window stands for k and v, whose gradients are then summed in place.
        config: the sizes.
        layout: of the N queries, the last tokens of their sequences.
        softmax_scale: factor of the scores.
        loop_order, workspace_mib, recompute: see `functional.nsa_attention`.

    Raises:
        ValueError: if the selection has 2**31 entries or more.
    """
    slots = config.num_selected_blocks
    if q.shape[0] * k.shape[1] * slots >= MAX_PAIRS:
        entries = q.shape[0] * k.shape[1] * slots
        raise bad("q", f"with fewer than {MAX_PAIRS} entries of a selection N * Hk * T", entries, "split the pack")
    sizes = Sizes(
        layout.keys.max_length,
        config.kernel_size,
        config.kernel_stride,
        config.block_size,
        slots,
        config.num_init_blocks,
        config.num_local_blocks,
        config.window_size,
        softmax_scale,
        loop_order,
        workspace_mib,
        ",".join(recompute),
    )
    if (k_window is None) != (v_window is None):
        k_window, v_window = _of_window(k, v, k_window, v_window)
    tensors = q, k, v, k_compressed, v_compressed, k_window, v_window, gates
    out, block_indices, *_ = _nsa_attention(*tensors, *query_and_key_bounds(layout), *sizes)
    return NSAOutput(out, block_indices)


@torch.library.custom_op("flash_sparse_attention::nsa_attention_triton", mutates_args=())
@on_its_device
def _nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
    recompute: str,
) -> list[Tensor]:
    """out, block_indices; out and lse of the compressed, the selected and the window branch; the inverted index.

    Outputs and index that are not kept are empty. `cu_seqlens_k`: as `interval._interval_attention`.
    """
    sizes = Sizes(
        max_length, kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks,
        window_size, softmax_scale, loop_order, workspace_mib, recompute,
    )  # fmt: skip
    if q.shape[0] == 0:
        return _empty_outputs(q, k, v, cu_seqlens, sizes)
    q, k, v, k_compressed, v_compressed = map(dense_rows, (q, k, v, k_compressed, v_compressed))
    k_window, v_window = _of_window(k, v, k_window, v_window)
    packs = cu_seqlens, cu_seqlens_k
    compressed_bounds = key_bounds(*packs, kernel_size, kernel_stride)
    out_compressed, lse_compressed = _attend_compressed(q, k_compressed, v_compressed, compressed_bounds, *packs, sizes)
    block_indices = launch_select_blocks(
        q, k_compressed, lse_compressed, cu_seqlens, compressed_bounds, max_length, kernel_size, kernel_stride,
        block_size, num_selected_blocks, num_init_blocks, num_local_blocks, softmax_scale,
        score_tiles(q.shape[2], q.dtype), cu_seqlens_k,
    )  # fmt: skip
    out_selected, lse_selected, *index = attend_selected(
        q, k, v, block_indices, cu_seqlens, cu_seqlens_k, *sizes.selected, sizes.keeps("index")
    )
    out_window, lse_window = _attend_window(q, k_window, v_window, *packs, sizes)
    out = launch_combine((out_compressed, out_selected, out_window), gates)
    branches = {
        "compressed": (out_compressed, lse_compressed),
        "selected": (out_selected, lse_selected),
        "window": (out_window, lse_window),
    }
    saved: list[Tensor] = []
    for name, (out_branch, lse) in branches.items():
        saved += [out_branch if sizes.keeps(name) else out.new_empty(0), lse]
    return [out, block_indices, *saved, *index]


@torch.library.custom_op("flash_sparse_attention::nsa_attention_triton_backward", mutates_args=())
@on_its_device
def _nsa_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    k_window: Tensor | None,
    v_window: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    saved: list[Tensor],
    max_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
    recompute: str,
) -> list[Tensor]:
    """Gradients of q, k, v, k_compressed, v_compressed, gates and, if they are not k and v, k_window and v_window."""
    inputs = [q, k, v, k_compressed, v_compressed, gates, *(x for x in (k_window, v_window) if x is not None)]
    if q.shape[0] == 0:
        return [x.new_zeros(x.shape) for x in inputs]
    shared = k_window is None
    sizes = Sizes(
        max_length, kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks,
        window_size, softmax_scale, loop_order, workspace_mib, recompute,
    )  # fmt: skip
    d_out, q, k, v, k_compressed, v_compressed = map(dense_rows, (d_out, *inputs[:5]))
    k_window, v_window = _of_window(k, v, k_window, v_window)
    packs = cu_seqlens, cu_seqlens_k
    compressed_bounds = key_bounds(*packs, kernel_size, kernel_stride)
    block_indices, out_compressed, lse_compressed, out_selected, lse_selected, out_window, lse_window, *index = saved
    place, pairs, bucket_ends = index
    outs = {"compressed": out_compressed, "selected": out_selected, "window": out_window}
    lses = {"compressed": lse_compressed, "selected": lse_selected, "window": lse_window}
    d_gates = gates.new_empty(gates.shape)
    for numbers in branches_at_once(q.shape[0] * q.shape[1]):
        branches = BRANCHES[numbers.start : numbers.stop]
        again = {branch: outs[branch] for branch in branches}
        if "compressed" in branches and not sizes.keeps("compressed"):
            again["compressed"] = _attend_compressed(q, k_compressed, v_compressed, compressed_bounds, *packs, sizes)[0]
        if "selected" in branches and not sizes.keeps("selected"):
            again["selected"], lse, place, pairs, bucket_ends = attend_selected(
                q, k, v, block_indices, cu_seqlens, cu_seqlens_k, *sizes.selected, True, (place, pairs, bucket_ends)
            )
            del lse
        if "window" in branches and not sizes.keeps("window"):
            again["window"] = _attend_window(q, k_window, v_window, *packs, sizes)[0]
        lses_again = [lses[branch] for branch in branches]
        shift, delta = launch_gated_shifts(d_out, [*again.values()], lses_again, gates, d_gates, numbers)
        del again
        if "selected" in branches:
            at = branches.index("selected")
            dq, dk, dv = differentiate_selected(
                d_out, q, k, v, block_indices, cu_seqlens, cu_seqlens_k, shift[at], delta[at], place, pairs,
                bucket_ends, *sizes.selected,
            )  # fmt: skip
            del place, pairs, bucket_ends
        if "window" in branches:
            at = branches.index("window")
            tensors = d_out, q, k_window, v_window, shift[at], delta[at], cu_seqlens, key_bounds(*packs, 1, 1)
            add_to = (dk, dv) if shared else None
            d_window = _differentiate_interval(*tensors, cu_seqlens_k, sizes.window, dq, add_to)
            del tensors
        if "compressed" in branches:
            at = branches.index("compressed")
            tensors = d_out, q, k_compressed, v_compressed, shift[at], delta[at], cu_seqlens, compressed_bounds
            d_compressed = _differentiate_interval(*tensors, cu_seqlens_k, sizes.compressed, dq)
            del tensors
        # Before those of the next branch are there.
        del shift, delta
    return [dq, dk, dv, *d_compressed, d_gates, *(() if shared else d_window)]


def _differentiate_interval(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    cu_seqlens_k: Tensor | None,
    sizes: IntervalSizes,
    dq: Tensor,
    add_to: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v; that of q is added to `dq`, and those of k and v to `add_to` if there is one."""
    schedule = interval_schedule(q.shape[2], v.shape[2], q.dtype, windowed=sizes.window_size > 0)
    given = d_out, q, k, v, shift, delta, cu_seqlens, bounds, sizes
    launch_interval_dq(*given, schedule.dq, dq, add=True, cu_seqlens_k=cu_seqlens_k)
    return launch_interval_dkv(*given, schedule.dkv, cu_seqlens_k, add_to=add_to)


def _of_window(k: Tensor, v: Tensor, k_window: Tensor | None, v_window: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the window, whose rows are dense."""
    return k if k_window is None else dense_rows(k_window), v if v_window is None else dense_rows(v_window)


def _attend_compressed(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    tiles = interval_schedule(q.shape[2], v.shape[2], q.dtype, windowed=False).forward
    return launch_interval_fwd(q, k, v, cu_seqlens, bounds, sizes.compressed, tiles, cu_seqlens_k)


def _attend_window(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    tiles = interval_schedule(q.shape[2], v.shape[2], q.dtype, windowed=True).forward
    bounds = key_bounds(cu_seqlens, cu_seqlens_k, 1, 1)
    return launch_interval_fwd(q, k, v, cu_seqlens, bounds, sizes.window, tiles, cu_seqlens_k)


def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sizes: Sizes) -> list[Tensor]:
    """What `_nsa_attention` returns, with nothing in it."""
    (tokens, heads, _), dim = q.shape, v.shape[2]
    out = q.new_empty(tokens, heads, dim)
    indices = q.new_empty(tokens, k.shape[1], sizes.num_selected_blocks, dtype=torch.int32)
    saved = []
    for name in BRANCHES:
        saved.append(torch.empty_like(out) if sizes.keeps(name) else out.new_empty(0))
        saved.append(q.new_empty(tokens, heads, dtype=torch.float32))
    index = nothing(q)
    if sizes.keeps("index") and tokens > 0:
        index = kept_index(q, k, v, indices, cu_seqlens, sizes.block_size, sizes.loop_order, sizes.workspace_mib)
    return [out, indices, *saved, *index]


_nsa_attention.register_fake(
    lambda q, k, v, k_compressed, v_compressed, k_window, v_window, gates, cu_seqlens, cu_seqlens_k, *sizes: (
        _empty_outputs(q, k, v, cu_seqlens, Sizes(*sizes))
    )
)
_nsa_attention_backward.register_fake(
    lambda d_out, *inputs: [x.new_empty(x.shape) for x in (*inputs[:5], inputs[7], *inputs[5:7]) if x is not None]
)


def _save(ctx, inputs, output):
    # Only the first output is given away: zeros for the others would be as large as the branches.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.sizes = inputs[10:]


def _differentiate(ctx, grads):
    # Once: activation checkpointing computes them again when they are taken, and refuses a second time.
    saved = ctx.saved_tensors
    if grads[0] is None:
        return (None,) * (10 + len(ctx.sizes))
    gradients = _nsa_attention_backward(grads[0], *saved[:10], list(saved[10:]), *ctx.sizes)
    d_window = gradients[6:] or (None, None)
    return (*gradients[:5], *d_window, gradients[5], None, None, *(None for _ in ctx.sizes))


_nsa_attention.register_autograd(_differentiate, setup_context=_save)
