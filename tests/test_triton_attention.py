"""The branches and the whole attention by Triton kernels, in Triton's interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from compiled import graphs_of
from flash_sparse_attention import (
    Interval,
    NSAConfig,
    SequenceLayout,
    combine,
    compress,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
)
from flash_sparse_attention.accuracy import Case, judge

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]


def sizes(windows_and_blocks: tuple[int, int, int], selected: tuple[int, int, int], window_size: int) -> NSAConfig:
    """(l, d, l'), (T, of them the first, of them the newest), w."""
    (kernel_size, kernel_stride, block_size), (slots, init, local) = windows_and_blocks, selected
    return NSAConfig(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        num_selected_blocks=slots,
        num_init_blocks=init,
        num_local_blocks=local,
        window_size=window_size,
    )


SMALL = sizes((8, 4, 16), (3, 1, 1), 20)
CASES = [
    Case((40, 0, 1, 21), 4, 2, 16, 16, SMALL),
    Case((75, 18), 5, 1, 24, 16, sizes((8, 8, 16), (4, 0, 0), 9)),
    Case((60,), 2, 2, 16, 40, sizes((16, 4, 24), (2, 1, 1), 64)),
    Case((70,), 16, 1, 16, 16, sizes((4, 4, 4), (5, 1, 2), 33), dtype=torch.float16),
    Case((35, 9), 4, 2, 16, 16, SMALL, flavour="fused projection"),
    Case((35, 9), 4, 2, 16, 16, SMALL, dtype=torch.float16, flavour="loud first token"),
    Case((35, 9), 4, 2, 16, 16, SMALL, dtype=torch.float16, flavour="quiet first token"),
    Case((35, 9), 4, 2, 16, 16, SMALL, dtype=torch.float16, flavour="large queries"),
    Case((90, 30), 4, 2, 16, 16, sizes((8, 4, 8), (5, 1, 1), 20), flavour="ties"),
    Case((35, 9), 4, 2, 16, 16, SMALL, flavour="independent branches"),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes the interpreter milliseconds."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        for module, constant, value in (("interval", "DKV_PROGRAMS", 6), ("block_scores", "SCORE_PROGRAMS", 8)):
            module = importlib.import_module(f"flash_sparse_attention.impl.triton.{module}")
            monkeypatch.setattr(module, constant, value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_budgets(case: Case):
    operators = [name for name in ("interval_attention", "select_blocks", "combine") if name in case.operators]
    rows = list(judge(case, impls=["triton"], operators=operators))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


WHOLE_CASES = [
    Case((30, 0, 1, 17), 4, 2, 16, 16, SMALL),
    Case((45,), 5, 1, 24, 16, sizes((8, 8, 16), (2, 0, 0), 9), dtype=torch.float16),
    Case((35, 9), 4, 2, 16, 16, SMALL, dtype=torch.float16, flavour="large queries"),
    Case((35, 9), 2, 1, 16, 32, SMALL, flavour="independent branches"),
]


@pytest.mark.parametrize("case", WHOLE_CASES, ids=str)
def test_the_whole_within_the_budgets(case: Case):
    rows = list(judge(case, impls=["triton"], operators=["nsa_attention"]))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def draw(tokens: int, num_windows: int, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> tuple[Tensor, ...]:
    """q, k and v, wanting gradients."""
    q = torch.randn(tokens, heads, dim, requires_grad=True)
    k, v = (torch.randn(num_windows, kv_heads, dim, requires_grad=True) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("interval", [Interval(), Interval(8, 4), Interval(4, 2, 5)], ids=str)
def test_any_interval_and_scale(interval: Interval, scale: float):
    tokens = 50
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        x = draw(tokens, interval.num_keys(tokens))
        out, lse = interval_attention(*x, interval, softmax_scale=scale, impl=impl)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + lse.clamp(min=-1e4).sin().sum()
        results.append([out, lse, *torch.autograd.grad(loss, x)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("score_bytes", [1, 1 << 20])
def test_chunks_and_spans_select_the_same(score_bytes: int, monkeypatch: pytest.MonkeyPatch):
    block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
    monkeypatch.setattr(block_scores, "SCORE_BYTES", score_bytes)
    layout = SequenceLayout.from_lengths([75, 0, 21, 3])
    blocks = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "num_selected_blocks": 5}
    q, k, _ = draw(99, sum(Interval(4, 2).num_keys(n) for n in layout.lengths))
    lse = torch.randn(99, 4)
    expected = select_blocks(q, k, lse, **blocks, cu_seqlens=layout, impl="reference")
    for programs in (1, 1000):
        monkeypatch.setattr(block_scores, "SCORE_PROGRAMS", programs)
        assert torch.equal(select_blocks(q, k, lse, **blocks, cu_seqlens=layout, impl="triton"), expected)


def picked(scores: Tensor, slots: int) -> Tensor:
    """Of a row of scores the first block, the last two and the best others, ascending, -1 behind them."""
    blocks = len(scores)
    order = sorted(range(blocks), key=lambda block: (0 < block < blocks - 2, -scores[block].item(), block))
    chosen = sorted(order[:slots])
    return torch.tensor([*chosen, *[-1] * (slots - len(chosen))], dtype=torch.int32)


@pytest.mark.parametrize(("columns", "lanes"), [(128, 32), (256, 32), (1024, 32), (2048, 32), (512, 64), (16384, 512)])
@pytest.mark.parametrize("slots", [4, 16, 40, 250])
def test_picks_the_best_blocks(columns: int, lanes: int, slots: int):
    block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
    tokens = 4
    # The last tokens of a sequence of blocks of one token, each behind one more block; beyond those stands no number.
    past = columns - tokens - 3
    bounds, bounds_k = torch.tensor([0, tokens]).int(), torch.tensor([0, past + tokens]).int()
    random = torch.rand(tokens, columns)
    for scores in (random, (7 * random).round(), 0 * random, 10 ** (30 * random - 20), random * (random > 0.99)):
        for eligible in (past + 1, 3):
            shift = past + 1 - eligible
            rows = [scores[i, : eligible + i] for i in range(tokens)]
            held = torch.full((tokens, columns), torch.nan)
            for i, row in enumerate(rows):
                held[i, : len(row)] = row
            indices = torch.full((tokens, 1, slots), -7, dtype=torch.int32)
            block_scores._pick_blocks_kernel[(tokens, 1)](
                held, bounds, bounds_k - torch.tensor([0, shift]).int(), indices, 1, 0, columns, 1, tokens, 1, slots,
                1 << (slots - 1).bit_length(), 1, 2, columns, lanes, num_warps=lanes // 32,
            )  # fmt: skip
            expected = torch.stack([picked(row, slots) for row in rows])
            assert torch.equal(indices[:, 0], expected)


def test_lengths_compile_two_graphs():
    # Some 13 windows in the shortest: none at all is a graph of its own.
    calls = [(*draw(n, n), torch.randn(n, 4, 3)) for n in (50, 51, 64, 70)]
    assert graphs_of(lambda q, k, v, g: nsa_attention(q, k, v, g, SMALL, impl="triton").out, calls) == 2


def test_tangents_are_not_left_out_in_silence():
    q, k, v = (x.detach() for x in draw(20, 20))
    gates, slots = torch.zeros(20, 4, 3), torch.zeros(20, 2, 1, dtype=torch.int32)
    weight = torch.ones(2, 8)
    windows = {"kernel_size": 8, "kernel_stride": 4, "impl": "triton"}
    for run, given in (
        (lambda q: nsa_attention(q, k, v, gates, SMALL, impl="triton").out, q),
        (lambda k: interval_attention(q, k, v, Interval(), impl="triton").out, k),
        (lambda v: selected_attention(q, k, v, slots, block_size=16, impl="triton").out, v),
        (lambda gates: combine(q, q, q, gates, impl="triton"), gates),
        (lambda weight: compress(k, kind="weighted", weight=weight, **windows), weight),
    ):
        with pytest.raises(NotImplementedError, match="has no derivative of forward mode"):
            torch.func.jvp(run, (given,), (torch.ones_like(given),))


def test_nan_of_another_sequence_stays_there():
    layout = SequenceLayout.from_lengths([30, 30])
    q, k, v = (x.detach() for x in draw(60, 60))
    gates = torch.zeros(60, 4, 3)
    clean = nsa_attention(q, k, v, gates, SMALL, cu_seqlens=layout, impl="triton")
    for x in (q, k, v):
        x[30:] = torch.nan
    out, block_indices = nsa_attention(q, k, v, gates, SMALL, cu_seqlens=layout, impl="triton")
    assert torch.equal(out[:30], clean.out[:30])
    assert torch.equal(block_indices[:30], clean.block_indices[:30])
    # What NaN selects is anything, but of the sequence.
    assert (block_indices >= -1).all()
    assert (block_indices <= 1).all()


@pytest.mark.parametrize("gate_heads", [1, 4])
def test_computed_again_is_the_same(gate_heads: int, monkeypatch: pytest.MonkeyPatch):
    delta = importlib.import_module("flash_sparse_attention.impl.triton.delta")
    q, k, v = draw(24, 24)
    gates = torch.randn(24, gate_heads, 3, requires_grad=True)
    layout = SequenceLayout.from_lengths([15, 9])

    def gradients(recompute: tuple[str, ...] | str) -> list[Tensor]:
        out = nsa_attention(q, k, v, gates, SMALL, cu_seqlens=layout, impl="triton", recompute=recompute).out
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v, gates))]

    kept = gradients(())
    # And a branch at a time, as for long sequences.
    for rows in (delta.ROWS_AT_ONCE, 0):
        monkeypatch.setattr(delta, "ROWS_AT_ONCE", rows)
        for recompute in ((), "window", ("compressed", "selected", "index")):
            assert all(torch.equal(a, b) for a, b in zip(gradients(recompute), kept, strict=True))
    with pytest.raises(ValueError, match="recompute must be one of"):
        gradients("gates")


def test_activation_checkpointing_gives_the_same_gradients():
    """It gives each saved tensor once, whether an operator or the whole is what it computes again."""
    q, k, v = draw(24, 24)
    gates = torch.randn(24, 1, 3, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return nsa_attention(q, k, v, gates, SMALL, impl="triton").out

    def window(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        out = interval_attention(q, k, v, Interval(window_size=9), impl="triton").out
        return combine(out, out, selected_attention(q, k, v, indices, impl="triton").out, gates, impl="triton")

    indices = torch.zeros(24, 2, 1, dtype=torch.int32)
    for run in (attention, window):
        plain = torch.autograd.grad(run(q, k, v, gates).square().sum(), (q, k, v, gates))
        again = checkpoint(run, q, k, v, gates, use_reentrant=False)
        found = torch.autograd.grad(again.square().sum(), (q, k, v, gates))
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_saves_what_it_says():
    """Outputs that are to be computed again are not kept, nor is the inverted index."""
    q, k, v = draw(24, 24)
    gates = torch.randn(24, 4, 3, requires_grad=True)

    def kept_elements(recompute: tuple[str, ...]) -> int:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            nsa_attention(q, k, v, gates, SMALL, impl="triton", recompute=recompute)
        return kept

    everything = kept_elements(())
    outputs = [everything - kept_elements((branch,)) for branch in ("compressed", "selected", "window")]
    assert outputs == [24 * 4 * 16] * 3
    assert everything - kept_elements(("index",)) > 2 * 24 * 2 * 3


@pytest.mark.parametrize("programs", [1, 64])
def test_gradients_of_what_branches_share_add_up(programs: int, monkeypatch: pytest.MonkeyPatch):
    # Rows of a tile of keys in one share, whose program adds, and in several, which are summed up first.
    monkeypatch.setattr("flash_sparse_attention.impl.triton.interval.DKV_PROGRAMS", programs)
    torch.manual_seed(0)
    q, k, v = draw(50, 50)
    own = [x.detach().clone().requires_grad_() for x in (k, v)]
    gates = torch.randn(50, 4, 3)
    weight = torch.randn(50, 4, 16)

    def gradients(*wanted: Tensor, **window: Tensor) -> tuple[Tensor, ...]:
        out = nsa_attention(q, k, v, gates, SMALL, impl="triton", **window).out
        return torch.autograd.grad((out * weight).sum(), wanted)

    shared = gradients(q, k, v)
    dq, dk, dv, dk_window, dv_window = gradients(q, k, v, *own, k_window=own[0], v_window=own[1])
    for got, expected in zip(shared, (dq, dk + dk_window, dv + dv_window), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # One of them alone has nobody to share with.
    dk, dv, dv_window = gradients(k, v, own[1], v_window=own[1])
    torch.testing.assert_close(dk, shared[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv + dv_window, shared[2], rtol=1e-5, atol=1e-6)


def test_operator_contracts():
    from flash_sparse_attention.impl.triton.ops.attention import Sizes, _nsa_attention
    from flash_sparse_attention.impl.triton.ops.block_selection import _select_blocks
    from flash_sparse_attention.impl.triton.ops.combine import _combine
    from flash_sparse_attention.impl.triton.ops.interval import _interval_attention

    # Few tokens, as each check runs the operators many times: the first sequence has two windows, the second none.
    bounds = torch.tensor([0, 12, 16], dtype=torch.int32)
    q, k, v = draw(16, 16)
    _, k_compressed, v_compressed = draw(16, 2)
    gates = torch.randn(16, 4, 3, requires_grad=True)
    opcheck(_interval_attention, (q, k, v, bounds, None, 1, 1, 7, 0.25))
    opcheck(_combine, (*(x.detach().clone().requires_grad_() for x in (q, q, q)), gates))
    lse = torch.randn(16, 4)
    opcheck(_select_blocks, (q.detach(), k_compressed.detach(), lse, bounds, None, 12, 8, 4, 16, 3, 1, 1, 0.25))
    for recompute in ("", "window,index"):
        sizes = Sizes(12, 8, 4, 16, 3, 1, 1, 7, 0.25, "auto", 64, recompute)
        window = (None, None) if recompute else (k, v)
        opcheck(_nsa_attention, (q, k, v, k_compressed, v_compressed, *window, gates, bounds, None, *sizes))


def test_no_tokens_and_no_windows():
    for tokens in (0, 5):
        q, k, v = draw(tokens, tokens)
        gates = torch.randn(tokens, 4, 3, requires_grad=True)
        out = nsa_attention(q, k, v, gates, SMALL, impl="triton").out
        expected = nsa_attention(q, k, v, gates, SMALL, impl="reference").out
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.square().sum(), (q, k, v, gates))
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (q, k, v, gates)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_windows_that_reach_too_far_are_refused():
    q, k, _ = draw(40, 3)
    lse = torch.zeros(40, 4)
    blocks = {"kernel_size": 32, "kernel_stride": 4, "block_size": 8, "num_selected_blocks": 4}
    with pytest.raises(ValueError, match="windows of at most block_size \\+ kernel_stride tokens"):
        select_blocks(q, k, lse, **blocks, impl="triton")
    assert select_blocks(q, k, lse, **blocks).shape == (40, 2, 4)


def test_selections_of_too_many_blocks_are_refused():
    q, k, _ = draw(40, 9)
    lse = torch.zeros(40, 4)
    blocks = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "num_selected_blocks": 257}
    with pytest.raises(ValueError, match="it keeps up to 256 blocks a query, not 257"):
        select_blocks(q, k, lse, **blocks, impl="triton")
    assert select_blocks(q, k, lse, **blocks).shape == (40, 2, 257)


class Allocations(TorchDispatchMode):
    """Shapes of the zeros that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.zeros.default:
            self.zeros.append(tuple(out.shape))
        return out


def test_no_gradient_is_made_up_for_what_is_saved():
    q, k, v = draw(20, 20)
    out = nsa_attention(q, k, v, torch.zeros(20, 4, 3), SMALL, impl="triton").out
    with Allocations() as allocations:
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out.shape not in allocations.zeros


def test_branches_that_do_not_fit_are_refused():
    q, k, v = draw(40, 40)
    gates = torch.zeros(40, 4, 3)
    for impl in ("triton", "blockwise"):
        for name, shape in (
            ("v_window", (40, 2, 8)),
            ("v_compressed", (9, 2, 8)),
            ("k_compressed", (9, 1, 16)),
        ):
            with pytest.raises(ValueError, match=r"(compressed|window) must be"):
                nsa_attention(q, k, v, gates, SMALL, **{name: torch.zeros(shape)}, impl=impl)


def test_tiny_probabilities_select_as_they_should():
    """Six windows for a block are padded to eight, whose scores are 0 where all others lie at -150."""
    blocks = {"kernel_size": 8, "kernel_stride": 4, "block_size": 24, "num_selected_blocks": 2}
    blocks |= {"num_init_blocks": 0, "num_local_blocks": 0}
    torch.manual_seed(1)
    q, k = torch.randn(70, 2, 16) * 0.2 + 6.0, torch.randn(Interval(8, 4).num_keys(70), 1, 16) * 0.2 - 6.0
    keys = Interval(8, 4)
    lse = interval_attention(q, k, k, keys, impl="reference").lse
    assert lse[20:].max() < -100
    expected = select_blocks(q, k, lse, **blocks, impl="reference")
    assert torch.equal(select_blocks(q, k, lse, **blocks, impl="triton"), expected)


@pytest.mark.parametrize("window_size", [2**29, 2**31])
def test_windows_longer_than_everything(window_size: int):
    results = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        x = draw(20, 20)
        out = interval_attention(*x, Interval(window_size=window_size), impl=impl).out
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", [-9.0, -11.0])
def test_gates_that_are_almost_shut_in_float16(gate: float):
    """The weight of a branch and its probabilities are tiny together; both are representable apart."""
    torch.manual_seed(0)
    exact = [torch.randn(100, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    gates = torch.full((100, 4, 3), gate, dtype=torch.float64)
    config, d_out = sizes((8, 4, 16), (3, 1, 1), 90), 64 * torch.randn(100, 4, 16, dtype=torch.float64)

    def grad_v(dtype: torch.dtype, impl: str) -> Tensor:
        q, k, v = (x.half().to(dtype).requires_grad_() for x in exact)
        out = nsa_attention(q, k, v, gates.half().to(dtype), config, impl=impl).out
        return torch.autograd.grad(out, v, d_out.half().to(dtype))[0].double()

    truth = grad_v(torch.float64, "reference")
    plain, got = (grad_v(torch.float16, impl) - truth for impl in ("reference", "triton"))
    assert got.abs().max() <= 2 * plain.abs().max()
