"""`Compressor`: the learned part of `functional.compress`, and how it starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import compression_kinds
from ..functional import CuSeqlens, compress
from ..types import Compression
from ..validation import bad, check_choice, check_multiple, check_positive

# At the start, a compressed token is the mean of its window plus noise; this is the ratio of their standard deviations
# where the tokens of a window are independent, and it is smaller where they resemble each other.
_NOISE = 0.1
_POSITION_STD = 0.02


class Compressor(nn.Module):
    """Summarises windows of keys or values with learned weights, `[N, Hk, D]` -> `[M, Hk, D]`. NSA equation 7.

    Every kind starts near the mean of the window. Pooling is what a model can use without training: a compressed key
    then scores like the keys it stands for, so that selection finds their blocks from the first step. That holds for a
    model trained from scratch, and for a pretrained one that is converted and whose keys already mean something.

    Args:
        kind: `mean`, without weights; `linear`, one matrix a head; `mlp`, two layers a head with 2 D units between;
            `weighted`, a softmax weight a head for each position of the window.
        num_kv_heads: Hk.
        head_dim: D, of the keys or values that are compressed.
        kernel_size: l, tokens of a window.
        kernel_stride: d, tokens between windows; divides l.
        position_embedding: whether a learned `[l, D]` is added to the tokens of each window first.
        impl: implementation of `functional.compress`.
        device: of the parameters.
        dtype: of the parameters; `forward` computes in the dtype of its input, as autocast does.

    Raises:
        ValueError: for a size that is no positive integer, an unknown `kind`, or a `kernel_size` that is no multiple of
            `kernel_stride`.

    Example:
        >>> import torch
        >>> compressor = Compressor("linear", num_kv_heads=2, head_dim=16, kernel_size=8, kernel_stride=4)
        >>> compressor(torch.randn(20, 2, 16)).shape
        torch.Size([4, 2, 16])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    weight_out: nn.Parameter | None
    bias_out: nn.Parameter | None
    logits: nn.Parameter | None
    position_embedding: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        position_embedding: bool = False,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, compression_kinds())
        self.kind = kind
        self.num_kv_heads = check_positive("num_kv_heads", num_kv_heads)
        self.head_dim = check_positive("head_dim", head_dim)
        self.kernel_size = check_positive("kernel_size", kernel_size)
        self.kernel_stride = check_positive("kernel_stride", kernel_stride)
        check_multiple("kernel_size", kernel_size, "kernel_stride", kernel_stride)
        self.impl = impl

        flat, hidden = kernel_size * head_dim, 2 * head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if kind == "linear":
            shapes = {"weight": (num_kv_heads, flat, head_dim)}
        elif kind == "mlp":
            shapes = {
                "weight": (num_kv_heads, flat, hidden),
                "bias": (num_kv_heads, hidden),
                "weight_out": (num_kv_heads, hidden, head_dim),
                "bias_out": (num_kv_heads, head_dim),
            }
        elif kind == "weighted":
            shapes = {"logits": (num_kv_heads, kernel_size)}
        if position_embedding:
            shapes["position_embedding"] = (kernel_size, head_dim)
        for name in ("weight", "bias", "weight_out", "bias_out", "logits", "position_embedding"):
            shape = shapes.get(name)
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills the parameters with their start: about the mean of the window, for every kind.

        `weighted` has equal logits, which is the mean itself. `linear` has 1 / l times the identity for each position
        of the window, plus noise. `mlp` has that and its negative side by side as its first layer and their difference
        as its second, since gelu(z) - gelu(-z) = z: the mean again, through both layers, with every unit in use. The
        noise makes heads and mirrored units differ. Position embeddings are small: normal, standard deviation 0.02.
        """
        l, D = self.kernel_size, self.head_dim
        if self.weight is not None:
            # For tokens of variance 1, l * D products with this noise have variance _NOISE^2 / l; the mean has 1 / l.
            nn.init.normal_(self.weight, std=_NOISE / (l * D**0.5))
            # [Hk, l, D, signs, D]: the diagonal that maps each channel to itself.
            channels = self.weight.view(self.num_kv_heads, l, D, -1, D).diagonal(dim1=2, dim2=4)
            channels[:, :, 0] += 1 / l
            if self.kind == "mlp":
                channels[:, :, 1] -= 1 / l
        if self.weight_out is not None:
            nn.init.normal_(self.weight_out, std=_NOISE / D**0.5)
            channels = self.weight_out.view(self.num_kv_heads, 2, D, D).diagonal(dim1=2, dim2=3)
            channels[:, 0] += 1
            channels[:, 1] -= 1
        for zeros in (self.bias, self.bias_out, self.logits):
            if zeros is not None:
                nn.init.zeros_(zeros)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=_POSITION_STD)

    def compression(self, dtype: torch.dtype | None = None) -> Compression:
        """The weights as the operators take them, differentiable, in `dtype` (as they are by default).

        Example:
            >>> Compressor("weighted", 1, 8, kernel_size=4, kernel_stride=4).compression().weight
            tensor([[0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<SoftmaxBackward0>)
        """
        weight = self.weight if self.logits is None else self.logits.softmax(-1)
        weights = (weight, self.bias, self.weight_out, self.bias_out, self.position_embedding)
        return Compression(self.kind, *(w if w is None or dtype is None else w.to(dtype) for w in weights))

    def forward(self, x: Tensor, cu_seqlens: CuSeqlens = None) -> Tensor:
        """The compressed tokens of `x`.

        Args:
            x: keys or values `[N, Hk, D]`, or `[B, S, Hk, D]` without `cu_seqlens`; any floating dtype.
            cu_seqlens: bounds of the packed sequences, int32 `[B + 1]`, or a `SequenceLayout`; None for one sequence.

        Returns:
            `[M, Hk, D]` or `[B, S', Hk, D]` in the dtype of `x`, as `functional.compress`.

        Raises:
            ValueError: if the heads or channels of `x` are not those of the module, or `cu_seqlens` does not fit.
        """
        if isinstance(x, Tensor) and x.shape[-2:] != (self.num_kv_heads, self.head_dim):
            raise bad("x", f"[..., Hk={self.num_kv_heads}, D={self.head_dim}]", list(x.shape))
        return compress(
            x,
            **self.compression(x.dtype)._asdict(),
            kernel_size=self.kernel_size,
            kernel_stride=self.kernel_stride,
            cu_seqlens=cu_seqlens,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.kind}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"kernel_stride={self.kernel_stride}, position_embedding={self.position_embedding is not None}"
        )
