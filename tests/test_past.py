"""Fewer queries than keys: the last queries of a sequence give what they give among all queries."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import flash_sparse_attention as fsa
from flash_sparse_attention import AttentionOutput, Interval, NSAConfig, SequenceLayout
from flash_sparse_attention.accuracy import Case, judge

CONFIG = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=16, num_selected_blocks=4, num_init_blocks=1, num_local_blocks=1,
    window_size=21,
)  # fmt: skip
# Keys and queries of each sequence: none of either, one query, a past that ends inside a window, a block, at a bound.
KEYS, QUERIES = (0, 1, 90, 64, 7, 131, 40), (0, 1, 1, 16, 0, 101, 40)
# As few as that has all of it, for Triton's interpreter.
FEW_KEYS, FEW_QUERIES = (0, 1, 30, 32, 7, 45, 5), (0, 1, 1, 3, 0, 18, 5)
KERNELS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
IN_THE_INTERPRETER = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IMPLS = ["reference", "blockwise", pytest.param("triton", marks=IN_THE_INTERPRETER)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes the interpreter milliseconds."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        for module, constant, value in (("interval", "DKV_PROGRAMS", 12), ("block_scores", "SCORE_PROGRAMS", 16)):
            module = importlib.import_module(f"flash_sparse_attention.impl.triton.{module}")
            monkeypatch.setattr(module, constant, value)


class Problem:
    """Random inputs over all tokens, and which of them are asked."""

    def __init__(
        self, keys: Sequence[int] = KEYS, queries: Sequence[int] = QUERIES, heads: int = 6, kv_heads: int = 2
    ) -> None:
        torch.manual_seed(0)
        self.keys, self.queries = SequenceLayout.from_lengths(keys), SequenceLayout.from_lengths(queries)
        tokens = self.keys.total_tokens
        ends = self.keys.cu_seqlens[1:]
        asked = [torch.arange(int(end) - count, int(end)) for end, count in zip(ends, queries, strict=True)]
        self.asked = torch.cat(asked)
        self.q, self.k, self.v, self.gates = (
            torch.randn(tokens, h, d, dtype=torch.float64, requires_grad=True)
            for h, d in ((heads, 16), (kv_heads, 16), (kv_heads, 8), (heads, 3))
        )

    @classmethod
    def of(cls, impl: str) -> Problem:
        """As large as an implementation bears."""
        return cls(FEW_KEYS, FEW_QUERIES) if impl == "triton" else cls()

    def all(self) -> dict[str, Any]:
        """How all queries are asked."""
        return {"cu_seqlens": self.keys, "impl": "reference"}

    def inputs(self, impl: str) -> tuple[Tensor, ...]:
        """q and gates that are asked, k and v, in the widest dtype that the implementation takes."""
        dtype = torch.float32 if impl == "triton" else torch.float64
        return tuple(x.to(dtype) for x in (self.q[self.asked], self.k, self.v, self.gates[self.asked]))

    def last(self, impl: str) -> dict[str, Any]:
        """How the last ones are asked."""
        return {"cu_seqlens": self.queries, "cu_seqlens_k": self.keys, "impl": impl}

    def agree(self, got: Tensor, whole: Tensor) -> None:
        """Output and gradients are those of the whole, with a gradient at the rows that were asked."""
        expected, tolerance = whole[self.asked], 1e-10 if got.dtype == torch.float64 else 1e-4
        got = got.double()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        inputs = [self.q, self.k, self.v, self.gates]
        upstream = torch.randn_like(expected)
        seen = ~expected.isinf()
        found = torch.autograd.grad(got[seen], inputs, upstream[seen], allow_unused=True, retain_graph=True)
        wanted = torch.autograd.grad(expected[seen], inputs, upstream[seen], allow_unused=True, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            if a is not None or b is not None:
                zeros = torch.zeros_like(b if a is None else a)
                pair = (zeros if x is None else x for x in (a, b))
                torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def joined(output: AttentionOutput) -> Tensor:
    """lse behind the output, so that a backward pass takes both."""
    return torch.cat([output.out, output.lse[..., None]], -1)


@pytest.fixture
def problem() -> Problem:
    return Problem()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("interval", [Interval(), Interval(window_size=21), Interval(8, 4)], ids=str)
def test_interval_attention(interval: Interval, impl: str):
    problem = Problem.of(impl)
    k, v = problem.k, problem.v
    if interval.kernel_size > 1:
        k, v = (fsa.compress(x, **KERNELS, cu_seqlens=problem.keys, impl="reference") for x in (k, v))
    whole = fsa.interval_attention(problem.q, k, v, interval, **problem.all())
    q, *_ = problem.inputs(impl)
    last = fsa.interval_attention(q, k.to(q.dtype), v.to(q.dtype), interval, **problem.last(impl))
    problem.agree(joined(last), joined(whole))


@pytest.mark.parametrize("impl", IMPLS)
def test_selection(impl: str):
    check_selection(Problem.of(impl), impl)


def check_selection(problem: Problem, impl: str) -> None:
    compressed = fsa.compress(problem.k, **KERNELS, cu_seqlens=problem.keys, impl="reference")
    lse = fsa.compressed_attention(problem.q, compressed, compressed, **KERNELS, **problem.all()).lse
    sizes = {**KERNELS, "block_size": 16, "num_selected_blocks": 4, "num_local_blocks": 1}
    whole = fsa.select_blocks(problem.q, compressed, lse, **sizes, **problem.all())
    asked, (q, k, v, _) = problem.asked, problem.inputs(impl)
    last = fsa.select_blocks(q, compressed.to(q.dtype), lse[asked], **sizes, **problem.last(impl))
    assert torch.equal(last, whole[asked])
    full = fsa.selected_attention(problem.q, problem.k, problem.v, whole, block_size=16, **problem.all())
    for loop_order in ("kv_outer", "query_outer") if impl == "triton" else ("auto",):
        options = {"block_size": 16, "loop_order": loop_order, **problem.last(impl)}
        last = fsa.selected_attention(q, k, v, whole[asked], **options)
        problem.agree(joined(last), joined(full))


@pytest.mark.parametrize("impl", IMPLS)
def test_whole_attention(impl: str):
    problem = Problem.of(impl)
    whole = fsa.nsa_attention(problem.q, problem.k, problem.v, problem.gates, CONFIG, **problem.all())
    last = fsa.nsa_attention(*problem.inputs(impl), CONFIG, **problem.last(impl))
    assert torch.equal(last.block_indices, whole.block_indices[problem.asked])
    problem.agree(last.out, whole.out)


INTERPRETER_CASES = [
    Case((1, 17, 0, 3), 2, 1, 16, 16, CONFIG, torch.float16, past=(40, 18, 9, 0)),
    Case((18, 2), 5, 1, 24, 16, CONFIG, torch.float32, "fused projection", past=(7, 70)),
    Case((20, 3), 4, 2, 16, 16, CONFIG, torch.float32, "independent branches", past=(31, 60)),
    Case((20, 3), 4, 2, 16, 16, CONFIG, torch.float32, "hostile indices", past=(31, 60)),
]
GPU_CASES = [
    Case((1, 600, 0, 33, 129), heads, kv_heads, *dims, NSAConfig(), dtype, past=(2000, 1447, 65, 0, 300), seed=21)
    for heads, kv_heads, dims, dtype in (
        (8, 2, (128, 128), torch.bfloat16),
        (5, 1, (192, 128), torch.bfloat16),
        (4, 2, (80, 80), torch.float16),
    )
]


@pytest.mark.parametrize(
    ("device", "case"),
    [
        *(pytest.param("cpu", case, marks=IN_THE_INTERPRETER, id=str(case)) for case in INTERPRETER_CASES),
        *(pytest.param("cuda", case, marks=ON_A_GPU, id=str(case)) for case in GPU_CASES),
    ],
)
def test_kernels_within_the_budgets(device: str, case: Case):
    operators = set(case.operators) - {"compress", "combine"}
    rows = list(judge(case, device, impls=["triton"], operators=sorted(operators)))
    assert {row.operator for row in rows} == operators
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_computed_again(impl: str):
    problem = Problem((21, 7, 5), (9, 0, 5), heads=2, kv_heads=1)

    def run(recompute: tuple[str, ...]) -> list[Tensor]:
        x = problem.inputs(impl)
        out = fsa.nsa_attention(*x, CONFIG, recompute=recompute, **problem.last(impl)).out
        return [out, *torch.autograd.grad(out.square().sum(), x)]

    kept, again = run(()), run(("compressed", "selected", "window", "index"))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_chunks(impl: str, monkeypatch: pytest.MonkeyPatch):
    """The queries cut into chunks, whose keys' gradients are added up."""
    names = "block_scores", "inverted_index", "ops.selected"
    scores, index, ops = (importlib.import_module(f"flash_sparse_attention.impl.triton.{name}") for name in names)
    monkeypatch.setattr(scores, "SCORE_BYTES", 1)
    monkeypatch.setattr(index, "MIN_CHUNK_TOKENS", 16)
    fit = ops.Chunks.fit
    monkeypatch.setattr(ops.Chunks, "fit", lambda *args: fit(*args[:-1], 16 * 4 * args[-2]))
    test_whole_attention(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_query_at_all(impl: str):
    problem = Problem((60, 7), (0, 0), heads=4)
    x = problem.inputs(impl)
    out, indices = fsa.nsa_attention(*x, CONFIG, **problem.last(impl))
    assert out.shape == (0, 4, 8)
    assert indices.shape == (0, 2, 4)
    attended = [fsa.interval_attention(*x[:3], Interval(), **problem.last(impl)).out]
    attended.append(fsa.selected_attention(*x[:3], indices, block_size=16, **problem.last(impl)).out)
    for result in (out, *attended):
        grads = torch.autograd.grad(result.sum(), x[1:3])
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("impl", IMPLS[:2])
def test_the_longest_sequence_has_no_query(impl: str):
    check_selection(Problem((20, 130, 20, 3), (1, 0, 1, 3)), impl)


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


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("operator", ["interval", "selected"])
def test_opcheck(operator: str, impl: str):
    module = importlib.import_module(f"flash_sparse_attention.impl.{impl}.{'ops.' * (impl == 'triton')}{operator}")
    problem = Problem((12, 7, 20), (3, 0, 5), heads=2, kv_heads=1)
    q, k, v, _ = (x.detach().requires_grad_() for x in problem.inputs(impl))
    bounds = problem.queries.cu_seqlens, problem.keys.cu_seqlens
    if operator == "interval":
        opcheck(module._interval_attention, (q, k, v, *bounds, 1, 1, 21, 0.25))
        return
    indices = torch.zeros(len(q), k.shape[1], 2, dtype=torch.int32)
    for schedule in (("kv_outer", 64, True), ("query_outer", 64, False)) if impl == "triton" else ((),):
        opcheck(module._selected_attention, (q, k, v, indices, *bounds, 16, 0.25, *schedule))


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_opcheck_of_the_whole(impl: str):
    ops = "flash_sparse_attention.impl.triton.ops"
    attention, selection = (importlib.import_module(f"{ops}.{name}") for name in ("attention", "block_selection"))
    problem = Problem((12, 7, 20), (3, 0, 5), heads=2, kv_heads=1)
    q, k, v, gates = (x.detach().requires_grad_() for x in problem.inputs(impl))
    k_compressed, v_compressed = (
        fsa.compress(x, **KERNELS, cu_seqlens=problem.keys).detach().requires_grad_() for x in (k, v)
    )
    bounds = problem.queries.cu_seqlens, problem.keys.cu_seqlens
    opcheck(
        selection._select_blocks,
        (q.detach(), k_compressed.detach(), torch.zeros(len(q), 2), *bounds, 20, 8, 4, 16, 3, 1, 1, 0.25),
    )
    sizes = attention.Sizes(20, 8, 4, 16, 3, 1, 1, 7, 0.25, "auto", 64, "window,index")
    opcheck(attention._nsa_attention, (q, k, v, k_compressed, v_compressed, k, v, gates, *bounds, *sizes))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("impl", [pytest.param("triton", marks=ON_A_GPU)])
def test_never_waits_for_the_device(impl: str):
    keys = SequenceLayout.from_lengths([2000, 65, 300], "cuda")
    layout = SequenceLayout.from_lengths([600, 0, 300], "cuda").after(keys)
    draw = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    shapes = (900, 8, 128), (2365, 2, 128), (2365, 2, 128), (900, 8, 3)
    x = [torch.randn(shape, **draw) for shape in shapes]

    def run() -> list[Tensor]:
        out = fsa.nsa_attention(*x, cu_seqlens=layout, impl=impl).out
        return [out, *torch.autograd.grad(out, x, torch.ones_like(out))]

    first = run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
