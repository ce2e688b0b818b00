"""Which implementation computes an operator: the capability table, and `resolve`, which reads it.

Implementations are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ..validation import check_choice

OPERATORS = ("compress", "interval_attention", "select_blocks", "selected_attention", "combine")
# All of them in a row, where an implementation has that as one operator; elsewhere they are called one by one.
WHOLE = "nsa_attention"
# The whole attention of new tokens over a cache.
WITH_KVCACHE = "nsa_attention_with_kvcache"
# The writing of a cache, which is nothing for users.
CACHE_WRITES = STORE_ROWS, GATHER_WINDOWS = ("store_rows", "gather_windows")
# What is done by several of them, or by operations of PyTorch, where there is no kernel for it.
FUSED_WRITES = POOL_WINDOWS, PLAN_STEP = ("pool_windows", "plan_step")
IMPLEMENTATIONS = ("reference", "blockwise", "triton")
# Found out here, as torch.compile cannot trace the search.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Capability:
    """One row of the table: an implementation of an operator, and what it takes.

    Attributes:
        operator: name of the public operator.
        impl: name of the implementation.
        module: module of `impl` that holds a function called like the operator.
        devices: device types, or `("any",)`.
        dtypes: dtypes of the inputs.
        auto: whether `impl="auto"` may take it.
        note: what a user should know of it, for the table of `fsa inspect`.
        max_head_dim: the largest head dimension, or None.
        loop_orders: the loop orders of selected attention between which a caller may choose.
        max_reach: how many blocks past its first a compression window may reach, or None; see `geometry.windows_reach`.
        max_slots: the largest number of blocks that a query may keep, or None.
        backward_only: whether it has derivatives for the backward pass alone, and none of forward mode (`jvp`).
    """

    operator: str
    impl: str
    module: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    auto: bool
    note: str
    max_head_dim: int | None = None
    loop_orders: tuple[str, ...] = ()
    max_reach: int | None = None
    max_slots: int | None = None
    backward_only: bool = False

    def refusal(
        self, device: torch.device, dtype: torch.dtype, head_dim: int = 0, reach: int = 0, slots: int = 0
    ) -> str | None:
        """Why this implementation cannot run here, or None if it can."""
        # Triton's interpreter runs its kernels on CPU tensors, for tests.
        devices = (*self.devices, "cpu") if self.impl == "triton" and interpreting() else self.devices
        if "any" not in devices and device.type not in devices:
            return f"it runs on {', '.join(devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"it does not take {str(dtype).removeprefix('torch.')}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"it takes head dimensions up to {self.max_head_dim}, not {head_dim}"
        if self.max_reach is not None and reach > self.max_reach:
            return "it takes compression windows of at most block_size + kernel_stride tokens"
        if self.max_slots is not None and slots > self.max_slots:
            return f"it keeps up to {self.max_slots} blocks a query, not {slots}"
        if self.impl == "triton" and not _HAS_TRITON:
            return "it needs Triton, which is not installed (pip install 'flash-sparse-attention[triton]')"
        return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# In order of preference: `auto` takes the first row of an operator that is not refused.
CAPABILITIES: tuple[Capability, ...] = (
    *(
        Capability(
            op,
            "triton",
            "triton",
            ("cuda",),
            (torch.float16, torch.bfloat16, torch.float32),
            True,
            note,
            max_head_dim=256,
            loop_orders=loop_orders,
            max_reach=1 if op in ("select_blocks", WHOLE) else None,
            max_slots=256 if op in ("select_blocks", WHOLE) else None,
            backward_only=op != "select_blocks",
        )
        for op, note, loop_orders in (
            ("compress", "Triton kernels", ()),
            ("interval_attention", "Triton kernels", ()),
            ("select_blocks", "Triton kernels", ()),
            ("selected_attention", "Triton kernels in both loop orders", ("kv_outer", "query_outer")),
            ("combine", "a Triton kernel", ()),
            (
                WHOLE,
                "all of the above as one operator; not taken, they are called one by one",
                ("kv_outer", "query_outer"),
            ),
        )
    ),
    Capability(
        WITH_KVCACHE,
        "triton",
        "triton",
        ("cuda",),
        (torch.float16, torch.bfloat16, torch.float32),
        True,
        "four Triton kernels, whose launches fit every length",
        max_head_dim=256,
        max_reach=1,
        max_slots=256,
    ),
    *(
        Capability(op, "triton", "triton", ("cuda",), _FLOATS, True, "a Triton kernel")
        for op in (*CACHE_WRITES, *FUSED_WRITES)
    ),
    *(
        Capability(
            op,
            "blockwise",
            "blockwise",
            ("any",),
            _FLOATS,
            True,
            "PyTorch in blocks, memory linear in N",
            loop_orders=("kv_outer",) if op in ("selected_attention", WHOLE) else (),
            backward_only=op in ("interval_attention", "selected_attention", "combine", WHOLE),
        )
        for op in (*OPERATORS, WHOLE, WITH_KVCACHE, *CACHE_WRITES)
    ),
    *(
        Capability(op, "reference", "reference", ("any",), _FLOATS, False, "the specification, dense, memory N x N")
        for op in (*OPERATORS, WITH_KVCACHE)
    ),
)


@dataclass(frozen=True)
class Decision:
    """A row of `explain`: what became of one implementation of one operator.

    Attributes:
        operator: name of the public operator.
        impl: name of the implementation.
        chosen: whether `impl="auto"` takes it for this device and dtype.
        reason: why, or why not.
    """

    operator: str
    impl: str
    chosen: bool
    reason: str


def resolve(
    operator: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 0,
    reach: int = 0,
    slots: int = 0,
) -> Capability:
    """The row of the table that computes `operator`; an explicit `impl` never falls back to another.

    Raises:
        ValueError: if `impl` is unknown, or cannot run this operator on this device and dtype, with these sizes.
    """
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    rows = [row for row in CAPABILITIES if row.operator == operator and impl in ("auto", row.impl)]
    candidates = [row for row in rows if row.auto or impl != "auto"]
    for row in candidates:
        if row.refusal(device, dtype, head_dim, reach, slots) is None:
            return row
    refusals = [str(row.refusal(device, dtype, head_dim, reach, slots)) for row in candidates]
    reasons = "; ".join(refusals) or "this version does not have it"
    raise ValueError(f"impl={impl!r} cannot compute {operator}: {reasons}; use impl='auto' for what runs here")


def load(row: Capability) -> Callable[..., Any]:
    """The function of a row, whose module is imported when it is first used."""
    return getattr(_load(row.module), row.operator)


def _load(module: str) -> ModuleType:
    """The module of `impl` that is called so."""
    # Import statements, as torch.compile traces them, and stops at importlib.
    if module == "blockwise":
        from . import blockwise

        return blockwise
    if module == "reference":
        from . import reference

        return reference
    if module == "triton":
        from . import triton

        return triton
    return importlib.import_module(f".{module}", __package__)


def explain(device: torch.device, dtype: torch.dtype) -> list[Decision]:
    """What `impl="auto"` takes on this device and dtype for each operator and for the whole, and why not the others."""
    decisions = []
    for operator in (*OPERATORS, WHOLE, WITH_KVCACHE):
        taken = False
        for row in (row for row in CAPABILITIES if row.operator == operator):
            refusal = row.refusal(device, dtype)
            chosen = row.auto and refusal is None and not taken
            if refusal is None and not row.auto:
                reason = f"only on request ({row.note})"
            else:
                reason = refusal or (row.note if chosen else "a row above is preferred")
            decisions.append(Decision(operator, row.impl, chosen, reason))
            taken = taken or chosen
    return decisions


def available(
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 0,
    reach: int = 0,
    slots: int = 0,
) -> list[str]:
    """Names of the implementations that can run `operator` on this device and dtype, with these sizes."""
    rows = (row for row in CAPABILITIES if row.operator == operator)
    return [row.impl for row in rows if row.refusal(device, dtype, head_dim, reach, slots) is None]
