"""`SequenceLayout` and the tuples that operators return."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention import AttentionOutput, Compression, NSAOutput, SequenceLayout


def test_layout_by_hand():
    layout = SequenceLayout.from_lengths([3, 0, 5, 1])
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8, 9]
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.batch, layout.total_tokens, layout.max_length) == (4, 9, 5)
    assert layout.sequence_ids().tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 3]
    assert layout.positions().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert layout.positions().dtype == layout.sequence_ids().dtype == torch.int64
    assert layout.device == torch.device("cpu")


def test_layouts_derived_from_a_layout():
    layout = SequenceLayout.from_lengths([3, 0, 9, 4])
    assert layout.compressed(4, 2).lengths == (0, 0, 3, 1)
    assert layout.compressed(4, 2).cu_seqlens.tolist() == [0, 0, 0, 3, 4]
    assert layout.blocks(4).lengths == (1, 0, 3, 1)
    assert layout.chunks(2).lengths == (1, 0, 4, 2)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [7, 3]])
def test_layout_from_bounds_is_the_layout_from_lengths(lengths: list[int]):
    layout = SequenceLayout.from_lengths(lengths)
    again = SequenceLayout.from_cu_seqlens(layout.cu_seqlens, sum(lengths))
    assert again.lengths == layout.lengths == tuple(lengths)
    assert again.total_tokens == sum(lengths)
    assert again.max_length == max(lengths, default=0)
    assert again.positions().shape == again.sequence_ids().shape == (sum(lengths),)


def test_uniform_layout_is_a_flattened_batch():
    layout = SequenceLayout.uniform(3, 4)
    assert layout.lengths == (4, 4, 4)
    assert layout.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert layout.cu_seqlens.dtype == torch.int32
    assert SequenceLayout.uniform(2, 0).cu_seqlens.tolist() == [0, 0, 0]


def test_layout_refuses_negative_lengths():
    with pytest.raises(ValueError, match=r"lengths must not be negative, got \[3, -1\]"):
        SequenceLayout.from_lengths([3, -1])
    with pytest.raises(ValueError, match=r"lengths must be whole numbers of tokens, got \[1.5, 2\]"):
        SequenceLayout.from_lengths([1.5, 2])
    assert SequenceLayout.from_lengths(torch.tensor([3, 4])).lengths == (3, 4)


def test_layout_compares_by_identity():
    # Comparing tensors would make the truth of `==` ambiguous, and hashing impossible.
    layout = SequenceLayout.from_lengths([2])
    assert layout == layout
    assert layout != SequenceLayout.from_lengths([2])
    assert {layout: 1}[layout] == 1
    assert repr(layout) == "SequenceLayout(lengths=(2,))"


def test_tuples_unpack_in_the_documented_order():
    out, lse = AttentionOutput(out=torch.zeros(1), lse=torch.ones(1))
    assert (out.item(), lse.item()) == (0, 1)
    out, block_indices = NSAOutput(out=torch.zeros(1), block_indices=torch.ones(1))
    assert (out.item(), block_indices.item()) == (0, 1)
    kind, *weights = Compression()
    assert kind == "mean"
    assert weights == [None] * 5
