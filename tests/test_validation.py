"""Every kind of bad argument: the error names the argument, what was expected, what came, and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import (
    Compression,
    Interval,
    NSAConfig,
    SequenceLayout,
    combine,
    compress,
    compressed_attention,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from flash_sparse_attention.impl import (
    CACHE_WRITES,
    CAPABILITIES,
    FUSED_WRITES,
    OPERATORS,
    WHOLE,
    WITH_KVCACHE,
    available,
    explain,
    load,
    resolve,
)
from flash_sparse_attention.validation import FLOAT_DTYPES

CPU = torch.device("cpu")
TOKENS = 40
# Windows of 8 every 4 tokens: 9 of them.
SIZES = {"kernel_size": 8, "kernel_stride": 4}
CONFIG = NSAConfig(**SIZES, block_size=8, num_selected_blocks=4, window_size=10)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


GOOD: dict[Callable[..., Any], dict[str, Any]] = {
    compress: {"x": zeros(TOKENS, 2, 8), **SIZES},
    interval_attention: {
        "q": zeros(TOKENS, 4, 8),
        "k": zeros(TOKENS, 2, 8),
        "v": zeros(TOKENS, 2, 6),
        "interval": Interval(),
    },
    compressed_attention: {
        "q": zeros(TOKENS, 4, 8),
        "k_compressed": zeros(9, 2, 8),
        "v_compressed": zeros(9, 2, 6),
        **SIZES,
    },
    sliding_window_attention: {
        "q": zeros(TOKENS, 4, 8),
        "k": zeros(TOKENS, 2, 8),
        "v": zeros(TOKENS, 2, 6),
        "window_size": 5,
    },
    select_blocks: {
        "q": zeros(TOKENS, 4, 8),
        "k_compressed": zeros(9, 2, 8),
        "lse": zeros(TOKENS, 4),
        **SIZES,
        "block_size": 8,
        "num_selected_blocks": 4,
    },
    selected_attention: {
        "q": zeros(TOKENS, 4, 8),
        "k": zeros(TOKENS, 2, 8),
        "v": zeros(TOKENS, 2, 6),
        "block_indices": zeros(TOKENS, 2, 4, dtype=torch.int32),
        "block_size": 8,
    },
    combine: {
        "out_compressed": zeros(TOKENS, 4, 6),
        "out_selected": zeros(TOKENS, 4, 6),
        "out_window": zeros(TOKENS, 4, 6),
        "gates": zeros(TOKENS, 4, 3),
    },
    nsa_attention: {
        "q": zeros(TOKENS, 4, 8),
        "k": zeros(TOKENS, 2, 8),
        "v": zeros(TOKENS, 2, 6),
        "gates": zeros(TOKENS, 4, 3),
        "config": CONFIG,
    },
}
PACKED = [operator for operator in GOOD if operator is not combine]
FLOATS = "float32/bfloat16/float16/float64"


def refuses(operator: Callable[..., Any], message: str, **changes: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        operator(**{"impl": "reference", **GOOD[operator], **changes})


@pytest.mark.parametrize("operator", GOOD)
def test_good_arguments_are_good(operator: Callable[..., Any]):
    operator(**GOOD[operator], impl="reference")


@pytest.mark.parametrize("operator", GOOD)
def test_every_tensor_must_be_a_tensor_of_its_rank_and_dtype(operator: Callable[..., Any]):
    for name, value in GOOD[operator].items():
        if isinstance(value, Tensor):
            refuses(operator, f"{name} must be a tensor ", **{name: value.tolist()})
            refuses(operator, "], got list", **{name: value.tolist()})
            refuses(operator, f"{name} must be ", **{name: value[0]})
            refuses(operator, f"], got {list(value[0].shape)}", **{name: value[0]})
            wrong = torch.int64 if value.dtype == torch.int32 else torch.int32
            message = f"], got {str(wrong).removeprefix('torch.')}: convert it with .to(torch."
            refuses(operator, message, **{name: value.to(wrong)})


@pytest.mark.parametrize("operator", GOOD)
def test_every_tensor_must_be_on_the_same_device(operator: Callable[..., Any]):
    first = next(iter(GOOD[operator]))
    for name, value in GOOD[operator].items():
        if isinstance(value, Tensor) and name != first:
            refuses(
                operator,
                f"{name} must be of the same device as {first} (cpu), got meta: use {name}.to({first}.device)",
                **{name: value.to("meta")},
            )


@pytest.mark.parametrize(
    "operator", [interval_attention, compressed_attention, sliding_window_attention, selected_attention]
)
@pytest.mark.parametrize("side", ["k", "v"])
def test_keys_and_values_must_have_the_dtype_of_the_queries(operator: Callable[..., Any], side: str):
    name = f"{side}_compressed" if operator is compressed_attention else side
    message = f"{name} must be of the same dtype as q (float32), got bfloat16: use {name}.to(q.dtype)"
    refuses(operator, message, **{name: GOOD[operator][name].bfloat16()})


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        (
            compress,
            {"x": zeros(TOKENS, 8)},
            f"x must be {FLOATS} [N, Hk, D], got [40, 8]: pack it as [N, Hk, D] with cu_seqlens, or batch it as ",
        ),
        (compress, {"x": zeros(TOKENS, 2, 0)}, "x must be a tensor [N, Hk, D] with D of at least 1, got [40, 2, 0]"),
        (interval_attention, {"q": zeros(TOKENS, 0, 8)}, "with Hq of at least 1, got [40, 0, 8]"),
        (
            interval_attention,
            {"q": zeros(0, 5, 4, 8)},
            "q must be a tensor [B, S, Hq, Dk] with B of at least 1, got [0, 5, 4, 8]",
        ),
        (interval_attention, {"k": zeros(TOKENS, 0, 8)}, "num_heads must be a multiple of num_kv_heads=0, got 4"),
        (
            interval_attention,
            {"k": zeros(TOKENS, 3, 8)},
            "num_heads must be a multiple of num_kv_heads=3, got 4: every key/value head serves an equal group",
        ),
        (interval_attention, {"k": zeros(TOKENS, 2, 6)}, f"k must be {FLOATS} [N=40, Hk, Dk=8], got [40, 2, 6]"),
        (interval_attention, {"k": zeros(TOKENS + 1, 2, 8)}, f"k must be {FLOATS} [N=40, Hk, Dk=8], got [41, 2, 8]"),
        (interval_attention, {"v": zeros(TOKENS, 4, 8)}, f"v must be {FLOATS} [N=40, Hk=2, Dv], got [40, 4, 8]"),
        (interval_attention, {"interval": Interval(8, 4)}, f"k must be {FLOATS} [M=9, Hk, Dk=8], got [40, 2, 8]"),
        (interval_attention, {"k": zeros(1, TOKENS, 2, 8)}, "got [1, 40, 2, 8]: it needs 3 dimensions, not 4"),
        (interval_attention, {"softmax_scale": "small"}, "softmax_scale must be a number or None, got str"),
        (
            compressed_attention,
            {"k_compressed": zeros(10, 2, 8)},
            f"k_compressed must be {FLOATS} [M=9, Hk, Dk=8], got [10, 2, 8]",
        ),
        (
            compressed_attention,
            {"v_compressed": zeros(9, 1, 8)},
            f"v_compressed must be {FLOATS} [M=9, Hk=2, Dv], got [9, 1, 8]",
        ),
        (sliding_window_attention, {"window_size": 0}, "window_size must be an integer of at least 1, got 0"),
        (sliding_window_attention, {"window_size": 4.0}, "window_size must be an integer of at least 1, got 4.0"),
        (sliding_window_attention, {"window_size": True}, "window_size must be an integer of at least 1, got True"),
        (selected_attention, {"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        (
            selected_attention,
            {"block_indices": zeros(TOKENS, 4, 16, dtype=torch.int32)},
            "block_indices must be int32 [N=40, Hk=2, T], got [40, 4, 16]: one selection per KV head, not per query ",
        ),
        (
            selected_attention,
            {"block_indices": zeros(2, TOKENS, 16, dtype=torch.int32)},
            "block_indices must be int32 [N=40, Hk=2, T], got [2, 40, 16]",
        ),
        (
            selected_attention,
            {"block_indices": zeros(TOKENS, 2, 0, dtype=torch.int32)},
            "block_indices must be of at least one slot T, got [40, 2, 0]: put -1 in what is unused",
        ),
        (select_blocks, {"lse": zeros(TOKENS, 2)}, f"lse must be {FLOATS} [N=40, Hq=4], got [40, 2]"),
        (
            select_blocks,
            {"num_selected_blocks": 2},
            "num_selected_blocks must be at least num_init_blocks + num_local_blocks = 3, got 2",
        ),
        (select_blocks, {"num_selected_blocks": 0}, "num_selected_blocks must be an integer of at least 1, got 0"),
        (select_blocks, {"num_init_blocks": -1}, "num_init_blocks must be an integer of at least 0, got -1"),
        (select_blocks, {"num_local_blocks": -1}, "num_local_blocks must be an integer of at least 0, got -1"),
        (select_blocks, {"block_size": 10}, "block_size must be a multiple of kernel_stride=4, got 10"),
        (select_blocks, {"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        (
            combine,
            {"gates": zeros(TOKENS, 2, 3)},
            f"gates must be {FLOATS} [N=40, Hq=4, branches=3], got [40, 2, 3]: one gate per head and branch, or one ",
        ),
        (combine, {"gates": zeros(TOKENS, 1, 4)}, f"gates must be {FLOATS} [N=40, Hq=1, branches=3], got [40, 1, 4]"),
        (
            combine,
            {"out_selected": zeros(TOKENS, 4, 8)},
            f"out_selected must be {FLOATS} [N=40, Hq=4, Dv=6], got [40, 4, 8]",
        ),
        (
            combine,
            {"out_window": zeros(TOKENS, 4, 6).bfloat16()},
            "out_window must be of the same dtype as out_compressed (float32), got bfloat16",
        ),
        (
            nsa_attention,
            {"k_window": zeros(TOKENS, 2, 6)},
            f"k_window must be {FLOATS} [N=40, Hk, Dk=8], got [40, 2, 6]",
        ),
        (
            nsa_attention,
            {"v_window": zeros(TOKENS, 1, 6)},
            f"v_window must be {FLOATS} [N=40, Hk=2, Dv], got [40, 1, 6]",
        ),
        (
            nsa_attention,
            {"k_compressed": zeros(40, 2, 8)},
            f"k_compressed must be {FLOATS} [M=9, Hk, Dk=8], got [40, 2, 8]",
        ),
        (
            nsa_attention,
            {"k_compressed": zeros(9, 2, 8), "compression_k": Compression()},
            "compression_k must be left out where k_compressed is given, got both: pass one of them",
        ),
        (
            nsa_attention,
            {"v_compressed": zeros(9, 2, 6), "compression_v": Compression()},
            "compression_v must be left out where v_compressed is given, got both: pass one of them",
        ),
    ],
)
def test_refuses(operator: Callable[..., Any], changes: dict[str, Any], message: str):
    refuses(operator, message, **changes)


@pytest.mark.parametrize("operator", [compress, compressed_attention, select_blocks])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel_size": 10}, "kernel_size must be a multiple of kernel_stride=4, got 10"),
        ({"kernel_size": 0}, "kernel_size must be an integer of at least 1, got 0"),
        ({"kernel_stride": 0}, "kernel_stride must be an integer of at least 1, got 0"),
        ({"kernel_stride": 4.0}, "kernel_stride must be an integer of at least 1, got 4.0"),
    ],
)
def test_windows_are_whole_strides(operator: Callable[..., Any], sizes: dict[str, Any], message: str):
    refuses(operator, message, **sizes)


@pytest.mark.parametrize("operator", PACKED)
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            torch.tensor([0, 20, 41], dtype=torch.int32),
            "cu_seqlens must be ending at the number of tokens N=40, got 41",
        ),
        (
            torch.tensor([0, 20, 39], dtype=torch.int32),
            "cu_seqlens must be ending at the number of tokens N=40, got 39",
        ),
        (
            torch.tensor([0, 20, 10, 40], dtype=torch.int32),
            "cu_seqlens must be never decreasing, got 20 then 10 at index 1: build it with SequenceLayout",
        ),
        (
            torch.tensor([1, 40], dtype=torch.int32),
            "cu_seqlens must be a running sum of lengths that starts at 0, got [1, 40]",
        ),
        (torch.tensor([], dtype=torch.int32), "cu_seqlens must be a running sum of lengths that starts at 0, got []"),
        (torch.tensor([3, 4, 5, 6, 7, 8, 40], dtype=torch.int32), "got [3, 4, 5, 6, 7, 8, ...]"),
        (torch.tensor([0, 40]), "cu_seqlens must be int32 [B + 1], got int64: convert it with .to(torch.int32)"),
        (
            torch.tensor([[0, 40]], dtype=torch.int32),
            "cu_seqlens must be int32 [B + 1], got [1, 2]: it needs 1 dimensions, not 2",
        ),
        (torch.tensor([0, 40], dtype=torch.int32, device="meta"), "cu_seqlens must be on the device of "),
        ([0, 40], "cu_seqlens must be an int32 tensor [B + 1], a SequenceLayout or None, got list"),
        (SequenceLayout.from_lengths([41]), "cu_seqlens must be a layout of the N=40 tokens of "),
        (SequenceLayout.from_lengths([40], "meta"), "cu_seqlens must be on the device of "),
    ],
)
def test_bounds(operator: Callable[..., Any], bounds: Any, message: str):
    refuses(operator, message, cu_seqlens=bounds)


@pytest.mark.parametrize("operator", [compress, interval_attention, nsa_attention])
def test_batched_tensors_have_no_bounds(operator: Callable[..., Any]):
    batched = {name: value[None] for name, value in GOOD[operator].items() if isinstance(value, Tensor)}
    operator(**{**GOOD[operator], **batched}, impl="reference")
    first = next(iter(batched))
    message = f"cu_seqlens must be left out for a batched {first} [B, S, ...], got both: pack the batch"
    refuses(operator, message, **batched, cu_seqlens=SequenceLayout.from_lengths([TOKENS]))


LINEAR = {"kind": "linear", "weight": zeros(2, 64, 8)}
MLP = {"kind": "mlp", "weight": zeros(2, 64, 5), "weight_out": zeros(2, 5, 8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "max"}, "kind must be one of mean, linear, mlp, weighted, got 'max'"),
        ({"kind": "linear"}, "weight must be a tensor for kind='linear', got None"),
        ({"kind": "weighted"}, "weight must be a tensor for kind='weighted', got None"),
        ({"kind": "mlp"}, "weight must be a tensor for kind='mlp', got None"),
        ({**MLP, "weight_out": None}, "weight_out must be a tensor for kind='mlp', got None"),
        ({"weight": zeros(2, 8)}, "weight must be left out for kind='mean', got a tensor"),
        ({**LINEAR, "bias": zeros(2, 8)}, "bias must be left out for kind='linear', got a tensor"),
        ({**LINEAR, "weight_out": zeros(2, 8, 8)}, "weight_out must be left out for kind='linear', got a tensor"),
        ({"kind": "weighted", "weight": zeros(2, 9)}, "[Hk=2, l=8], got [2, 9]"),
        ({"kind": "linear", "weight": zeros(1, 64, 8)}, "[Hk=2, l * D=64, D=8], got [1, 64, 8]"),
        ({**MLP, "weight": zeros(2, 60, 5)}, "[Hk=2, l * D=64, E], got [2, 60, 5]"),
        (
            {**MLP, "weight_out": zeros(2, 6, 8)},
            "weight_out must be float32/bfloat16/float16 [Hk=2, E=5, D=8], got [2, 6, 8]",
        ),
        ({**MLP, "bias": zeros(2, 6)}, "bias must be float32/bfloat16/float16 [Hk=2, E=5], got [2, 6]"),
        ({**MLP, "bias_out": zeros(2, 5)}, "bias_out must be float32/bfloat16/float16 [Hk=2, D=8], got [2, 5]"),
        (
            {"position_embedding": zeros(4, 8)},
            "position_embedding must be float32/bfloat16/float16 [l=8, D=8], got [4, 8]",
        ),
        ({**LINEAR, "weight": zeros(2, 64, 8).double()}, "got float64: convert it with .to(torch.float32)"),
        ({**LINEAR, "x": zeros(TOKENS, 2, 8).double()}, "weight must be float64 [Hk=2, l * D=64, D=8], got float32"),
        (
            {**LINEAR, "weight": zeros(2, 64, 8, device="meta")},
            "weight must be of the same device as x (cpu), got meta",
        ),
    ],
)
def test_weights_of_compression(changes: dict[str, Any], message: str):
    refuses(compress, message, **changes)


def test_weights_may_be_wider_than_tokens():
    for x_dtype in (torch.bfloat16, torch.float16, torch.float32):
        for weight_dtype in (torch.bfloat16, torch.float32):
            weights = {name: value.to(weight_dtype) for name, value in MLP.items() if isinstance(value, Tensor)}
            for impl in ("reference", "blockwise"):
                x = zeros(TOKENS, 2, 8, dtype=x_dtype)
                assert compress(x, kind="mlp", **weights, **SIZES, impl=impl).dtype == x_dtype


# Implementations.


@pytest.mark.parametrize("operator", GOOD)
def test_unknown_implementation(operator: Callable[..., Any]):
    refuses(operator, "impl must be one of auto, reference, blockwise, triton, got 'cuda'", impl="cuda")


@pytest.mark.parametrize("operator", GOOD)
def test_triton_does_not_fall_back_to_another_on_the_cpu(operator: Callable[..., Any]):
    refuses(operator, "impl='triton' cannot compute ", impl="triton")
    refuses(operator, "; use impl='auto' for what runs here", impl="triton")


def test_resolve_by_the_table():
    for operator in OPERATORS:
        for dtype in FLOAT_DTYPES:
            assert resolve(operator, "auto", CPU, dtype) is resolve(operator, "blockwise", CPU, dtype)
            function = load(resolve(operator, "reference", CPU, dtype))
            assert function.__module__ == "flash_sparse_attention.impl.reference"
            assert function.__name__ == operator
            assert {"blockwise", "reference"} <= set(available(operator, CPU, dtype))
    with pytest.raises(ValueError, match="impl='reference' cannot compute combine: it does not take int32"):
        resolve("combine", "reference", CPU, torch.int32)


def test_explain_has_a_reason_for_every_row_and_one_choice_for_every_operator():
    decisions = explain(CPU, torch.float32)
    shown = (*OPERATORS, WHOLE, WITH_KVCACHE)
    assert [(d.operator, d.impl) for d in decisions if d.chosen] == [(operator, "blockwise") for operator in shown]
    assert len(decisions) == len([row for row in CAPABILITIES if row.operator not in (*CACHE_WRITES, *FUSED_WRITES)])
    assert all(decision.reason for decision in decisions)
    by_hand = {d.impl: d.reason for d in decisions if d.operator == "combine"}
    assert by_hand["reference"] == "only on request (the specification, dense, memory N x N)"
    refused = {d.impl: d.reason for d in explain(CPU, torch.int32) if d.operator == "combine"}
    assert refused["blockwise"] == "it does not take int32"
    assert not any(decision.chosen for decision in explain(CPU, torch.int32))
