"""The blockwise implementation: exactness over the whole grid, linear memory, and its contract with `torch.compile`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from compiled import graphs_of
from flash_sparse_attention import (
    Interval,
    NSAConfig,
    SequenceLayout,
    nsa_attention,
    selected_attention,
    sliding_window_attention,
)
from flash_sparse_attention import functional as public
from flash_sparse_attention.accuracy import FULL, Case, judge
from flash_sparse_attention.impl.blockwise import interval, selected
from flash_sparse_attention.impl.blockwise.common import Visible
from flash_sparse_attention.nn import NativeSparseAttention

PAPER = NSAConfig(num_selected_blocks=8, window_size=200)
SMALL = NSAConfig(
    kernel_size=8, kernel_stride=4, block_size=8, num_selected_blocks=4, num_local_blocks=1, window_size=20
)


def assert_within_budget(case: Case, operators: list[str] | None = None) -> None:
    rows = list(judge(case, impls=["blockwise"], operators=operators))
    assert rows
    failures = [f"{row.label}, {row.tensor}: {row.max_error:.2e} of {row.max_budget:.2e}" for row in rows if not row.ok]
    assert not failures


@pytest.mark.parametrize("case", FULL, ids=str)
def test_within_budget(case: Case):
    assert_within_budget(case)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["interval_attention", "select_blocks", "selected_attention", "nsa_attention"])
@pytest.mark.parametrize(
    "case",
    [
        Case((2500,), 2, 1, 64, 64, PAPER, torch.bfloat16, seed=5),
        Case((1030, 0, 1, 1200), 1, 1, 64, 64, PAPER, torch.float32, seed=6),
    ],
    ids=str,
)
def test_within_budget_over_many_tiles(case: Case, operator: str):
    assert_within_budget(case, [operator])


@pytest.fixture
def least_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, batches and chunks of a few tokens, so that every loop goes round many times, and ends in the middle."""
    sizes = {"QUERY_TILE": 7, "KEY_TILE": 5, "LARGEST_WINDOW_TILE": 0, "SCORE_TILE": 140, "PARTIAL_SUMS": 1500}
    places = [(module, name) for module in (interval, selected) for name in sizes if hasattr(module, name)]
    assert {name for _, name in places} == set(sizes)
    for module, name in places:
        monkeypatch.setattr(module, name, sizes[name])


@pytest.mark.usefixtures("least_tiles")
@pytest.mark.parametrize("flavour", ["plain", "hostile indices", "loud first token", "ties"])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_within_budget_where_every_loop_goes_round(num_heads: int, flavour: Any):
    assert_within_budget(Case((61, 0, 1, 30, 2), num_heads, 2, 16, 8, SMALL, torch.float64, flavour))


