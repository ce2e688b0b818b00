"""Compression by Triton kernels in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 pytest -m interpreter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from flash_sparse_attention import SequenceLayout, geometry
from flash_sparse_attention.impl import reference
from flash_sparse_attention.types import Compression

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

KINDS = ("mean", "weighted", "linear", "mlp")
# Relative to the largest element of a tensor.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Shapes of one call; `hidden` is E of `mlp`."""

    lengths: tuple[int, ...] = (40, 0, 1, 21)
    num_kv_heads: int = 2
    dim: int = 16
    kernel_size: int = 8
    kernel_stride: int = 4
    hidden: int = 40
    position: bool = True
    dtype: torch.dtype = torch.float32

    def layout(self) -> SequenceLayout:
        return SequenceLayout.from_lengths(self.lengths)

    def tokens(self) -> Tensor:
        """x `[N, Hk, D]`, wanting a gradient."""
        return torch.randn(sum(self.lengths), self.num_kv_heads, self.dim).to(self.dtype).requires_grad_()

    def compression(self, kind: str) -> Compression:
        """Weights of every kind, float32 as parameters are, wanting gradients."""
        heads, dim, flat = self.num_kv_heads, self.dim, self.kernel_size * self.dim
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "mean": {},
            "weighted": {"weight": (heads, self.kernel_size)},
            "linear": {"weight": (heads, flat, dim)},
            "mlp": {
                "weight": (heads, flat, self.hidden),
                "bias": (heads, self.hidden),
                "weight_out": (heads, self.hidden, dim),
                "bias_out": (heads, dim),
            },
        }
        weights = {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes[kind].items()}
        if self.position:
            weights["position_embedding"] = torch.randn(self.kernel_size, dim)
        return Compression(kind, **{name: weight.requires_grad_() for name, weight in weights.items()})


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them takes the interpreter milliseconds."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")

        monkeypatch.setattr(compress, "DWEIGHT_PROGRAMS", 1)


Compress = Callable[[Tensor, Compression, int, int, SequenceLayout], Tensor]


def triton_compress() -> Compress:
    from flash_sparse_attention.impl.triton.ops.compress import compress

    return compress


def weights_of(compression: Compression) -> dict[str, Tensor]:
    return {name: value for name, value in compression._asdict().items() if isinstance(value, Tensor)}


def loss_weights(out: Tensor) -> Tensor:
    """Different for each element of out, and with sums that are far from 0."""
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)


def output_and_gradients(run: Compress, x: Tensor, compression: Compression, case: Case) -> dict[str, Tensor]:
    """out, and the gradients of x and of every weight, of a loss that weighs the elements of out differently."""
    out = run(x, compression, case.kernel_size, case.kernel_stride, case.layout())
    weights = weights_of(compression)
    loss = (out.double() * loss_weights(out)).sum()
    grads = torch.autograd.grad(loss, [x, *weights.values()])
    return {"out": out.detach(), **dict(zip(["x", *weights], grads, strict=True))}


def in_dtype(x: Tensor, compression: Compression, dtype: torch.dtype) -> tuple[Tensor, Compression]:
    """The same numbers in another dtype, as leaves."""
    weights = {name: value.detach().to(dtype).requires_grad_() for name, value in weights_of(compression).items()}
    return x.detach().to(dtype).requires_grad_(), Compression(compression.kind, **weights)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        error = (got[name].double() - value.double()).abs()
        assert not error.isnan().any(), name
        largest = value.abs().max() if value.numel() else 0.0
        assert error.numel() == 0 or error.max() <= tolerance * max(largest, 1e-30), (name, error.max(), largest)


def check(case: Case, kind: str, x: Tensor | None = None) -> None:
    x = case.tokens() if x is None else x
    compression = case.compression(kind)
    got = output_and_gradients(triton_compress(), x, compression, case)
    assert got["out"].dtype == got["x"].dtype == case.dtype
    assert got["out"].is_contiguous()
    assert all(got[name].dtype == torch.float32 for name in weights_of(compression))
    exact = output_and_gradients(reference.compress, *in_dtype(x, compression, torch.float64), case)
    assert_close(got, exact, TOLERANCE[case.dtype])
    if case.dtype == torch.float32:
        assert_close(got, output_and_gradients(reference.compress, x, compression, case), 2e-5)


CASES = [
    Case(),
    Case(position=False),
    Case((40, 0, 1, 21), 1, 24, 8, 8),
    Case((30, 12, 11, 17, 0), 2, 24, 12, 6, hidden=16),
    Case((4, 9, 3), 2, 16, 4, 1),
    Case((3, 8), 1, 80, 2, 2, hidden=130),
    Case((17, 8), 2, 24, 8, 2, dtype=torch.float16),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case: Case, kind: str):
    check(case, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_tiles(kind: str, monkeypatch: pytest.MonkeyPatch):
    compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")

    small = compress.ProductTiles(rows=16, columns=16, depth=16, warps=4, stages=2)
    monkeypatch.setattr(compress, "SINGLE_TILES", small)
    monkeypatch.setattr(compress, "DWEIGHT_PROGRAMS", 40)
    for name in ("POOL_TILE", "POOL_DWEIGHT_TILE"):
        monkeypatch.setattr(compress, name, 256)
    monkeypatch.setattr(compress, "BOUNDS_TILE", 2)
    monkeypatch.setattr(compress, "STARTS_TILE", 16)
    check(Case((66, 0, 3, 41, 8), 1, 24, 4, 2, hidden=24), kind)


@pytest.mark.parametrize("kind", ["weighted", "linear"])
def test_slices_of_a_fused_projection(kind: str):
    case = Case((30, 9))
    fused = torch.randn(39, 5 * 16)
    check(case, kind, fused[:, 16:48].unflatten(1, (2, 16)).requires_grad_())
    # Heads that are not adjacent are copied.
    check(case, kind, torch.randn(2, 39, 16).transpose(0, 1).requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(), (0,), (7, 0, 3)], ids=str)
