"""The whole attention as one operator: three branches and their gated sum.

Its backward pass is more than those of the operators in a row. A gate w on the output of a branch is a factor of its
probabilities P in the gradient, w * P = exp(scores - (lse - log w)), so that all branches share the gradient of the
output; and the gradient of q is added up in place. That is less new memory, which is slow on a CPU.

    forward    compressed -> selection -> selected     window     gated sum
    saved      q, k, v, ... and the selection; out and lse of each branch
    backward   shifts, d_gates -> selected (dq =) -> window (dq +=) -> compressed (dq +=)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import NSAConfig
from ...geometry import Interval
from ...precision import no_autocast, wide
from ...types import AttentionOutput, NSAOutput, SequenceLayout
from .block_selection import select_blocks
from .combine import combine
from .common import LN_2, LOG2_E, Softmax, empty_outputs, layout_of, normaliser_log2, softmax_shift
from .interval import differentiate_interval, interval_attention
from .selected import differentiate_selected, selected_attention


class _Sizes(NamedTuple):
    """The numbers of a call, as the custom operators take them: those of `NSAConfig`, and the factor of the scores."""

    kernel_size: int
    kernel_stride: int
    block_size: int
    num_selected_blocks: int
    num_init_blocks: int
    num_local_blocks: int
    window_size: int
    softmax_scale: float

    @property
    def compressed(self) -> Interval:
        """Of the compressed branch."""
        return Interval(self.kernel_size, self.kernel_stride)

    @property
    def window(self) -> Interval:
        """Of the sliding window."""
        return Interval(window_size=self.window_size)


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
    *_: object,
) -> NSAOutput:
    """The gated sum of the branches `[N, Hq, Dv]` and the selection int32 `[N, Hk, T]`.

    Args:
        q: `[N, Hq, Dk]`; k, k_window: `[N, Hk, Dk]`; v, v_window: `[N, Hk, Dv]`; k_compressed: `[M, Hk, Dk]`;
            v_compressed: `[M, Hk, Dv]`; gates: `[N, Hq, 3]` or `[N, 1, 3]`. Keys may be of more tokens than q.
            None for both k_window and v_window stands for k and v, whose gradients are then summed in place.
        config: the sizes.
        layout: of the N queries, the last tokens of their sequences.
        softmax_scale: factor of the scores.
        _: what is for kernels.
    """
    sizes = _Sizes(
        config.kernel_size, config.kernel_stride, config.block_size, config.num_selected_blocks,
        config.num_init_blocks, config.num_local_blocks, config.window_size, softmax_scale,
    )  # fmt: skip
    if (k_window is None) != (v_window is None):
        k_window, v_window = _of_window(k, v, k_window, v_window)
    tensors = q, k, v, k_compressed, v_compressed, k_window, v_window, gates
    out, block_indices, *_rest = _nsa_attention(*tensors, layout.cu_seqlens, layout.keys.cu_seqlens, *sizes)
    return NSAOutput(out, block_indices)


@torch.library.custom_op("flash_sparse_attention::nsa_attention_blockwise", mutates_args=())
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
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window_size: int,
    softmax_scale: float,
) -> list[Tensor]:
    """out, block_indices; out and lse of the compressed, the selected and the window branch."""
    sizes = _Sizes(
        kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks, window_size,
        softmax_scale,
    )  # fmt: skip
    layout = layout_of(cu_seqlens, cu_seqlens_k)
    k_window, v_window = _of_window(k, v, k_window, v_window)
    compressed = interval_attention(q, k_compressed, v_compressed, sizes.compressed, layout, softmax_scale)
    block_indices = select_blocks(q, k_compressed, compressed.lse, *sizes[:6], layout, softmax_scale)
    selected = selected_attention(q, k, v, block_indices, block_size, layout, softmax_scale)
    window = interval_attention(q, k_window, v_window, sizes.window, layout, softmax_scale)
    out = combine(compressed.out, selected.out, window.out, gates)
    return [out, block_indices, *compressed, *selected, *window]


@torch.library.custom_op("flash_sparse_attention::nsa_attention_blockwise_backward", mutates_args=())
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
    cu_seqlens_k: Tensor,
    saved: list[Tensor],
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window_size: int,
    softmax_scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, k_compressed, v_compressed, gates and, if they are not k and v, k_window and v_window."""
    sizes = _Sizes(
        kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks, window_size,
        softmax_scale,
    )  # fmt: skip
    layout, shared = layout_of(cu_seqlens, cu_seqlens_k), k_window is None
    k_window, v_window = _of_window(k, v, k_window, v_window)
    block_indices, *branches = saved
    with no_autocast(q):
        outputs = [AttentionOutput(*branches[at : at + 2]) for at in (0, 2, 4)]
        of_compressed, of_selected, of_window = (
            _gated_softmax(d_out, output, gates[..., x]) for x, output in enumerate(outputs)
        )
        weights = wide(gates).sigmoid()
        delta_NH3 = torch.stack([-of.less_shift for of in (of_compressed, of_selected, of_window)], -1)
        # One gate for all heads collects the gradients of all.
        d_gates = delta_NH3.sum_to_size(gates.shape) * weights * (1 - weights)
        dq = torch.zeros(q.shape, dtype=wide(q[:0]).dtype, device=q.device)
        dk, dv = differentiate_selected(
            d_out, q, k, v, block_indices, of_selected, block_size, layout, softmax_scale, dq
        )
        options = layout, softmax_scale, dq
        d_window = differentiate_interval(d_out, q, k_window, v_window, of_window, sizes.window, *options)
        if shared:
            dk, dv = dk.add_(d_window[0]), dv.add_(d_window[1])
        d_compressed = differentiate_interval(
            d_out, q, k_compressed, v_compressed, of_compressed, sizes.compressed, *options
        )
        dq.mul_(LN_2)
    inputs = q, k, v, k_compressed, v_compressed, gates, *(() if shared else (k_window, v_window))
    grads = dq, dk, dv, *d_compressed, d_gates, *(() if shared else d_window)
    return [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]


