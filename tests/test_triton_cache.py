"""`NSACache` on Triton kernels, in Triton's interpreter: what they write is what PyTorch writes, decoding is exact."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.impl import blockwise, interpreting
from flash_sparse_attention.nn import NativeSparseAttention
from flash_sparse_attention.types import Place

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]

HIDDEN = 24
SIZES = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "num_selected_blocks": 4,
    "num_local_blocks": 1,
    "window_size": 21,
}


def random_place(count: int, pages: int, rows: int) -> Place:
    """Different places for some rows, none for the others, which point anywhere."""
    flat = torch.randperm(pages * rows)[:count]
    return Place(flat // rows, flat % rows, torch.rand(count) < 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_are_stored(rotated: bool, dtype: torch.dtype):
    from flash_sparse_attention.impl import triton

    torch.manual_seed(0)
    # Slices of a fused projection, and a pool whose pages hold other things too.
    k, v = torch.randn(9, 2, 80, dtype=dtype)[..., :12], torch.randn(9, 5, 10, dtype=dtype)[:, 1:3]
    k = torch.randn(9, 2 * 12 + 5, dtype=dtype)[:, 5:].unflatten(1, (2, 12))
    place = random_place(9, 4, 6)
    by = None
    if rotated:
        angle = torch.randn(9, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        by = angle.cos(), angle.sin()
    results = []
    for module in (blockwise, triton):
        pool = torch.zeros(4, 2, 6, 2, 12, dtype=dtype)
        v_pool = torch.zeros(4, 6, 2, 10, dtype=dtype)
        module.store_rows((pool[:, 1], v_pool), (k, v), place, by)
        results.append((pool, v_pool))
    torch.testing.assert_close(results[1], results[0])
    assert results[1][1].count_nonzero() == place.exists.sum() * 20


def test_windows_are_put_together():
    from flash_sparse_attention.impl import triton

    torch.manual_seed(0)
    tails, rows = (torch.randn(3, 6, 2, 12), torch.randn(3, 6, 2, 5)), (torch.randn(9, 2, 12), torch.randn(9, 2, 5))
    tail = Place(torch.randint(3, (4, 8)), torch.randint(6, (4, 8)), torch.ones(4, 8, dtype=torch.bool))
    chosen = torch.randint(9, (4, 8)), torch.rand(4, 8) < 0.5
    expected = blockwise.gather_windows(tails, rows, tail, *chosen)
    got = triton.gather_windows(tails, rows, tail, *chosen)
    assert all(map(torch.equal, got, expected))


def test_decoding():
    torch.manual_seed(0)
    layer = NativeSparseAttention(HIDDEN, 4, 2, NSAConfig.preset("paper", **SIZES), head_dim=16, impl="triton")
    torch.nn.init.normal_(layer.branch_gate_proj.weight)
    x = torch.randn(2, 41, HIDDEN)
    cache = layer.new_cache(2, 64, page_size=32, num_pages=8)
    cache.set_pages(torch.tensor([[3, 0], [7, 1]], dtype=torch.int32))
    got = []
    for piece in x.split((30, 1, 3, 7), 1):
        with cache.extend(SequenceLayout.uniform(*piece.shape[:2])):
            got.append(layer(piece, cache=cache.layers[0]))
    layer.impl = layer.compressor_k.impl = layer.compressor_v.impl = "reference"
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=2e-5, atol=2e-5)
