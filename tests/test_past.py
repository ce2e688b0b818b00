"""Fewer queries than keys: the last queries of a sequence give what they give among all queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_sparse_attention as fsa
from flash_sparse_attention import Interval, NSAConfig, SequenceLayout

CONFIG = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, num_selected_blocks=4, num_init_blocks=1, num_local_blocks=1,
    window_size=21,
)  # fmt: skip
# Keys and queries of each sequence: none of either, one query, a past that ends inside a window, a block, at a bound.
KEYS, QUERIES = (0, 1, 90, 64, 7, 131, 40), (0, 1, 1, 16, 0, 101, 40)
KERNELS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}


class Problem:
    """Random inputs over all tokens, and which of them are asked."""

    def __init__(self, heads: int = 6, kv_heads: int = 2) -> None:
        torch.manual_seed(0)
        self.keys, self.queries = SequenceLayout.from_lengths(KEYS), SequenceLayout.from_lengths(QUERIES)
        tokens = self.keys.total_tokens
        ends = self.keys.cu_seqlens[1:]
        asked = [torch.arange(int(end) - count, int(end)) for end, count in zip(ends, QUERIES, strict=True)]
        self.asked = torch.cat(asked)
        self.q, self.k, self.v, self.gates = (
            torch.randn(tokens, h, d, dtype=torch.float64, requires_grad=True)
            for h, d in ((heads, 16), (kv_heads, 16), (kv_heads, 8), (heads, 3))
        )

    def all(self) -> dict[str, Any]:
        """How all queries are asked."""
        return {"cu_seqlens": self.keys, "impl": "reference"}

    def last(self, impl: str) -> dict[str, Any]:
        """How the last ones are asked."""
        return {"cu_seqlens": self.queries, "cu_seqlens_k": self.keys, "impl": impl}

    def agree(self, got: Tensor, whole: Tensor, impl: str) -> None:
        """Output and gradients are those of the whole, with a gradient at the rows that were asked."""
        expected = whole[self.asked]
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        inputs = [self.q, self.k, self.v, self.gates]
        upstream = torch.randn_like(expected)
        seen = ~expected.isinf()
        found = torch.autograd.grad(got[seen], inputs, upstream[seen], allow_unused=True, retain_graph=True)
        wanted = torch.autograd.grad(expected[seen], inputs, upstream[seen], allow_unused=True, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            if a is not None or b is not None:
                zeros = torch.zeros_like(b if a is None else a)
                pair = (zeros if x is None else x for x in (a, b))
                torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("interval", [Interval(), Interval(window_size=21), Interval(8, 4)], ids=str)
def test_interval_attention(problem: Problem, interval: Interval, impl: str):
    k, v = problem.k, problem.v
    if interval.kernel_size > 1:
        k, v = (fsa.compress(x, **KERNELS, cu_seqlens=problem.keys) for x in (k, v))
    whole = fsa.interval_attention(problem.q, k, v, interval, **problem.all())
    last = fsa.interval_attention(problem.q[problem.asked], k, v, interval, **problem.last(impl))
    problem.agree(last.out, whole.out, impl)
    problem.agree(last.lse, whole.lse, impl)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_selection(problem: Problem, impl: str):
    k = fsa.compress(problem.k, **KERNELS, cu_seqlens=problem.keys)
    lse = fsa.compressed_attention(problem.q, k, k, **KERNELS, cu_seqlens=problem.keys).lse
    sizes = {**KERNELS, "block_size": 16, "num_selected_blocks": 4, "num_local_blocks": 1}
    whole = fsa.select_blocks(problem.q, k, lse, **sizes, **problem.all())
    asked = problem.asked
    assert torch.equal(fsa.select_blocks(problem.q[asked], k, lse[asked], **sizes, **problem.last(impl)), whole[asked])
    attention = {"block_size": 16}
    full = fsa.selected_attention(problem.q, problem.k, problem.v, whole, **attention, **problem.all())
    last = fsa.selected_attention(
        problem.q[asked], problem.k, problem.v, whole[asked], **attention, **problem.last(impl)
    )
    problem.agree(last.out, full.out, impl)
    problem.agree(last.lse, full.lse, impl)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_whole_attention(problem: Problem, impl: str):
    whole = fsa.nsa_attention(problem.q, problem.k, problem.v, problem.gates, CONFIG, **problem.all())
    asked = problem.asked
    last = fsa.nsa_attention(problem.q[asked], problem.k, problem.v, problem.gates[asked], CONFIG, **problem.last(impl))
    assert torch.equal(last.block_indices, whole.block_indices[asked])
    problem.agree(last.out, whole.out, impl)


def test_bounds_as_tensors(problem: Problem):
    asked = problem.asked
    bounds = {"cu_seqlens": problem.queries.cu_seqlens, "cu_seqlens_k": problem.keys.cu_seqlens}
    tensors = problem.q[asked], problem.k, problem.v, problem.gates[asked]
    expected = fsa.nsa_attention(*tensors, CONFIG, **problem.last("reference")).out
    torch.testing.assert_close(fsa.nsa_attention(*tensors, CONFIG, **bounds).out, expected, rtol=1e-11, atol=1e-11)


def test_bounds_that_do_not_fit(problem: Problem):
    q, k, v = problem.q[problem.asked], problem.k, problem.v

    def attend(**bounds: Any) -> None:
        fsa.interval_attention(q, k, v, Interval(), **bounds)

    with pytest.raises(ValueError, match="cu_seqlens_k must be of B=7 sequences, as cu_seqlens, got 1"):
        attend(cu_seqlens=problem.queries, cu_seqlens_k=SequenceLayout.from_lengths([len(k)]))
    with pytest.raises(ValueError, match="at least as long as cu_seqlens in every sequence, got 0 tokens for 159"):
        attend(cu_seqlens_k=SequenceLayout.from_lengths([0]))
    with pytest.raises(ValueError, match=r"k must be .*\[N=159, Hk, Dk=16\]"):
        attend(cu_seqlens=problem.queries)
    with pytest.raises(ValueError, match="cu_seqlens_k must be left out for a batched q"):
        fsa.interval_attention(q[None], k[None], v[None], Interval(), cu_seqlens_k=problem.keys)
    with pytest.raises(ValueError, match="cu_seqlens must be the layout of all tokens of x"):
        fsa.compress(q, cu_seqlens=problem.queries.after(problem.keys))


@pytest.mark.parametrize("operator", ["interval", "selected"])
def test_opcheck(problem: Problem, operator: str):
    from flash_sparse_attention.impl.blockwise import interval, selected

    bounds = problem.queries.cu_seqlens, problem.keys.cu_seqlens
    q, k, v = problem.q[problem.asked].detach().requires_grad_(), problem.k, problem.v
    if operator == "interval":
        torch.library.opcheck(interval._interval_attention, (q, k, v, *bounds, 1, 1, 21, 0.25))
    else:
        indices = torch.zeros(len(q), k.shape[1], 2, dtype=torch.int32)
        torch.library.opcheck(selected._selected_attention, (q, k, v, indices, *bounds, 16, 0.25))