@pytest.mark.parametrize("window_queries", [1, 7])
@pytest.mark.parametrize("num_heads", [2, 6])
def test_within_budget_where_windows_take_many_tiles(
    num_heads: int, window_queries: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(interval, "WINDOW_QUERY_TILE", window_queries)
    case = Case((61, 0, 1, 30, 2), num_heads, 2, 16, 8, SMALL, torch.float64)
    assert_within_budget(case, ["interval_attention"])


# Memory.


def allocations(call: Callable[[], object]) -> tuple[int, int]:
    """(peak, largest single one) of what a call allocates, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, max(event.nbytes() for event in events)


def attend_and_differentiate(tokens: int, impl: str) -> None:
    q = torch.randn(tokens, 2, 16, requires_grad=True)
    k, v = (torch.randn(tokens, 1, 16, requires_grad=True) for _ in range(2))
    nsa_attention(q, k, v, torch.zeros(tokens, 2, 3), SMALL, impl=impl).out.sum().backward()


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch):
    # The working set does not depend on N; what is left must not more than double with N.
    monkeypatch.setattr(interval, "QUERY_TILE", 32)
    attend_and_differentiate(64, "blockwise")
    (peak, largest), (peak_of_twice, largest_of_twice) = (
        allocations(lambda tokens=tokens: attend_and_differentiate(tokens, "blockwise")) for tokens in (2048, 4096)
    )
    assert peak_of_twice < 2.1 * peak
    assert largest_of_twice < 2.1 * largest
    # The compressed scores, which are N x N / 4, would be twice that.
    assert largest_of_twice < 4096 * 1024 * 4 / 2


def test_the_measure_of_memory_sees_a_square():
    attend_and_differentiate(64, "reference")
    peaks = [allocations(lambda tokens=tokens: attend_and_differentiate(tokens, "reference")) for tokens in (256, 512)]
    assert peaks[1][0] > 3 * peaks[0][0]
    assert peaks[1][1] >= 512 * 512 * 4


# What is hidden.


def test_hidden_scores_do_not_matter_whatever_they_are():
    anything = torch.tensor([1.5, -0.0, math.inf, -math.inf, math.nan])
    seen = torch.tensor([[True], [False]])
    for dtype in (torch.float32, torch.float64):
        scores = anything.to(dtype).expand(2, -1).contiguous()
        visible = Visible.of(seen, scores)
        p = scores.clone()
        visible.hide_(scores)
        visible.clear_(p)
        for got, hidden in ((scores, -math.inf), (p, 0.0)):
            torch.testing.assert_close(got[0], anything.to(dtype), rtol=0, atol=0, equal_nan=True)
            assert (got[1] == hidden).all()


@pytest.mark.parametrize("lengths", [[150], [3, 60, 0, 1, 37, 2, 50]], ids=str)
@pytest.mark.parametrize("flavour", [Interval(), Interval(8, 4), Interval(window_size=20), Interval(6, 3, 5)], ids=str)
def test_masks_that_are_kept_are_those_of_the_tile(
    monkeypatch: pytest.MonkeyPatch, flavour: Interval, lengths: list[int]
):
    for size, tokens in (("QUERY_TILE", 10), ("KEY_TILE", 7), ("WINDOW_QUERY_TILE", 10), ("LARGEST_WINDOW_TILE", 40)):
        monkeypatch.setattr(interval, size, tokens)
    layout = SequenceLayout.from_lengths(lengths)
    num_keys = layout.compressed(flavour.kernel_size, flavour.kernel_stride).total_tokens
    seen = torch.zeros(layout.total_tokens, num_keys)
    for tile in interval.tiles(flavour, layout, num_heads=2):
        for span in tile.spans():
            seen[tile.queries, span] = tile.clear_(torch.ones(1, 2 * len(tile.start_T), span.stop - span.start), span)[
                0, ::2
            ]
    key, first_key, first = torch.arange(num_keys), 0, 0
    for length in lengths:
        for token in range(length):
            start, end = first_key + flavour.start(token), first_key + flavour.end(token)
            assert torch.equal(seen[first + token].bool(), (key >= start) & (key < end)), (length, token)
        first, first_key = first + length, first_key + flavour.num_keys(length)


def test_later_keys_that_are_not_numbers_change_nothing():
    q, k, v = torch.randn(90, 4, 16), torch.randn(90, 2, 16), torch.randn(90, 2, 8)
    gates, bad_k = torch.randn(90, 4, 3), k.clone()
    bad_k[70:80], bad_k[80:] = math.nan, math.inf
    expected = nsa_attention(q, k, v, gates, SMALL, impl="blockwise")
    got = nsa_attention(q, bad_k, v, gates, SMALL, impl="blockwise")
    assert torch.equal(got.out[:70], expected.out[:70])
    assert torch.equal(got.block_indices[:70], expected.block_indices[:70])


# The whole as one operator.


@pytest.mark.parametrize("own", [(), ("k_window",), ("k_window", "v_window", "k_compressed", "v_compressed")], ids=str)
@pytest.mark.parametrize("gates", [1, 4])
def test_gradients_of_the_whole_are_those_of_its_parts(own: tuple[str, ...], gates: int):
    layout = SequenceLayout.from_lengths([60, 0, 3, 37])
    compressed = layout.compressed(8, 4).total_tokens
    x = {
        "q": torch.randn(100, 4, 16),
        "k": torch.randn(100, 2, 16),
        "v": torch.randn(100, 2, 8),
        "gates": 3 * torch.randn(100, gates, 3),
        **{f"{side}_window": torch.randn(100, 2, dim) for side, dim in (("k", 16), ("v", 8))},
        **{f"{side}_compressed": torch.randn(compressed, 2, dim) for side, dim in (("k", 16), ("v", 8))},
    }
    # A gate that is shut passes nothing on.
    x["gates"][5], x["gates"][6, :, 1] = -math.inf, -200.0
    x = {name: value.double().requires_grad_() for name, value in x.items() if "_" not in name or name in own}
    d_out = torch.randn(100, 4, 8).double()
    whole = nsa_attention(**x, config=SMALL, cu_seqlens=layout, impl="blockwise").out
    # `reference` calls the operators one by one.
    parts = nsa_attention(**x, config=SMALL, cu_seqlens=layout, impl="reference").out
    torch.testing.assert_close(whole, parts)
    names, inputs = list(x), list(x.values())
    for name, got, expected in zip(
        names, torch.autograd.grad(whole, inputs, d_out), torch.autograd.grad(parts, inputs, d_out), strict=True
    ):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_whole_keeps_its_contract():
    q, k, v, _, bounds, *_ = operator_arguments()["selected_attention_blockwise"]
    _, k_compressed, v_compressed, *_ = operator_arguments()["interval_attention_blockwise"]
    gates, sizes = torch.randn(36, 4, 3), (8, 4, 8, 3, 1, 1, 20, 0.3)
    operators = torch.ops.flash_sparse_attention
    for window in ((None, None), (torch.randn(36, 2, 8), torch.randn(36, 2, 6))):
        inputs = q, k, v, k_compressed, v_compressed, *window, gates, bounds, bounds
        torch.library.opcheck(operators.nsa_attention_blockwise, (*inputs, *sizes))
        torch.library.opcheck(operators.nsa_attention_blockwise, differentiable((*inputs, *sizes)))
        out, *saved = operators.nsa_attention_blockwise(*inputs, *sizes)
        backward = (torch.randn(out.shape), *inputs, saved, *sizes)
        torch.library.opcheck(operators.nsa_attention_blockwise_backward, backward)


# The contract of custom operators.


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of each registered operator: q a slice of a fused projection, k and v with heads before tokens."""
    layout = SequenceLayout.from_lengths([21, 0, 1, 14])
    bounds, compressed = layout.cu_seqlens, layout.compressed(8, 4).total_tokens
    q = torch.randn(36, 4 * 8 + 7)[:, : 4 * 8].unflatten(1, (4, 8))
    k, v = torch.randn(2, 36, 8).transpose(0, 1), torch.randn(2, 36, 6).transpose(0, 1)
    k_compressed, v_compressed = torch.randn(2, compressed, 8).transpose(0, 1), torch.randn(compressed, 2, 6)
    lse = torch.randn(36, 4)
    indices = torch.randint(-1, 3, (36, 2, 3), dtype=torch.int32)
    return {
        "interval_attention_blockwise": (q, k_compressed, v_compressed, bounds, bounds, 8, 4, 0, 0.3),
        "selected_attention_blockwise": (q, k, v, indices, bounds, bounds, 8, 0.3),
        "select_blocks_blockwise": (q, k_compressed, lse, bounds, bounds, 8, 4, 8, 3, 1, 1, 0.3),
    }


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    )


