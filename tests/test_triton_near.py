"""Near blocks computed by a kernel of their own, in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpreter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import SequenceLayout, geometry, selected_attention
from flash_sparse_attention.impl import reference
from triton_cases import random_selection

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `past`: keys before the first query of each sequence."""

    lengths: tuple[int, ...]
    group: int
    block_size: int = 16
    slots: int = 5
    kv_heads: int = 1
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    past: tuple[int, ...] = ()

    def __str__(self) -> str:
        dtype, dims = str(self.dtype).removeprefix("torch."), "x".join(map(str, self.dims))
        past = f"-past{self.past}" if self.past else ""
        return f"{self.lengths}-G{self.group}-block{self.block_size}-slots{self.slots}-{dims}-{dtype}{past}"

    @property
    def layout(self) -> SequenceLayout:
        """The queries', after the keys before them."""
        layout = SequenceLayout.from_lengths(self.lengths)
        if not self.past:
            return layout
        return layout.after(SequenceLayout.from_lengths([a + b for a, b in zip(self.lengths, self.past, strict=True)]))

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and a selection of any content."""
        layout, heads = self.layout, self.kv_heads
        tokens, keys = layout.total_tokens, layout.keys.total_tokens
        sizes = (tokens, heads * self.group, self.dims[0]), (keys, heads, self.dims[0]), (keys, heads, self.dims[1])
        q, k, v = (torch.randn(size, dtype=self.dtype) for size in sizes)
        blocks = geometry.num_blocks(layout.keys.max_length, self.block_size)
        return q, k, v, random_selection(tokens, heads, self.slots, blocks)


CASES = [
    Case((40, 0, 1, 21), 1, kv_heads=2),
    Case((33, 18), 3, dims=(24, 40), past=(7, 30)),
    Case((150, 1, 40), 4, 64, 3, dtype=torch.float16, past=(0, 70, 23)),
    Case((45,), 8, slots=20, dtype=torch.float16),
    Case((90,), 2, 40, 2, kv_heads=2),
    Case((200,), 1, 64, 2, dtype=torch.float16),
]


def attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, workspace: int = 1 << 20
) -> tuple[Tensor, Tensor]:
    """out and lse by the kernels, with a workspace of so many pairs."""
    from flash_sparse_attention.impl.triton.inverted_index import Chunks, build_index
    from flash_sparse_attention.impl.triton.selected_kv_outer import launch_selected_fwd_kv_outer
    from flash_sparse_attention.impl.triton.tuning import SelectedShape, built_in_tiles

    layout = case.layout
    keys = None if layout.with_past is None else layout.with_past.cu_seqlens
    chunks = Chunks.fit(indices, len(k), layout.batch, case.block_size, 1, workspace)
    index = build_index(indices, layout.cu_seqlens, case.block_size, chunks, keys, split=True)
    tiles = built_in_tiles(SelectedShape.of(q, k, v, indices, case.block_size)).kv_outer_forward
    # So few pairs that a bucket has several segments.
    tiles = replace(tiles, dense_near=True, segment_pairs=24)
    sizes = layout.cu_seqlens, case.block_size, case.dims[0] ** -0.5
    out, lse = launch_selected_fwd_kv_outer(q, k, v, indices, index, *sizes, tiles, keys)
    # An index that was kept does not tell far entries from near ones.
    kept = replace(index, far=None, selected=None)
    again = launch_selected_fwd_kv_outer(q, k, v, indices, kept, *sizes, tiles, keys)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    return out, lse


def assert_right(case: Case, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, workspace: int = 1 << 20) -> None:
    out, lse = attend(case, q, k, v, indices, workspace)
    wide = q.double(), k.double(), v.double()
    expected = reference.selected_attention(*wide, indices, case.block_size, case.layout, case.dims[0] ** -0.5)
    tolerance = 2e-3 if case.dtype == torch.float16 else 2e-6
    torch.testing.assert_close(out.double(), expected.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected.lse.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_selection(case: Case):
    assert_right(case, *case.draw())


def newest(case: Case) -> Tensor:
    """The block of each query itself, [N, 1, 1]."""
    return (case.layout.positions() // case.block_size).to(torch.int32)[:, None, None]


SELECTIONS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "nothing": lambda own: [torch.full_like(own, -1)],
    "far": lambda own: [own - 2, own - 4, own - 3],
    "first and newest": lambda own: [own, torch.zeros_like(own), own - 1],
    "newest": lambda own: [own],
    "before": lambda own: [own - 1, own + 1],
    "first": lambda own: [own * 0, own - 3],
    "newest of every second token": lambda own: [torch.where(torch.arange(len(own))[:, None, None] % 2 == 0, own, -1)],
}


@pytest.mark.parametrize("blocks", SELECTIONS.values(), ids=SELECTIONS)
def test_selections_without_some_near_blocks(blocks: Callable[[Tensor], list[Tensor]]):
    case = Case((90, 20), 2, dtype=torch.float16)
    q, k, v, _ = case.draw()
    # Far blocks of the first tokens are none: their numbers are negative, or 0, which is near.
    assert_right(case, q, k, v, torch.cat(blocks(newest(case)), 2).contiguous())


@pytest.mark.parametrize("workspace", [40, 170])
def test_chunks_that_cut_heads_sequences_and_tiles(workspace: int, monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton import inverted_index

    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 1)
    if workspace == 40:
        # So that a row that a chunk before its own writes stays wrong.
        forwards = inverted_index.Chunks.__iter__
        monkeypatch.setattr(inverted_index.Chunks, "__iter__", lambda chunks: reversed(list(forwards(chunks))))
    case = Case((21, 60), 4, kv_heads=2, slots=4, dtype=torch.float16, past=(5, 50))
    assert_right(case, *case.draw(), workspace)


@pytest.mark.parametrize("span", [1, 3, 8])
def test_programs_have_each_block_with_queries_of_a_chunk_once(span: int, monkeypatch: pytest.MonkeyPatch):
    import triton
    from triton import language as tl

    from flash_sparse_attention.impl.triton import selected_near

    # Where the interpreter looks for what a kernel names.
    monkeypatch.setitem(globals(), "tl", tl)
    monkeypatch.setitem(globals(), "selected_near", selected_near)

    @triton.jit
    def show(to_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, first_token, tokens, span, num_sequences, SIZE: tl.constexpr):
        program = tl.program_id(0)
        shown = selected_near.blocks_of_chunk(
            program, first_token, tokens, span, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, SIZE
        )
        for i in tl.static_range(6):
            tl.store(to_ptr + program * 6 + i, shown[i])

    size, lengths, past = 4, [5, 0, 30, 1, 4, 12, 0], [0, 9, 3, 8, 4, 1, 2]
    layout = SequenceLayout.from_lengths(lengths)
    for pasts in (None, past):
        ahead = [0] * len(lengths) if pasts is None else pasts
        keys = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, ahead, strict=True)]).cu_seqlens
        bounds, starts = (None if pasts is None else keys), layout.cu_seqlens.tolist()
        for first, tokens in ((0, 52), (0, 7), (7, 20), (5, 1), (27, 25), (28, 20), (36, 16)):
            expected = []
            for s, (start, length, before) in enumerate(zip(starts, lengths, ahead, strict=False)):
                begin, end = (min(max(x, first), first + tokens) - start + before for x in (start, start + length))
                blocks = range(begin // size, -(-end // size)) if begin < end else ()
                expected += [(int(keys[s]), start - before + begin, begin, end, block) for block in blocks]
            programs = selected_near._programs(tokens, span * size, layout.cu_seqlens, bounds)
            to = torch.full((programs, 6), -1, dtype=torch.int32)
            show[(programs,)](to, layout.cu_seqlens, bounds, first, tokens, span, len(lengths), size)
            assert ((to[:, 5] - to[:, 4]) <= span).all()
            got = [(*given, block) for *given, begin, end in to.tolist() for block in range(begin, end)]
            assert sorted(got) == sorted(expected)


def test_a_negative_softmax_scale_and_the_gradients(monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton import tuning
    from flash_sparse_attention.impl.triton.ops import selected as ops

    def near(shape: tuning.SelectedShape) -> tuning.SelectedTiles:
        tiles = tuning.tiles_of(shape)
        return replace(tiles, kv_outer_forward=replace(tiles.kv_outer_forward, dense_near=True))

    monkeypatch.setattr(ops, "tiles_of", near)
    case = Case((40, 13), 2)
    *given, indices = case.draw()
    given = [x.requires_grad_() for x in given]
    results = []
    for impl, loop_order in (("triton", "kv_outer"), ("reference", "auto")):
        out, lse = selected_attention(
            *given, indices, block_size=16, cu_seqlens=case.layout.cu_seqlens, softmax_scale=-0.3, impl=impl,
            loop_order=loop_order,
        )  # fmt: skip
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss = loss + lse.masked_fill(lse == -math.inf, 0.0).sin().sum()
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(loss, given)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
