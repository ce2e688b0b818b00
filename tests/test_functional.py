"""The public operators: their forms agree, the whole is its parts, and what the docstrings show is true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_sparse_attention as fsa
from flash_sparse_attention import Compression, Interval, NSAConfig, NSAOutput, SequenceLayout, functional
from flash_sparse_attention import impl as implementations

BATCH, LENGTH = 3, 45
CONFIG = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    num_selected_blocks=4,
    num_local_blocks=1,
    window_size=10,
)
WINDOWS: dict[str, Any] = {"kernel_size": 8, "kernel_stride": 4}
SELECTION: dict[str, Any] = {
    **WINDOWS,
    "block_size": 8,
    "num_selected_blocks": 4,
    "num_init_blocks": 1,
    "num_local_blocks": 1,
}
SIZED = (
    fsa.compress,
    fsa.compressed_attention,
    fsa.sliding_window_attention,
    fsa.select_blocks,
    fsa.selected_attention,
)
# Modules that need what is not always installed.
OPTIONAL = {"triton": "flash_sparse_attention.impl.triton", "transformers": "flash_sparse_attention.integrations"}


@pytest.fixture(params=["reference", "blockwise", "auto"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def batch() -> dict[str, Tensor]:
    return {
        "q": torch.randn(BATCH, LENGTH, 4, 16),
        "k": torch.randn(BATCH, LENGTH, 2, 16),
        "v": torch.randn(BATCH, LENGTH, 2, 8),
        "gates": torch.randn(BATCH, LENGTH, 4, 3),
    }


def by_parts(x: dict[str, Tensor], impl: str, **bounds: Any) -> dict[str, Tensor]:
    """Every public operator, composed by hand."""
    q, k, v = x["q"], x["k"], x["v"]
    common = {**bounds, "impl": impl}
    k_compressed, v_compressed = fsa.compress(k, **WINDOWS, **common), fsa.compress(v, **WINDOWS, **common)
    compressed = fsa.compressed_attention(q, k_compressed, v_compressed, **WINDOWS, **common)
    block_indices = fsa.select_blocks(q, k_compressed, compressed.lse, **SELECTION, **common)
    selected = fsa.selected_attention(q, k, v, block_indices, block_size=8, **common)
    window = fsa.sliding_window_attention(q, k, v, window_size=10, **common)
    return {
        "k_compressed": k_compressed,
        "compressed": compressed.out,
        "compressed lse": compressed.lse,
        "interval": fsa.interval_attention(q, k_compressed, v_compressed, Interval(8, 4), **common).out,
        "block_indices": block_indices,
        "selected": selected.out,
        "selected lse": selected.lse,
        "window": window.out,
        "out": fsa.combine(compressed.out, selected.out, window.out, x["gates"], impl=impl),
    }


def test_packed_is_batched(impl: str):
    x = batch()
    batched = by_parts(x, impl)
    layout = SequenceLayout.uniform(BATCH, LENGTH)
    packed = by_parts({name: value.flatten(0, 1) for name, value in x.items()}, impl, cu_seqlens=layout)
    assert batched["out"].shape == (BATCH, LENGTH, 4, 8)
    assert batched["compressed lse"].shape == (BATCH, LENGTH, 4)
    assert batched["block_indices"].shape == (BATCH, LENGTH, 2, 4)
    assert batched["k_compressed"].shape == (BATCH, 10, 2, 16)
    for name, value in batched.items():
        assert torch.equal(value.flatten(0, 1), packed[name]), name


def test_a_layout_is_its_bounds(impl: str):
    x = {name: value.flatten(0, 1) for name, value in batch().items()}
    layout = SequenceLayout.from_lengths([100, 0, 35])
    by_layout = by_parts(x, impl, cu_seqlens=layout)
    by_bounds = by_parts(x, impl, cu_seqlens=layout.cu_seqlens)
    for name, value in by_layout.items():
        assert torch.equal(value, by_bounds[name]), name
    # Neither layout nor bounds is one sequence.
    for name, value in by_parts(x, impl).items():
        assert torch.equal(value, by_parts(x, impl, cu_seqlens=SequenceLayout.from_lengths([135]))[name]), name


def test_the_whole_is_its_parts(impl: str):
    x = batch()
    parts = by_parts(x, impl)
    whole = fsa.nsa_attention(**x, config=CONFIG, impl=impl)
    assert isinstance(whole, NSAOutput)
    assert torch.equal(whole.block_indices, parts["block_indices"])
    assert torch.equal(whole.out, parts["out"])


def test_auto_takes_the_whole_in_blocks_only_where_no_part_has_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(implementations, "_HAS_TRITON", True)
    long_windows = NSAConfig(kernel_size=128, kernel_stride=16, block_size=16, num_selected_blocks=4)
    for device, dtype, config, expected in (
        ("cpu", torch.bfloat16, NSAConfig(), "blockwise"),
        ("cuda", torch.bfloat16, NSAConfig(), "triton"),
        ("cuda", torch.float64, NSAConfig(), "blockwise"),
        ("cuda", torch.bfloat16, long_windows, None),
    ):
        x = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 64))
        row = functional._whole(x, x, config, "auto")  # type: ignore[arg-type]
        assert (row and row.impl) == expected, (device, dtype)


def test_the_whole_with_branches_of_their_own(impl: str):
    x = batch()
    own = {name: torch.randn(BATCH, LENGTH, 2, dim) for name, dim in (("k_window", 16), ("v_window", 8))}
    compressed = {name: torch.randn(BATCH, 10, 2, dim) for name, dim in (("k_compressed", 16), ("v_compressed", 8))}
    out, block_indices = fsa.nsa_attention(**x, **own, **compressed, config=CONFIG, softmax_scale=0.3, impl=impl)
    how: dict[str, Any] = {"softmax_scale": 0.3, "impl": impl}
    first = fsa.compressed_attention(x["q"], **compressed, **WINDOWS, **how)
    chosen = fsa.select_blocks(x["q"], compressed["k_compressed"], first.lse, **SELECTION, **how)
    second = fsa.selected_attention(x["q"], x["k"], x["v"], chosen, block_size=8, **how)
    third = fsa.sliding_window_attention(x["q"], own["k_window"], own["v_window"], window_size=10, **how)
    assert torch.equal(block_indices, chosen)
    assert torch.equal(out, fsa.combine(first.out, second.out, third.out, x["gates"], impl=impl))


def test_the_whole_with_learned_compression(impl: str):
    x = batch()
    weights = {"k": torch.randn(2, 8 * 16, 16) / 10, "v": torch.randn(2, 8)}
    how_k, how_v = (
        Compression("linear", weights["k"], position_embedding=torch.randn(8, 16)),
        Compression("weighted", weights["v"]),
    )
    whole = fsa.nsa_attention(**x, config=CONFIG, compression_k=how_k, compression_v=how_v, impl=impl)
    compressed = {
        "k_compressed": fsa.compress(x["k"], **how_k._asdict(), **WINDOWS, impl=impl),
        "v_compressed": fsa.compress(x["v"], **how_v._asdict(), **WINDOWS, impl=impl),
    }
    given = fsa.nsa_attention(**x, **compressed, config=CONFIG, impl=impl)
    assert torch.equal(whole.out, given.out)
    assert torch.equal(whole.block_indices, given.block_indices)
    assert not torch.equal(whole.out, fsa.nsa_attention(**x, config=CONFIG, impl=impl).out)


def test_gates_shared_by_all_heads_are_repeated_gates(impl: str):
    x = batch()
    x["gates"] = torch.randn(BATCH, LENGTH, 1, 3)
    shared = fsa.nsa_attention(**x, config=CONFIG, impl=impl).out
    x["gates"] = x["gates"].expand(-1, -1, 4, -1)
    torch.testing.assert_close(shared, fsa.nsa_attention(**x, config=CONFIG, impl=impl).out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_of_any_dtype(impl: str, dtype: torch.dtype, gate_dtype: torch.dtype):
    outs = [torch.randn(5, 2, 3, dtype=dtype, requires_grad=True) for _ in range(3)]
    gates = torch.randn(5, 2, 3, dtype=gate_dtype, requires_grad=True)
    result = fsa.combine(*outs, gates, impl=impl)
    assert result.dtype == dtype
    exact = sum(out.double() * gate.double().sigmoid() for out, gate in zip(outs, gates.split(1, -1), strict=True))
    torch.testing.assert_close(result, exact.to(dtype))
    grads = torch.autograd.grad(result.sum(), [*outs, gates])
    assert [grad.dtype for grad in grads] == [dtype, dtype, dtype, gate_dtype]


def test_default_sizes_are_those_of_the_configuration(impl: str):
    defaults = NSAConfig().to_dict()
    for operator in SIZED:
        for name, parameter in inspect.signature(operator).parameters.items():
            if isinstance(defaults.get(name), int):
                assert parameter.default == defaults[name], (operator, name)
    x = {name: value[:, :40].repeat(1, 5, 1, 1) for name, value in batch().items()}
    assert torch.equal(fsa.nsa_attention(**x, impl=impl).out, fsa.nsa_attention(**x, config=NSAConfig(), impl=impl).out)
    with pytest.raises(ValueError, match="config must be an NSAConfig or None, got str: "):
        fsa.nsa_attention(**x, config="paper", impl=impl)


def test_default_scale_is_the_root_of_the_head_dimension(impl: str):
    x = batch()
    q, k, v = x["q"], x["k"], x["v"]
    assert torch.equal(
        fsa.interval_attention(q, k, v, Interval(), impl=impl).out,
        fsa.interval_attention(q, k, v, Interval(), softmax_scale=0.25, impl=impl).out,
    )


def test_an_explicit_implementation_is_taken(monkeypatch: pytest.MonkeyPatch):
    x = batch()
    from flash_sparse_attention.impl import blockwise, reference

    def unwanted(*args: Any) -> Any:
        raise AssertionError("another implementation was taken")

    for operator in ("compress", "interval_attention", "select_blocks", "selected_attention", "combine"):
        monkeypatch.setattr(blockwise, operator, unwanted)
    fsa.nsa_attention(**x, config=CONFIG, impl="reference")
    for impl in ("blockwise", "auto"):
        with pytest.raises(AssertionError, match="another implementation was taken"):
            fsa.nsa_attention(**x, config=CONFIG, impl=impl)
    monkeypatch.undo()
    for operator in ("compress", "interval_attention", "select_blocks", "selected_attention", "combine"):
        monkeypatch.setattr(reference, operator, unwanted)
    fsa.nsa_attention(**x, config=CONFIG, impl="blockwise")


def test_public_names_are_documented():
    for name in fsa.__all__:
        assert hasattr(fsa, name)
        assert name == "__version__" or getattr(fsa, name).__doc__, name


def modules() -> list[str]:
    found = [
        module.name for module in pkgutil.walk_packages(fsa.__path__, "flash_sparse_attention.", onerror=lambda _: None)
    ]
    return ["flash_sparse_attention", *(name for name in found if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str):
    for package, prefix in OPTIONAL.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("operator", [*SIZED, fsa.interval_attention, fsa.combine, fsa.nsa_attention])
def test_the_operators_have_examples(operator: Any):
    assert any(found.examples for found in doctest.DocTestFinder().find(operator))
