"""What others offer for the same: PyTorch's attention, and libraries if they are installed.

A baseline takes q, k and v `[N, H, D]` of one sequence and says by `Refusal` what it cannot do, so that a report tells
why a number is not there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Refusal
from .machine import installed
from .shapes import Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Baseline:
    """Somebody else's attention.

    Attributes:
        name: short, as in reports.
        distribution: whose version is reported.
        make: the attention for a shape; raises `Refusal`.
        compiles: whether it is compiled anew for every shape, which takes long.
    """

    name: str
    distribution: str
    make: Callable[[Shape], Attention]
    compiles: bool = False

    @property
    def version(self) -> str | None:
        """Of its distribution; None if that is not installed."""
        if self.distribution == "torch":
            return torch.__version__
        return installed(self.distribution)


def full_attention(device: torch.device) -> list[Baseline]:
    """Causal attention to all keys."""
    if device.type != "cuda":
        return [Baseline("sdpa", "torch", lambda shape: functools.partial(_sdpa, backend=None))]
    return [
        Baseline("cudnn", "torch", lambda shape: functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)),
        Baseline("flash", "torch", lambda shape: functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)),
        Baseline("flex", "torch", functools.partial(_flex, window_size=None), compiles=True),
        *_flash_attention_packages(None),
    ]


def sliding_windows(shape: Shape, device: torch.device) -> list[Baseline]:
    """Causal attention to the newest keys."""
    if device.type != "cuda":
        return []
    size = shape.nsa.window_size
    return [
        Baseline("flex", "torch", functools.partial(_flex, window_size=size), compiles=True),
        Baseline("varlen", "torch", functools.partial(_varlen, window_size=size)),
        *_flash_attention_packages(size),
    ]


def selected_by_fla(block_indices: Tensor, block_size: int) -> Baseline:
    """Selected attention of flash-linear-attention, which loops over queries."""

    def make(shape: Shape) -> Attention:
        parallel_nsa = _fla(shape)
        chosen = block_indices.long()[None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            options = {"block_indices": chosen, "block_counts": chosen.shape[-1], "block_size": block_size}
            return parallel_nsa(q[None], k[None], v[None], **options)[0]

        return attend

    return Baseline("flash-linear-attention", "flash-linear-attention", make)


def whole_by_fla(shape: Shape) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Compressed and selected branch of flash-linear-attention, gated; its window needs flash-attn.

    Its compressed tokens are means of whole blocks, which the preset `fla` of `NSAConfig` has as well.
    """
    parallel_nsa = _fla(shape)
    window = shape.nsa.window_size if has_flash_attn() else 0

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        options = {"block_counts": shape.nsa.num_selected_blocks, "block_size": shape.nsa.block_size}
        opened = gates.sigmoid().unbind(-1)
        batch = (x[None] for x in (q, k, v, *opened))
        return parallel_nsa(*batch, window_size=window, **options)[0]

    return attend


def has_flash_attn() -> bool:
    """Whether flash-attn is there, which flash-linear-attention takes for its windows."""
    return _importable("flash_attn")


def versions(device: torch.device, shape: Shape) -> dict[str, str]:
    """Names and versions of the baselines that are there."""
    found = [*full_attention(device), *sliding_windows(shape, device)]
    names = {one.name: one.version for one in found}
    names["flash-linear-attention"] = installed("flash-linear-attention")
    return {name: version for name, version in names.items() if version is not None}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).squeeze(0)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    # Its backward pass is run more than once. Past a limit of shapes it would not be compiled any more.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 16
    return torch.compile(flex_attention, dynamic=False)


def _flex(shape: Shape, window_size: int | None) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        return causal if window_size is None else causal & (query - key < window_size)

    masks: dict[torch.device, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device not in masks:
            masks[q.device] = create_block_mask(visible, None, None, len(q), len(k), device=str(q.device))
        batch = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        return _compiled_flex()(*batch, block_mask=masks[q.device], enable_gqa=True).transpose(1, 2).squeeze(0)

    return attend


def _varlen(shape: Shape, window_size: int) -> Attention:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Refusal(f"torch {torch.__version__} has no varlen_attn") from error

    # torch 2.11 has it without the last option.
    options: dict[str, Any] = {"window_size": (window_size - 1, 0), "enable_gqa": True}
    bounds = functools.cache(lambda device: torch.tensor([0, shape.tokens], dtype=torch.int32, device=device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        both = bounds(q.device)
        try:
            out: Any = varlen_attn(q, k, v, both, both, len(q), len(k), **options)
        except TypeError as error:
            raise Refusal(f"varlen_attn of torch {torch.__version__}: {error}") from error
        return out

    return attend


def _flash_attention_packages(window_size: int | None) -> list[Baseline]:
    """FlashAttention 2, 3 and 4 by their own packages, where they are installed."""
    window = (-1, -1) if window_size is None else (window_size - 1, 0)

    def make(shape: Shape, module: str) -> Attention:
        function = importlib.import_module(module).flash_attn_func

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            sizes = {"window_size": (window_size - 1, 0) if window_size else (None, None)}
            options = sizes if module == "flash_attn.cute" else {"window_size": window}
            out = function(q[None], k[None], v[None], causal=True, **options)
            return (out[0] if isinstance(out, tuple) else out).squeeze(0)

        return attend

    packages = (
        ("flash-attn", "flash_attn", "flash-attn"),
        ("flash-attn-3", "flash_attn_interface", "flash-attn-3"),
        ("flash-attn-4", "flash_attn.cute", "flash-attn-4"),
    )
    return [
        Baseline(name, distribution, functools.partial(make, module=module))
        for name, module, distribution in packages
        if _importable(module)
    ]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _fla(shape: Shape) -> Callable[..., Tensor]:
    if not _importable("fla.ops.nsa"):
        raise Refusal("not installed: pip install flash-sparse-attention[bench]")
    group = shape.group
    if group < 16 or group & (group - 1):
        raise Refusal(f"needs 16, 32, ... query heads for each key/value head, not {group}")
    return importlib.import_module("fla.ops.nsa").parallel_nsa