def test_no_windows(lengths: tuple[int, ...], kind: str):
    check(Case(lengths), kind)
    if lengths:
        # What is not read must not be NaN either.
        x = Case(lengths).tokens()
        got = output_and_gradients(triton_compress(), x, Case().compression(kind), Case(lengths))
        assert all((value == 0).all() for value in got.values())


@pytest.mark.parametrize("lengths", [(), (0,), (5,), (8,), (31, 0, 7, 8, 9, 100), (3, 17) * 40], ids=str)
def test_key_bounds(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")

    layout = SequenceLayout.from_lengths(lengths)
    expected = layout.compressed(8, 4).cu_seqlens
    assert expected[-1] == sum(geometry.num_compressed_tokens(length, 8, 4) for length in lengths)
    for tile in (2, compress.BOUNDS_TILE):
        monkeypatch.setattr(compress, "BOUNDS_TILE", tile)
        bounds = compress.launch_key_bounds(layout.cu_seqlens, 8, 4)
        assert bounds.dtype == torch.int32
        assert torch.equal(bounds, expected)


@pytest.mark.parametrize("kind", ["weighted", "linear"])
def test_only_the_gradients_that_are_wanted(kind: str):
    case = Case()
    x, compression = case.tokens(), case.compression(kind)
    everything = output_and_gradients(triton_compress(), x, compression, case)
    weights = weights_of(compression)
    for wanted in ["x", *weights]:
        frozen = {name: value.detach().requires_grad_(name == wanted) for name, value in {"x": x, **weights}.items()}
        leaf = frozen[wanted]
        some = Compression(kind, **{name: value for name, value in frozen.items() if name != "x"})
        out = triton_compress()(frozen["x"], some, case.kernel_size, case.kernel_stride, case.layout())
        loss = (out.double() * loss_weights(out)).sum()
        assert_close({wanted: torch.autograd.grad(loss, leaf)[0]}, {wanted: everything[wanted]}, 1e-6)


def test_gradients_without_a_layout_in_memory():
    """Gradients of a sum are one number, expanded."""
    case = Case()
    for kind in ("weighted", "linear"):
        x, compression = case.tokens(), case.compression(kind)
        leaves = [x, *weights_of(compression).values()]
        exact_x, exact = in_dtype(x, compression, torch.float64)
        exact_leaves = [exact_x, *weights_of(exact).values()]
        sizes = case.kernel_size, case.kernel_stride, case.layout()
        got = torch.autograd.grad(triton_compress()(x, compression, *sizes).sum(), leaves)
        expected = torch.autograd.grad(reference.compress(exact_x, exact, *sizes).sum(), exact_leaves)
        names = list(map(str, range(len(leaves))))
        assert_close(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)), 1e-5)


@pytest.mark.parametrize("lengths", [(9, 4), (3,)], ids=str)
def test_operator_contracts(lengths: tuple[int, ...]):
    from flash_sparse_attention.impl.triton.ops import compress as ops

    layout = SequenceLayout.from_lengths(lengths)
    keys, sizes, tokens = layout.compressed(4, 2), (4, 2), sum(lengths)
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((tokens, 1, 16), (1, 4), (1, 16)))
    d_out = torch.randn(keys.total_tokens, 1, 16)
    for weights in ((None, None), (weight, bias)):
        opcheck(ops._compress_pooled, (x, *weights, layout.cu_seqlens, *sizes, keys.total_tokens))
        given = d_out, x.detach(), None if weights[0] is None else weight.detach(), layout.cu_seqlens, keys.cu_seqlens
        for wanted in ((True, weights[0] is not None), (False, False)):
            opcheck(ops._compress_pooled_backward, (*given, tokens, *sizes, *wanted))
    matrix, bias = (torch.randn(shape, requires_grad=True) for shape in ((1, 4 * 16, 24), (1, 24)))
    for added, dtype in ((None, torch.float16), (bias, torch.float32)):
        opcheck(ops._compress_linear, (x, matrix, added, layout.cu_seqlens, *sizes, keys.total_tokens, dtype))
    given = torch.randn(keys.total_tokens, 1, 24), x.detach(), matrix.detach(), layout.cu_seqlens, keys.cu_seqlens
    for wanted in ((True, True), (False, False)):
        opcheck(ops._compress_linear_backward, (*given, *sizes, *wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str):
    case = Case((20, 0, 9))
    x, compression, layout = case.tokens(), case.compression(kind), case.layout()

    def run(x: Tensor, compression: Compression) -> Tensor:
        return triton_compress()(x, compression, case.kernel_size, case.kernel_stride, layout)

    def gradients(run: Callable[[Tensor, Compression], Tensor]) -> dict[str, Tensor]:
        return output_and_gradients(lambda x, compression, *_: run(x, compression), x, compression, case)

    assert_close(gradients(torch.compile(run, fullgraph=True, backend="aot_eager")), gradients(run), 1e-6)