def _gated_softmax(d_out: Tensor, output: AttentionOutput, gate: Tensor) -> Softmax:
    """Of a branch whose output is weighted with sigmoid(gate), `[N, Hq]` or `[N, 1]`."""
    shift = softmax_shift(d_out, torch.zeros_like(output.lse), output.out)
    weight_log2 = (F.logsigmoid(wide(gate)) * LOG2_E).to(output.lse.dtype)
    return Softmax(weight_log2 - normaliser_log2(output.lse), shift.neg_())


def _of_window(k: Tensor, v: Tensor, k_window: Tensor | None, v_window: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of the window."""
    return k if k_window is None else k_window, v if v_window is None else v_window


def _empty(q: Tensor, k: Tensor, v: Tensor, sizes: _Sizes) -> list[Tensor]:
    """What `_nsa_attention` returns, with nothing in it."""
    indices = q.new_empty(q.shape[0], k.shape[1], sizes.num_selected_blocks, dtype=torch.int32)
    branches = [x for _ in range(3) for x in empty_outputs(q, v)]
    return [branches[0].new_empty(branches[0].shape), indices, *branches]


_nsa_attention.register_fake(
    lambda q, k, v, k_compressed, v_compressed, k_window, v_window, gates, cu_seqlens, cu_seqlens_k, *sizes: _empty(
        q, k, v, _Sizes(*sizes)
    )
)
_nsa_attention_backward.register_fake(
    lambda d_out, *inputs: [x.new_empty(x.shape) for x in (*inputs[:5], inputs[7], *inputs[5:7]) if x is not None]
)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    # Only the first output is given away: zeros for the others would be as large as the branches.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *output[1:])
    ctx.sizes = inputs[10:]


def _differentiate(ctx, grads):  # type: ignore[no-untyped-def]
    # Once: activation checkpointing computes them again when they are taken, and refuses a second time.
    saved = ctx.saved_tensors
    if grads[0] is None:
        return (None,) * (10 + len(ctx.sizes))
    gradients = _nsa_attention_backward(grads[0], *saved[:10], list(saved[10:]), *ctx.sizes)
    d_window = gradients[6:] or (None, None)
    return (*gradients[:5], *d_window, gradients[5], None, None, *(None for _ in ctx.sizes))


_nsa_attention.register_autograd(_differentiate, setup_context=_save)
