"""The branches, the whole attention and the layer by Triton kernels on a GPU: pytest -m gpu."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import NSAConfig, SequenceLayout, nsa_attention
from flash_sparse_attention.accuracy import FULL, Case, judge
from flash_sparse_attention.bench.checks import check
from flash_sparse_attention.bench.inputs import draw
from flash_sparse_attention.bench.shapes import Shape
from flash_sparse_attention.bench.suites.attention import selection_errors, whole_case
from flash_sparse_attention.nn import NativeSparseAttention
from graphs import recorded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPERATORS = ("compress", "interval_attention", "select_blocks", "combine", "nsa_attention")
PAPER, FINE = (
    NSAConfig(),
    NSAConfig(kernel_size=16, kernel_stride=8, block_size=48, num_selected_blocks=12, window_size=77),
)
GRID = [
    *(case for case in FULL if case.dtype != torch.float64 and set(OPERATORS) & set(case.operators)),
    # What kernels treat apart: head dimensions, groups that divide no tile, T and blocks that are no powers of two.
    *(
        Case((700, 1, 0, 333), heads, kv_heads, dim, dim_v, config, dtype, seed=11)
        for heads, kv_heads, dim, dim_v, config, dtype in (
            (4, 2, 16, 16, PAPER, torch.bfloat16),
            (5, 1, 80, 80, FINE, torch.bfloat16),
            (12, 1, 96, 112, PAPER, torch.float16),
            (7, 1, 128, 128, FINE, torch.bfloat16),
            (16, 1, 128, 128, PAPER, torch.bfloat16),
            (64, 1, 64, 64, PAPER, torch.bfloat16),
            (6, 2, 192, 128, PAPER, torch.bfloat16),
            (2, 2, 256, 256, FINE, torch.bfloat16),
            (4, 2, 128, 128, PAPER, torch.float32),
        )
    ),
    # Long enough for several tiles of everything.
    Case((5000, 70), 8, 2, 128, 128, PAPER, torch.bfloat16, seed=12),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_within_the_budgets(case: Case):
    operators = [operator for operator in OPERATORS if operator in case.operators]
    rows = list(judge(case, "cuda", impls=["triton"], operators=operators))
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def inputs(tokens: int, heads: int = 8, kv_heads: int = 2, dim: int = 128) -> list[Tensor]:
    """q, k, v and gates, wanting gradients."""
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    x = [torch.randn(tokens, h, dim, **draw) for h in (heads, kv_heads, kv_heads)]
    return [*(t.requires_grad_() for t in x), torch.randn(tokens, heads, 3, **draw).requires_grad_()]


def gradients(x: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, selection and gradients."""
    out, indices = nsa_attention(*x, **options)
    return [out.detach(), indices, *torch.autograd.grad(out, x, torch.ones_like(out))]


def test_auto_takes_the_kernels_and_is_bitwise_equal_from_run_to_run():
    x = inputs(3000)
    first = gradients(x, impl="triton")
    for options in ({}, {"recompute": ("window",)}, {"recompute": ("compressed", "selected", "window", "index")}):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(x, **options), strict=True))


def test_recompute_keeps_less():
    x = inputs(16384)
    output = x[0].nbytes

    def kept(recompute: tuple[str, ...]) -> int:
        before = torch.cuda.memory_allocated()
        out = nsa_attention(*x, recompute=recompute).out
        grown = torch.cuda.memory_allocated() - before
        del out
        return grown

    everything = kept(())
    assert everything - kept(("window",)) == output
    assert everything - kept(("compressed", "selected", "window")) == 3 * output
    assert everything - kept(("index",)) > 2 * 4 * 16384 * 2 * 16


def captured(run: Callable[[], list[Tensor]], change: Callable[[], None]) -> tuple[list[Tensor], list[Tensor]]:
    """What a replayed graph of `run` gives after the inputs changed, and what `run` does."""
    graph, outputs = recorded(run)
    change()
    graph.replay()
    return outputs, run()