@pytest.mark.parametrize("name", sorted(operator_arguments()))
def test_operators_keep_their_contract(name: str):
    operator = getattr(torch.ops.flash_sparse_attention, name)
    arguments = operator_arguments()[name]
    torch.library.opcheck(operator, arguments)
    if name != "select_blocks_blockwise":
        torch.library.opcheck(operator, differentiable(arguments))


@pytest.mark.parametrize("name", ["interval_attention_blockwise", "selected_attention_blockwise"])
def test_backward_operators_keep_their_contract(name: str):
    arguments = operator_arguments()[name]
    out, lse = getattr(torch.ops.flash_sparse_attention, name)(*arguments)
    bounds = next(index for index, value in enumerate(arguments) if isinstance(value, Tensor) and value.dim() == 1)
    upstream = torch.randn(out.shape), torch.randn(lse.shape)
    backward = getattr(torch.ops.flash_sparse_attention, f"{name}_backward")
    torch.library.opcheck(backward, (*upstream, *arguments[:bounds], out, lse, *arguments[bounds:]))


@pytest.mark.slow
def test_the_whole_compiles_to_one_graph_forward_and_backward():
    layout = SequenceLayout.from_lengths([60, 0, 35])
    x = {
        "q": torch.randn(95, 4, 16),
        "k": torch.randn(95, 2, 16),
        "v": torch.randn(95, 2, 8),
        "gates": torch.randn(95, 4, 3),
    }

    def attend(x: dict[str, Tensor]) -> Tensor:
        return nsa_attention(**x, config=SMALL, cu_seqlens=layout).out

    def value_and_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
        out = function(leaves)
        return [out.detach(), *torch.autograd.grad((out * out.detach()).sum(), list(leaves.values()))]

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for got, expected in zip(value_and_gradients(compiled), value_and_gradients(attend), strict=True):
        torch.testing.assert_close(got, expected)


# The first length is compiled as it is, the second as any.
LENGTHS = (50, 51, 64, 100, 129)


