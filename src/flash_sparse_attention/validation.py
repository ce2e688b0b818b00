"""Checks of what users pass in, with one wording: the argument, what was expected, what came, the cure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bad(argument: str, expected: str, got: object, cure: str = "") -> ValueError:
    """The error for an argument: `ARGUMENT must be EXPECTED, got GOT: CURE`."""
    return ValueError(f"{argument} must be {expected}, got {got}" + (f": {cure}" if cure else ""))


def check_tensor(
    argument: str,
    value: object,
    shape: dict[str, int | None],
    dtypes: Iterable[torch.dtype],
    cure: str = "",
) -> Tensor:
    """`value` as a tensor of one of `dtypes` whose dimensions are those of `shape` (name -> size, None for any)."""
    dtypes = tuple(dtypes)
    # Texts are made for errors alone: `torch.compile` takes a size that is written into one as fixed.
    if not isinstance(value, Tensor):
        raise bad(argument, f"a tensor {_wanted(shape, dtypes)}", type(value).__name__)
    if value.dim() != len(shape):
        cure = cure or f"it needs {len(shape)} dimensions, not {value.dim()}"
        raise bad(argument, _wanted(shape, dtypes), list(value.shape), cure)
    if any(size is not None and size != have for size, have in zip(shape.values(), value.shape, strict=True)):
        raise bad(argument, _wanted(shape, dtypes), list(value.shape), cure)
    if value.dtype not in dtypes:
        raise bad(argument, _wanted(shape, dtypes), _name(value.dtype), f"convert it with .to({dtypes[0]})")
    return value


def check_same(attribute: str, **tensors: Tensor) -> None:
    """All tensors agree in `attribute` (`dtype` or `device`)."""
    (first, reference), *rest = tensors.items()
    for name, tensor in rest:
        if getattr(tensor, attribute) != getattr(reference, attribute):
            wanted = str(getattr(reference, attribute)).removeprefix("torch.")
            got = str(getattr(tensor, attribute)).removeprefix("torch.")
            raise bad(
                name, f"of the same {attribute} as {first} ({wanted})", got, f"use {name}.to({first}.{attribute})"
            )


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Query heads are a multiple of key/value heads."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise bad(
            "num_heads",
            f"a multiple of num_kv_heads={num_kv_heads}",
            num_heads,
            "every key/value head serves an equal group of query heads",
        )


def check_positive(argument: str, value: object, minimum: int = 1) -> int:
    """`value` as an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise bad(argument, f"an integer of at least {minimum}", repr(value))
    return value


def check_multiple(argument: str, value: int, divisor_name: str, divisor: int) -> None:
    """`value` is a multiple of `divisor`."""
    if value % divisor:
        raise bad(argument, f"a multiple of {divisor_name}={divisor}", value)


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """`value` is one of `choices`."""
    if value not in (choices := tuple(choices)):
        raise bad(argument, f"one of {', '.join(choices)}", repr(value))


def check_cu_seqlens(cu_seqlens: object, total_tokens: int | None) -> list[int]:
    """The bounds on the host. Copies them from the device, which waits for it."""
    cure = "build it with SequenceLayout.from_lengths(lengths)"
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, {"B + 1": None}, (torch.int32,))
    bounds: list[int] = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0:
        raise bad("cu_seqlens", "a running sum of lengths that starts at 0", f"{_excerpt(bounds)}", cure)
    for index, (low, high) in enumerate(pairwise(bounds)):
        if high < low:
            raise bad("cu_seqlens", "never decreasing", f"{low} then {high} at index {index}", cure)
    if total_tokens is not None and bounds[-1] != total_tokens:
        raise bad("cu_seqlens", f"ending at the number of tokens N={total_tokens}", bounds[-1], cure)
    return bounds


def _wanted(shape: dict[str, int | None], dtypes: tuple[torch.dtype, ...]) -> str:
    sizes = ", ".join(name if size is None else f"{name}={size}" for name, size in shape.items())
    return f"{_names(dtypes)} [{sizes}]"


def _excerpt(values: list[int]) -> str:
    return str(values) if len(values) <= 6 else f"[{', '.join(map(str, values[:6]))}, ...]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "/".join(map(_name, dtypes))
