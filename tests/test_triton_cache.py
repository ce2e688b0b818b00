"""`NSACache` on Triton kernels, in Triton's interpreter: what they write is what PyTorch writes, decoding is exact."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention import Compression, NSACache, NSAConfig, SequenceLayout, compress
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


def in_wider_rows(angles: torch.Tensor) -> torch.Tensor:
    """The same, in the first half of rows that go on, as rotary embeddings of transformers are."""
    return torch.cat([angles, torch.full_like(angles, float("nan"))], 1)[:, : angles.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_are_stored(rotated: bool, several: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl import triton

    if several:  # rows as well, of which a program has as many as of a long prompt
        monkeypatch.setattr("flash_sparse_attention.impl.triton.cache_write.FEW_ROWS", 0)
        monkeypatch.setattr("flash_sparse_attention.impl.triton.cache_write.ROWS", 4)
    torch.manual_seed(0)
    # Slices of a fused projection, and a pool whose pages hold other things too.
    k, v = torch.randn(9, 2, 80, dtype=dtype)[..., :12], torch.randn(9, 5, 10, dtype=dtype)[:, 1:3]
    k = torch.randn(9, 2 * 12 + 5, dtype=dtype)[:, 5:].unflatten(1, (2, 12))
    place, few = random_place(9, 4, 6), random_place(9, 5, 3)
    by = None
    if rotated:
        angle = torch.randn(9, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        by = in_wider_rows(angle.cos()), in_wider_rows(angle.sin())
    results = []
    for module in (blockwise, triton):
        pool = torch.zeros(4, 2, 6, 2, 12, dtype=dtype)
        v_pool, others = torch.zeros(4, 6, 2, 10, dtype=dtype), torch.zeros(2, 5, 3, 2, 22, dtype=dtype)
        pairs = [((pool[:, 1], v_pool), (k, v), place)]
        if several:
            pairs += [
                ((other[..., :12].contiguous(), other[..., 12:].contiguous()), (2 * k, v), few) for other in others
            ]
        module.store_rows(pairs, by)
        results.append([x for pools, _, _ in pairs for x in pools])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
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


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("tokens", [1, 3, 7, 37])
def test_a_step_is_planned(tokens: int, page_size: int | None, monkeypatch: pytest.MonkeyPatch):
    # Several programs for the new tokens of a sequence, and windows that begin in the tile before.
    monkeypatch.setattr("flash_sparse_attention.impl.triton.cache_write.PLAN_TOKENS", 8)
    lengths = (0, 1, 7, 8, 11, 30, 41, 44)
    config = NSAConfig(**SIZES)
    options = {} if page_size is None else {"page_size": page_size, "num_pages": 40}
    sizes = {"num_layers": 1, "batch": len(lengths), "capacity": 48, "num_kv_heads": 1, "head_dim": 4, "max_crop": 2}
    steps = []
    for planned in (True, False):
        cache = NSACache(config, **sizes, **options)
        if page_size is not None:
            table = torch.arange(3 * len(lengths)).flip(0).view(len(lengths), 3).to(torch.int32)
            cache.set_pages(table)
        cache._set_lengths(lengths)
        monkeypatch.setattr("flash_sparse_attention.cache.nsa_cache.available", lambda *_, planned=planned: planned)
        # The last one has no room, which the device finds out by itself.
        for check in ("_make_room", "_note_written"):
            monkeypatch.setattr(NSACache, check, lambda *_: None)
        with cache.extend(SequenceLayout.uniform(len(lengths), tokens)) as step:
            steps.append(step)
        assert cache.seq_lens.tolist() == [length + tokens for length in lengths]
    got, expected = steps
    assert torch.equal(got.positions, expected.positions)
    for a, b in ((got.place, expected.place), (got.tail, expected.tail)):
        assert torch.equal(a.exists, b.exists)
        for x, y in ((a.page, b.page), (a.row, b.row)):
            assert torch.equal(x[a.exists], y[b.exists])
    # As many windows of each sequence as could become full; those that do are the same.
    a, b = got.windows, expected.windows
    if b is None:
        assert a is None
        return
    is_full = a.place.exists
    assert torch.equal(a.starts[is_full], b.starts[b.place.exists])
    old = ~b.is_new[b.place.exists]
    for x, y in (
        (a.place.page[is_full], b.place.page[b.place.exists]),
        (a.place.row[is_full], b.place.row[b.place.exists]),
        (a.is_new[is_full], b.is_new[b.place.exists]),
        (a.new[is_full][~old], b.new[b.place.exists][~old]),
        (a.tail.page[is_full][old], b.tail.page[b.place.exists][old]),
        (a.tail.row[is_full][old], b.tail.row[b.place.exists][old]),
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_windows_are_pooled(dtype: torch.dtype, kind: str):
    from flash_sparse_attention.impl import triton

    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype)

    tails, rows = (random(3, 6, 2, 12), random(3, 6, 2, 5)), (random(9, 2, 12), random(9, 2, 5))
    tail = Place(torch.randint(3, (4, 8)), torch.randint(6, (4, 8)), torch.ones(4, 8, dtype=torch.bool))
    chosen = torch.randint(9, (4, 8)), torch.rand(4, 8) < 0.5
    place = random_place(4, 4, 3)
    k_how, v_how = Compression(), Compression()
    if kind == "weighted":
        k_how = Compression(kind, random(2, 8), position_embedding=random(8, 12))
        v_how = Compression(kind, random(2, 8))
    angle = torch.randn(4, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected, got = ((torch.zeros(4, 3, 2, 12, dtype=dtype), torch.zeros(4, 3, 2, 5, dtype=dtype)) for _ in range(2))
    gathered = blockwise.gather_windows(tails, rows, tail, *chosen)
    layout = SequenceLayout.uniform(4, 8)
    sizes = {"kernel_size": 8, "kernel_stride": 4, "cu_seqlens": layout, "impl": "reference"}
    compressed = [compress(x, **how._asdict(), **sizes) for x, how in zip(gathered, (k_how, v_how), strict=True)]
    by = in_wider_rows(angle.cos()), in_wider_rows(angle.sin())
    blockwise.store_rows([(expected, tuple(compressed), place)], by)
    triton.pool_windows(got, tails, rows, tail, *chosen, place, (k_how, v_how), by)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(a == 0, b == 0)


@pytest.mark.parametrize("pieces", [(30, 1, 3, 7), (13, 1)], ids=str)
def test_decoding(pieces: tuple[int, ...]):
    torch.manual_seed(0)
    layer = NativeSparseAttention(HIDDEN, 4, 2, NSAConfig.preset("paper", **SIZES), head_dim=16, impl="triton")
    torch.nn.init.normal_(layer.branch_gate_proj.weight)
    x = torch.randn(2, sum(pieces), HIDDEN)
    cache = layer.new_cache(2, 64, page_size=32, num_pages=8)
    cache.set_pages(torch.tensor([[3, 0], [7, 1]], dtype=torch.int32))
    got = []
    for piece in x.split(pieces, 1):
        with cache.extend(SequenceLayout.uniform(*piece.shape[:2])):
            got.append(layer(piece, cache=cache.layers[0]))
    layer.impl = layer.compressor_k.impl = layer.compressor_v.impl = "reference"
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=2e-5, atol=2e-5)