@pytest.mark.slow
def test_lengths_compile_two_graphs():
    torch.manual_seed(3)
    calls = [tuple(torch.randn(2, n, heads, 8) for heads in (4, 2, 2)) for n in LENGTHS]
    whole = [(*x, torch.randn(2, x[0].shape[1], 4, 3)) for x in calls]
    slots = torch.arange(3, dtype=torch.int32)
    chosen = [(*x, slots.expand(2, x[0].shape[1], 2, 3).contiguous()) for x in calls]
    options = {"block_size": 16, "impl": "blockwise"}
    assert graphs_of(lambda q, k, v, g: nsa_attention(q, k, v, g, SMALL, impl="blockwise").out, whole) == 2
    assert graphs_of(lambda q, k, v, i: selected_attention(q, k, v, i, **options).out, chosen) == 2
    assert graphs_of(lambda q, k, v: sliding_window_attention(q, k, v, window_size=9).out, calls) == 2
    layer = NativeSparseAttention(32, num_heads=4, num_kv_heads=2, head_dim=8, config=SMALL)
    assert graphs_of(layer, [(torch.randn(2, n, 32),) for n in LENGTHS]) == 2


def whole(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, impl: str = "blockwise") -> Tensor:
    return nsa_attention(q, k, v, gates, SMALL, impl=impl).out


def double_inputs(tokens: int) -> tuple[Tensor, ...]:
    """q, k, v and gates in float64."""
    torch.manual_seed(5)
    sizes = ((tokens, 2, 4), (tokens, 1, 4), (tokens, 1, 4), (tokens, 2, 3))
    return tuple(torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)


def test_gradients_against_differences_and_of_nothing():
    # It also asks for gradients where none comes from above.
    assert torch.autograd.gradcheck(whole, double_inputs(24))


def test_tangents_are_not_left_out_in_silence():
    x = tuple(value.detach() for value in double_inputs(30))
    tangents = tuple(map(torch.randn_like, x))
    out, tangent = torch.func.jvp(lambda *x: whole(*x, impl="reference"), x, tangents)
    torch.testing.assert_close(out, whole(*x))
    leaves = [value.clone().requires_grad_() for value in x]
    back = torch.randn_like(out)
    gradients = torch.autograd.grad(whole(*leaves), leaves, back)
    along = sum((gradient * value).sum() for gradient, value in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((back * tangent).sum(), along)

    q, k, v, gates = x
    slots = torch.zeros(30, 1, 1, dtype=torch.int32)
    outs = q, q + 1, q + 2
    for run, given in (
        (lambda k: whole(q, k, v, gates), k),
        (lambda gates: whole(q, k, v, gates), gates),
        (lambda q: public.interval_attention(q, k, v, Interval()).out, q),
        (lambda v: selected_attention(q, k, v, slots, block_size=16).lse, v),
        (lambda gates: public.combine(*outs, gates), gates),
    ):
        with pytest.raises(NotImplementedError, match="has no derivative of forward mode"):
            torch.func.jvp(run, (given,), (torch.ones_like(given),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
            run(torch.autograd.forward_ad.make_dual(given, given))
    # What PyTorch differentiates by itself.
    assert torch.func.jvp(lambda k: public.compress(k, kernel_size=8, kernel_stride=4), (k,), (k,))[1].any()


def test_gradients_are_not_differentiated_twice_in_silence():
    q, k, v = torch.randn(9, 2, 4, requires_grad=True), torch.randn(9, 1, 4), torch.randn(9, 1, 4)
    for result in (
        public.interval_attention(q, k, v, Interval(), impl="blockwise"),
        selected_attention(q, k, v, torch.zeros(9, 1, 1, dtype=torch.int32), block_size=16, impl="blockwise"),
        nsa_attention(q, k, v, torch.zeros(9, 2, 3), SMALL, impl="blockwise"),
    ):
        (grad,) = torch.autograd.grad(result.out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_order_of_the_slots_and_the_threads_change_nothing(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = dataclasses.replace(FULL[1], lengths=(150,))
        q, k, v = (torch.randn(150, heads, 16, dtype=case.dtype) for heads in (4, 2, 2))
        indices = torch.randint(-1, 10, (150, 2, 6), dtype=torch.int32)
        first = selected_attention(q, k, v, indices, block_size=16, impl="blockwise")
        for _ in range(3):
            again = selected_attention(q, k, v, indices[..., torch.randperm(6)], block_size=16, impl="blockwise")
            assert torch.equal(first.out, again.out)
            assert torch.equal(first.lse, again.lse)
    finally:
        torch.set_num_threads(before)
