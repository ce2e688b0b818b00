"""The gated sum of the branches, in tiles of tokens, so that no temporary is as large as an output.

Shape suffixes: T tokens of a tile, H heads, V head dimension of the values, X branches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...precision import no_autocast, wide
from .common import Scratch

COMBINE_TILE = 256  # tokens


def combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    """As `reference.combine`, without stacking the branches."""
    return _combine(out_compressed, out_selected, out_window, gates)


@torch.library.custom_op("flash_sparse_attention::combine_blockwise", mutates_args=())
def _combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    branches = out_compressed, out_selected, out_window
    out = out_window.new_empty(out_window.shape)
    with no_autocast(out):
        scratch = Scratch(_weights(gates[:0], out))
        for part in _parts(len(out)):
            weights_THX, total_THV = _weights(gates[part], out), scratch.empty("total", *out[part].shape)
            torch.mul(branches[0][part], weights_THX[..., 0:1], out=total_THV)
            for x in (1, 2):
                total_THV.addcmul_(branches[x][part].to(total_THV.dtype), weights_THX[..., x : x + 1])
            out[part] = total_THV
    return out


@torch.library.custom_op("flash_sparse_attention::combine_blockwise_backward", mutates_args=())
def _combine_backward(
    d_out: Tensor, out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the branches and of the gates."""
    branches = out_compressed, out_selected, out_window
    grads = [x.new_empty(x.shape) for x in branches]
    d_gates = gates.new_empty(gates.shape)
    with no_autocast(d_out):
        scratch = Scratch(_weights(gates[:0], d_out))
        for part in _parts(len(d_out)):
            weights_THX = _weights(gates[part], d_out)
            d_weights_THX = weights_THX.new_empty(*d_out[part].shape[:2], 3)
            for x in range(3):
                product_THV = scratch.empty("product", *d_out[part].shape)
                torch.mul(d_out[part], branches[x][part], out=product_THV)
                torch.sum(product_THV, -1, out=d_weights_THX[..., x])
                grads[x][part] = torch.mul(d_out[part], weights_THX[..., x : x + 1], out=product_THV)
            # One gate for all heads collects the gradients of all.
            d_weights_THX = d_weights_THX.sum_to_size(weights_THX.shape)
            d_gates[part] = d_weights_THX * weights_THX * (1 - weights_THX)
    return grads[0], grads[1], grads[2], d_gates


def _weights(gates: Tensor, out: Tensor) -> Tensor:
    """sigmoid(gates), as wide as the sum of the branches is computed."""
    return wide(gates).to(torch.promote_types(wide(gates).dtype, wide(out[:0]).dtype)).sigmoid()


def _parts(length: int) -> Iterator[slice]:
    for first in range(0, length, COMBINE_TILE):
        yield slice(first, min(first + COMBINE_TILE, length))


def _differentiate_combine(ctx, d_out):  # type: ignore[no-untyped-def]
    return _combine_backward(d_out, *ctx.saved_tensors)


_combine.register_fake(lambda out_compressed, out_selected, out_window, gates: out_window.new_empty(out_window.shape))
_combine_backward.register_fake(lambda d_out, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
_combine.register_autograd(
    _differentiate_combine, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