def test_captured_in_a_graph():
    x, layout = inputs(600), SequenceLayout.from_lengths([250, 0, 350], "cuda")

    def change() -> None:
        with torch.no_grad():
            for t in x:
                t.normal_()

    got, expected = captured(lambda: gradients(x, cu_seqlens=layout), change)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def layer_and_hidden(preset: str = "paper", **options: object) -> tuple[NativeSparseAttention, Tensor]:
    torch.manual_seed(0)
    layer = NativeSparseAttention(
        256, num_heads=8, num_kv_heads=2, config=NSAConfig.preset(preset), head_dim=64, device="cuda", **options
    )
    return layer, torch.randn(900, 256, device="cuda", requires_grad=True)


def layer_gradients(layer: NativeSparseAttention, hidden: Tensor, layout: SequenceLayout) -> list[Tensor]:
    out = layer(hidden, layout)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), (hidden, *layer.parameters()))]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("preset", ["paper", "fsa", "fla"])
def test_layer_is_captured_and_never_waits_for_the_device(preset: str):
    layer, hidden = layer_and_hidden(preset, dtype=torch.bfloat16)
    hidden = hidden.detach().bfloat16().requires_grad_()
    layout = SequenceLayout.from_lengths([400, 500], "cuda")

    def change() -> None:
        with torch.no_grad():
            hidden.normal_()

    got, expected = captured(lambda: layer_gradients(layer, hidden, layout), change)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-7 * b.abs().max().item())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_gradients(layer, hidden, layout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["paper", "fsa", "fla"])
