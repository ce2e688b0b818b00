"""The Triton kernels in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 pytest -m interpreter."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from flash_sparse_attention import Interval, SequenceLayout, geometry, interval_attention, selected_attention
from flash_sparse_attention.accuracy import Case, judge
from triton_cases import config, random_selection

if TYPE_CHECKING:
    from flash_sparse_attention.impl.triton.inverted_index import InvertedIndex, Segments

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]

CASES = [
    Case((40, 0, 1, 21), 4, 2, 16, 16, config(16, 3)),
    Case((1,), 2, 1, 16, 16, config(16, 1)),
    Case((33, 18), 5, 1, 24, 16, config(16, 5)),
    Case((50,), 7, 1, 16, 40, config(24, 2)),
    Case((70,), 1, 1, 16, 16, config(64, 1), dtype=torch.float16),
    Case((37,), 16, 1, 16, 16, config(16, 2), dtype=torch.float16),
    Case((90,), 2, 2, 16, 32, config(80, 2)),
    Case((45,), 4, 2, 16, 16, config(16, 12)),
    Case((35, 9), 4, 2, 16, 16, config(16, 4), flavour="hostile indices"),
    Case((35, 9), 4, 2, 16, 16, config(16, 4), flavour="fused projection"),
    # In float32 a loud token shows that scores are computed twice, in sums of another order.
    *(
        Case((35, 9), 4, 2, 16, 16, config(16, 4), dtype=torch.float16, flavour=flavour)
        for flavour in ("loud first token", "quiet first token", "large queries")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_budgets_in_both_loop_orders(case: Case):
    rows = list(judge(case, impls=["triton"], operators=["selected_attention"]))
    assert {row.impl for row in rows} == {"triton/kv_outer", "triton/query_outer"}
    assert {row.tensor for row in rows} == {"out", "lse", "grad q", "grad k", "grad v"}
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def draw(tokens: int = 60, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, wanting gradients."""
    q, k, v = (torch.randn(tokens, h, dim, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    return q, k, v


def outputs_and_gradients(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, **options: object) -> list[Tensor]:
    """out, lse and the gradients of q, k and v of a loss that takes both in."""
    options = {"block_size": 16, **options}
    out, lse = selected_attention(q, k, v, indices, **options)  # type: ignore[arg-type]
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    loss = (out * weight).sum() + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 2e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def build(indices: Tensor, layout: SequenceLayout, block_size: int, workspace: int):  # type: ignore[no-untyped-def]
    """The index, with a workspace of so many pairs."""
    from flash_sparse_attention.impl.triton.inverted_index import Chunks, build_index

    chunks = Chunks.fit(indices, layout.keys.total_tokens, layout.batch, block_size, 1, workspace)
    keys = None if layout.with_past is None else layout.with_past.cu_seqlens
    return build_index(indices, layout.cu_seqlens, block_size, chunks, keys)


def test_index_of_the_worked_example():
    from flash_sparse_attention.impl.triton import inverted_index

    indices = torch.tensor([[0, -1], [5, 0], [0, 1], [1, 0]], dtype=torch.int32).unsqueeze(1)
    layout = SequenceLayout.from_lengths([4])
    index = build(indices, layout, 2, 1 << 20)
    assert index.place[:, 0].tolist() == [[0, -1], [-1, 1], [2, 4], [5, 3]]
    assert index.pairs[:6].tolist() == [0, 1, 2, 3, 2, 3]
    assert inverted_index.mark_valid(indices, layout.cu_seqlens, 2)[:, 0].tolist() == [[0, -1], [-1, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("workspace", [1 << 20, 2000, 700])
@pytest.mark.parametrize(
    ("lengths", "past"),
    [((300,), (0,)), ((70, 0, 1, 290, 16), (0,) * 5), ((70, 0, 1, 200, 16), (20, 33, 90, 5, 0))],
    ids=str,
)
def test_index_against_counting_one_by_one(
    lengths: tuple[int, ...], past: tuple[int, ...], workspace: int, monkeypatch: pytest.MonkeyPatch
):
    from flash_sparse_attention.impl.triton import inverted_index

    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 1)
    if workspace == 700:
        # As of long sequences.
        monkeypatch.setattr(inverted_index, "SHORT", 0)
    if workspace == 2000:
        # Several tiles of blocks and of runs, as of long sequences.
        monkeypatch.setattr(inverted_index, "START_BLOCKS", 8)
        monkeypatch.setattr(inverted_index, "SCAN_RUNS", 4)
    tokens, heads, slots, block_size = sum(lengths), 2, 5, 16
    keys = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, past, strict=True)])
    layout = SequenceLayout.from_lengths(lengths).after(keys)
    indices = random_selection(tokens, heads, slots, geometry.num_blocks(keys.max_length, block_size))
    index = build(indices, layout, block_size, workspace)
    chunks = index.chunks
    assert (chunks.head_chunks * chunks.token_chunks == 1) == (workspace == 1 << 20)
    expected: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
    positions, sequences = layout.positions().tolist(), layout.sequence_ids().tolist()
    for token in range(tokens):
        for head in range(heads):
            seen = set()
            for slot, block in enumerate(indices[token, head].tolist()):
                valid = 0 <= block <= positions[token] // block_size and block not in seen
                seen.add(block)
                assert (index.place[token, head, slot] >= 0) == valid
                if valid:
                    key = token // chunks.tokens, head, sequences[token], block
                    expected.setdefault(key, []).append((token, slot))
    # Buckets in their order, tokens ascending, each slot knowing its place.
    flat = [(token, key[1], slot) for key in sorted(expected) for token, slot in expected[key]]
    assert [token for token, _, _ in flat] == index.pairs[: len(flat)].tolist()
    assert len(flat) < index.pairs.numel()
    assert (index.pairs[len(flat) :] == 0).all()
    assert [int(index.place[at]) for at in flat] == list(range(len(flat)))

    bounds = layout.cu_seqlens, block_size, None if layout.with_past is None else keys.cu_seqlens
    own = [position // block_size for position in positions]
    far = [at for at, (token, head, slot) in enumerate(flat) if 0 < int(indices[token, head, slot]) < own[token] - 1]
    assert 0 < len(far) < len(flat)
    assert_segments(index, [*index.segments(7)], [*range(len(flat))])
    cut = [*index.far_segments(7, *bounds)]
    assert_segments(index, cut, far)
    # Of long sequences: a range of heads at a time.
    monkeypatch.setattr(inverted_index, "MAX_FLAT", 0)
    cut = [*index.far_segments(7, *bounds)]
    assert len(cut) == chunks.head_chunks
    assert all(segments.classes == 1 < inverted_index.SEGMENT_CLASSES for segments in cut)
    assert_segments(index, cut, far)


def assert_segments(index: InvertedIndex, cut: list[Segments], pairs: list[int]) -> None:
    """They hold these pairs, at most 7 each, the large ones of a chunk first."""
    assert [chunk for segments in cut for chunk in segments.chunks] == [*index.chunks]
    covered: list[int] = []
    for segments in cut:
        covered += covered_by(index, segments)
    assert sorted(covered) == pairs


def covered_by(index: InvertedIndex, segments: Segments) -> list[int]:
    """Their pairs; looks at all else that they say."""
    buckets, classes = index.chunks.buckets, segments.classes
    ends = segments.ends[: classes * segments.flat]
    cut_ends = segments.ends[classes * segments.flat :].view(-1, buckets)
    table = segments.table[: int(ends[-1])].tolist()
    assert all(0 < count <= 7 for _, _, count, _, _ in table)
    numbers = range(segments.first_number, segments.first_number + len(cut_ends))
    assert [number for number, _, _, _ in segments.chunks] == [*numbers]
    begin = 0
    for chunk_ends, chunk_cut_ends in zip(ends.view(-1, classes, buckets), cut_ends, strict=True):
        rows = table[begin : int(chunk_ends[-1, -1])]
        assert len(rows) <= segments.most_of_chunk
        assert len({first for _, first, _, _, _ in rows}) <= 1
        for i in range(classes):
            counts = [count for _, _, count, _, _ in table[begin : int(chunk_ends[i, -1])]]
            assert all(count > 7 >> (i + 1) or i == classes - 1 for count in counts)
            assert all(count <= 7 >> i for count in counts)
            begin = int(chunk_ends[i, -1])
        # Segments of buckets that are cut are numbered, those of a bucket in a row; the others are alone in theirs.
        of_rows = [bucket for _, _, _, bucket, _ in rows]
        tiles = sorted((tile, bucket, first) for first, _, _, bucket, tile in rows if of_rows.count(bucket) > 1)
        assert [tile for tile, _, _ in tiles] == [*range(len(tiles))]
        assert [(bucket, first) for _, bucket, first in tiles] == sorted((bucket, first) for _, bucket, first in tiles)
        assert len(tiles) <= index.most_tiles(7)
        assert all(tile == -1 for _, _, _, bucket, tile in rows if of_rows.count(bucket) == 1)
        assert int(chunk_cut_ends[-1]) >= len(tiles)
    return [pair for first, _, count, _, _ in table for pair in range(first, first + count)]


@pytest.mark.parametrize("loop_order", ["kv_outer", "query_outer"])
def test_chunks_segments_and_a_rebuilt_index_change_nothing(loop_order: str, monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton import inverted_index
    from flash_sparse_attention.impl.triton.ops import selected as ops

    q, k, v = draw(48)
    indices = random_selection(48, 2, 3, 3)
    common = {"impl": "triton", "loop_order": loop_order}
    whole = outputs_and_gradients(q, k, v, indices, **common)
    again = outputs_and_gradients(q, k, v, indices, **common, save_index=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 16)
    fit, chunks = ops.Chunks.fit, []

    def small(*args):
        chunks.append(fit(*args[:-1], 20 * 3 * args[-2]))
        return chunks[-1]

    monkeypatch.setattr(ops.Chunks, "fit", small)
    cut = outputs_and_gradients(q, k, v, indices, **common)
    assert chunks
    assert all(one.heads == 1 and one.token_chunks > 1 for one in chunks)
    assert_same(cut, whole, 1e-6)


@pytest.mark.parametrize(("forward", "backward"), [("kv_outer", "query_outer"), ("query_outer", "kv_outer")])
def test_each_pass_in_an_order_of_its_own(forward: str, backward: str, monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton.ops import selected as ops
    from flash_sparse_attention.impl.triton.tuning import LoopOrders

    q, k, v = draw(48)
    indices = random_selection(48, 2, 3, 3)
    one, other = (outputs_and_gradients(q, k, v, indices, impl="triton", loop_order=x) for x in (forward, backward))
    asked = []

    def mixed(shape: object, loop_order: str) -> LoopOrders:
        asked.append(loop_order)
        return LoopOrders(forward, backward)

    monkeypatch.setattr(ops, "loop_orders_of", mixed)
    for save_index in (True, False):
        got = outputs_and_gradients(q, k, v, indices, impl="triton", save_index=save_index)
        # The forward pass is that of the one order, and the gradients those of the other one but for what it was given.
        assert all(map(torch.equal, got[:2], one[:2]))
        assert_same(got, other)
    assert asked == ["auto"] * 4
    case = Case((40, 1, 0, 23), 4, 2, 16, 16, config(16, 3), torch.float16)
    rows = list(judge(case, "cpu", impls=["triton"], operators=["nsa_attention"]))
    assert len(asked) > 4
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def test_chunks_lose_nothing_to_rounding(monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton import inverted_index, selected_kv_outer
    from flash_sparse_attention.impl.triton.ops import selected as ops

    # As for long sequences: sums are in the gradients and in what rounding leaves.
    monkeypatch.setattr(selected_kv_outer, "FLOAT32_SUMS", 0)
    tokens = 240
    q, k, v = (x.half().detach().requires_grad_() for x in draw(tokens))
    # Every chunk of tokens adds to the first block.
    indices = torch.zeros(tokens, 2, 1, dtype=torch.int32)
    whole = outputs_and_gradients(q, k, v, indices, impl="triton")
    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 16)
    fit = ops.Chunks.fit
    monkeypatch.setattr(ops.Chunks, "fit", lambda *args: fit(*args[:-1], 16 * args[-2]))
    cut = outputs_and_gradients(q, k, v, indices, impl="triton")
    for got, expected in zip(cut[3:], whole[3:], strict=True):
        # One unit in the last place: sums in float16 would be off by several.
        torch.testing.assert_close(got, expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("tokens", [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20])
def test_what_the_passes_keep_fits_the_workspace(tokens: int):
    """Of selected attention, 32/8 heads of 128: 1 GB, of which 2 % are left to what is not counted here."""
    from flash_sparse_attention.impl.triton.delta import shift_bytes
    from flash_sparse_attention.impl.triton.inverted_index import MAX_FLAT, SEGMENT_CLASSES, SEGMENT_FIELDS
    from flash_sparse_attention.impl.triton.ops.selected import chunks_of
    from flash_sparse_attention.impl.triton.selected_kv_outer import FLOAT32_SUMS
    from flash_sparse_attention.impl.triton.tuning import SelectedShape, tiles_of

    block_indices = torch.empty(tokens, 8, 16, dtype=torch.int32, device="meta")
    shape = SelectedShape(tokens, 8, 4, 16, 64, 128, 128, torch.bfloat16)
    chunks = chunks_of(shape, block_indices, tokens, torch.empty(2, dtype=torch.int32, device="meta"), 1024)
    flat = chunks.token_chunks * chunks.buckets
    classes = SEGMENT_CLASSES if flat <= MAX_FLAT else 1
    # Of two cuts, as one is made when the one before is still there.
    segments = 2 * 4 * max(MAX_FLAT, flat) * (SEGMENT_FIELDS + classes + 1)
    far = block_indices.numel() * 4 + tokens * 8 * 4
    assert chunks.pairs * shape.group * (128 * 2 + 4) + segments + far <= 0.98e9
    tiles = 2 * (chunks.pairs // tiles_of(shape).kv_outer_backward.segment_pairs) * 64 * (128 + 128) * 4
    sums = tokens * chunks.heads * (128 + 128)
    sum_bytes = 0 if chunks.token_chunks == 1 else sums * (4 if sums <= FLOAT32_SUMS else 1)
    backward = chunks.pairs * shape.group * 128 * 2 + segments + tiles + sum_bytes + shift_bytes(tokens * 32)
    assert backward <= 0.98e9


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_softmax_scale(scale: float):
    q, k, v = draw()
    indices = random_selection(60, 2, 3, 4)
    got = outputs_and_gradients(q, k, v, indices, impl="triton", softmax_scale=scale)
    assert_same(got, outputs_and_gradients(q, k, v, indices, impl="reference", softmax_scale=scale))


@pytest.mark.parametrize("part", [0, 1])
def test_gradients_of_the_output_or_of_lse_alone(part: int):
    q, k, v = draw()
    indices, layout, interval = random_selection(60, 2, 3, 4), SequenceLayout.from_lengths([60]), Interval(8, 4)
    keys = [x[: interval.num_keys(60)] for x in (k, v)]
    for attend in (
        lambda impl: selected_attention(q, k, v, indices, block_size=16, cu_seqlens=layout, impl=impl),
        lambda impl: interval_attention(q, *keys, interval, cu_seqlens=layout, impl=impl),
    ):
        got, expected, again = (
            torch.autograd.grad(x[part][8:].sin().sum(), (q, k, v), allow_unused=True, materialize_grads=True)
            for x in (attend("triton"), attend("reference"), checkpoint(attend, "triton", use_reentrant=False))
        )
        for a, b, c in zip(got, expected, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert torch.equal(a, c)


@pytest.mark.parametrize("loop_order", ["kv_outer", "query_outer"])
def test_large_logits_do_not_overflow(loop_order: str):
    q, k, v = draw()
    indices = random_selection(60, 2, 3, 4)
    with torch.no_grad():
        q *= 3e3
        k *= 10
    got = outputs_and_gradients(q, k, v, indices, impl="triton", loop_order=loop_order)
    assert all(torch.isfinite(x).all() for x in (got[0], *got[2:]))
    torch.testing.assert_close(
        got[0], outputs_and_gradients(q, k, v, indices, impl="reference")[0], rtol=1e-3, atol=1e-3
    )


def test_no_tokens_and_no_valid_entry():
    q, k, v = draw(0)
    empty = outputs_and_gradients(q, k, v, random_selection(0, 2, 3, 4), impl="triton")
    assert [x.shape[0] for x in empty] == [0] * 5
    q, k, v = draw(20)
    out, lse, *grads = outputs_and_gradients(q, k, v, torch.full((20, 2, 3), -1, dtype=torch.int32), impl="triton")
    assert (lse == -math.inf).all()
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))


def test_operator_contract():
    from flash_sparse_attention.impl.triton.ops.selected import _selected_attention

    # Few tokens, as each check runs the operator many times.
    q, k, v = draw(20)
    indices, bounds = random_selection(20, 2, 3, 2), torch.tensor([0, 17, 20], dtype=torch.int32)
    for loop_order, save_index in (("kv_outer", True), ("query_outer", False)):
        opcheck(_selected_attention, (q, k, v, indices, bounds, None, 16, 0.25, loop_order, 64, save_index))


def test_compiled_checkpointed_and_under_autocast():
    q, k, v = draw(40)
    indices = random_selection(40, 2, 3, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selected_attention(q, k, v, indices, block_size=16, impl="triton").out

    plain = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        assert_same(list(torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))), list(plain), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, attend(q, k, v))


def test_head_dimensions_beyond_256_are_refused():
    x = torch.randn(4, 1, 288)
    indices = torch.zeros(4, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="it takes head dimensions up to 256, not 288"):
        selected_attention(x, x, x, indices, impl="triton")
    assert selected_attention(x, x, x, indices).out.shape == (4, 1, 288)
