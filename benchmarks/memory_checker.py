"""Both passes of selected attention with entries of any content, and of the whole attention, for CUDA's memory checker.

    compute-sanitizer --tool memcheck python benchmarks/memory_checker.py

Small shapes, as the checker is slow; on Hopper they take its kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_sparse_attention import NSAConfig, SequenceLayout, nsa_attention, selected_attention


def draw(tokens: int, *sizes: tuple[int, int]) -> list[Tensor]:
    """Normal random numbers `[tokens, heads, channels]` that want gradients."""
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(tokens, *size, **options) for size in sizes]


def any_entries(tokens: int, heads: int, slots: int) -> Tensor:
    """A selection of which half of the queries have any integers, and the others blocks that exist or nearly do."""
    entries = torch.randint(-(2**31), 2**31 - 1, (tokens, heads, slots), device="cuda", dtype=torch.int64).int()
    entries[::2] = torch.randint(-3, 40, entries[::2].shape, device="cuda").int()
    entries[..., 0] = 0
    return entries


def main() -> None:
    """Runs all of it once."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    torch.manual_seed(0)
    layout = SequenceLayout.from_lengths([333, 0, 1, 766], "cuda")
    for block_size, slots, dim in ((64, 16, 128), (128, 8, 64), (128, 8, 128)):
        q, k, v = draw(1100, (8, dim), (2, dim), (2, dim))
        entries = any_entries(1100, 2, slots)
        options = {"block_size": block_size, "cu_seqlens": layout, "workspace_mib": 4}
        out = selected_attention(q, k, v, entries, **options, impl="triton").out
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
    # Block scores of the last two have a kernel of their own, with one head in a product and with two.
    for heads, kv_heads in ((8, 2), (10, 2), (16, 1)):
        q, k, v, gates = draw(9000, (heads, 128), (kv_heads, 128), (kv_heads, 128), (heads, 3))
        out = nsa_attention(q, k, v, gates, NSAConfig(), impl="triton").out
        torch.autograd.grad(out.float().square().sum(), (q, k, v, gates))
    torch.cuda.synchronize()
    print("ran to the end")


if __name__ == "__main__":
    main()