def test_layer_agrees_with_blockwise(preset: str):
    layer, hidden = layer_and_hidden(preset)
    layout = SequenceLayout.from_lengths([400, 500], "cuda")
    got = layer_gradients(layer, hidden, layout)
    layer.impl = layer.compressor_k.impl = layer.compressor_v.impl = "blockwise"
    for a, b in zip(got, layer_gradients(layer, hidden, layout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_layer_compiled_and_under_autocast():
    layer, hidden = layer_and_hidden()
    layout = SequenceLayout.from_lengths([400, 500], "cuda")
    plain = layer_gradients(layer, hidden, layout)
    compiled = torch.compile(layer, fullgraph=True)
    for a, b in zip(layer_gradients(compiled, hidden, layout), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(hidden, layout)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain[0], rtol=0, atol=0.1 * plain[0].abs().max().item())


def test_new_lengths_compile_nothing():
    interval = importlib.import_module("flash_sparse_attention.impl.triton.interval")
    block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
    compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")

    def specialisations() -> int:
        kernels = (
            interval._interval_fwd_kernel,
            interval._interval_dq_kernel,
            interval._interval_dkv_kernel,
            block_scores._block_scores_kernel,
            compress._compress_pooled_kernel,
            compress._compress_pooled_dx_kernel,
        )
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for tokens in (1024, 1000):
        gradients(inputs(tokens))
    before = specialisations()
    for lengths in ([40], [2048], [33, 1500, 16], [333, 1]):
        gradients(inputs(sum(lengths)), cu_seqlens=SequenceLayout.from_lengths(lengths, "cuda"))
    assert specialisations() == before


def test_logits_of_ten_thousand():
    x = inputs(700)
    with torch.no_grad():
        x[0].mul_(1e4 / 128**0.5)
    assert all(torch.isfinite(t).all() for t in gradients(x))


# Groups of 4 and of 5, which choose blocks by two kernels.
@pytest.mark.parametrize(("tokens", "heads"), [(524288, 5), (1048576, 4)])
def test_gradients_of_long_sequences(tokens: int, heads: int):
    # On a CPU the check takes 1.6 GiB at 32,768 tokens of 4 heads and 2.6 at 65,536: 34 at 1,048,576.
    if torch.cuda.mem_get_info()[1] < 60 << 30:
        pytest.skip("the float64 reference takes about 34 GiB of device memory, beside that of the kernels")
    shape = Shape(tokens, heads, 1)
    case = whole_case(shape, draw(shape, torch.device("cuda")))
    assert case.check_gradients
    for variant in case.variants:
        errors = check(variant.run, case.expected, case.inputs, heads, gradients=True) | case.also()
        assert {f"grad {name}" for name in ("q", "k", "v", "gates")} <= errors.keys()
        assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("columns", [128, 256, 512, 1024, 2048, 4096, 16384, 32768])
@pytest.mark.parametrize("slots", [4, 16, 250])
def test_picks_the_best_blocks(columns: int, slots: int):
    block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
    options = block_scores._pick_options(columns)
    # The last tokens of a sequence of blocks of one token, so that each has one block more.
    tokens = 100
    past = columns - tokens
    bounds, bounds_k = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (tokens, columns))
    block = torch.arange(columns, device="cuda")
    eligible = past + 1 + torch.arange(tokens, device="cuda")[:, None]
    random = torch.rand(tokens, columns, device="cuda")
    for scores in (
        random,
        (7 * random).round(),
        0 * random,
        10 ** (30 * random - 20),
        random * (random > 0.99),
        torch.where(random > 0.9, torch.nan, random),
    ):
        # No number counts as 0, also behind the last block.
        held = torch.full((tokens * columns + columns,), torch.nan, device="cuda")
        held[: scores.numel()] = torch.where(block < eligible, scores, torch.nan).flatten()
        indices = torch.full((tokens, 1, slots), -7, dtype=torch.int32, device="cuda")
        block_scores._pick_blocks_kernel[(tokens, 1)](
            held, bounds, bounds_k, indices, 1, 0, columns, 1, tokens, 1, slots, 1 << (slots - 1).bit_length(), 1, 2,
            columns, 32 * options["num_warps"], **options,
        )  # fmt: skip
        ranked = torch.where((block < 1) | (block >= eligible - 2), torch.inf, scores.nan_to_num(0))
        ranked = torch.where(block < eligible, ranked, -1.0)
        best = ranked.sort(dim=1, descending=True, stable=True).indices[:, :slots]
        expected = torch.full_like(indices[:, 0], -1)
        chosen = torch.where(best < eligible, best, columns).sort(dim=1).values
        expected[:, : chosen.shape[1]] = torch.where(chosen < columns, chosen, -1).int()
        assert torch.equal(indices[:, 0], expected)


def test_very_many_blocks():
    # On a CPU the check takes 0.6 GiB at 32,784 tokens and 2 at 65,552: 33 at 262,208.
    if torch.cuda.mem_get_info()[1] < 60 << 30:
        pytest.skip("the reference, which has the overlap of each window with each block, takes about 33 GiB")
    config = NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, num_selected_blocks=5, window_size=40)
    # 16,388 blocks: one more power of two than 16,384.
    shape = Shape(262208, 1, 1, 64, 64, config)
    x = draw(shape, torch.device("cuda"))
    with torch.no_grad():
        indices = nsa_attention(x.q, x.k, x.v, x.gates, config).block_indices
    errors = selection_errors(shape, x.q.detach(), x.k.detach(), indices)
    assert max(errors.values()) <= 1, errors


def test_memory_grows_with_the_length_alone():
    """Workspace of both passes: what they take beyond inputs, outputs, what is saved, and the gradients."""
    for tokens in (16384, 65536):
        x = inputs(tokens, heads=4, kv_heads=1)
        gradients(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, indices = nsa_attention(*x)
        kept = torch.cuda.memory_allocated() - before
        assert torch.cuda.max_memory_allocated() - before - kept <= 1 << 30
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, x, torch.ones_like(out))
        gradient_bytes = sum(t.nbytes for t in grads) + out.nbytes
        assert torch.cuda.max_memory_allocated() - before - gradient_bytes <= 1 << 30
        assert kept <= 5 * out.nbytes + 5 * indices.nbytes + (16 << 20)
