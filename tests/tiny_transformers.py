"""Random models of transformers, small enough that a forward pass takes milliseconds, and their conversion."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.integrations.transformers import conversion_config, convert

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 97
# Texts of some tens of tokens have blocks to choose from, and windows that do not reach back to the start.
SIZES: dict[str, Any] = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "block_size": 4,
    "num_selected_blocks": 4,
    "window_size": 5,
}
# Window and selection cover texts of up to 32 tokens.
COVERING = {**SIZES, "num_selected_blocks": 8, "window_size": 32}
# The compressed branch has hardly any weight, and the other two are full attention on covered texts.
WITHOUT_COMPRESSED = (1e-6, 0.5, 0.5 - 1e-6)


def base_config(architecture: str, **changes: Any) -> Any:
    """Three layers, two query heads for each of two key/value heads, head_dim * heads != hidden_size."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    if architecture == "llama":
        del sizes["sliding_window"]
    return transformers.AutoConfig.for_model(architecture, **sizes | changes)


def base_model(architecture: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model with full attention and random weights, larger than at the start of training, so that texts matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(base_config(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if "bias" in name else 0.2))
            if "norm" in name:
                parameter.add_(1)
        # Never the likeliest token: `generate` would take it for padding in the next turn.
        model.get_output_embeddings().weight[0] = 0
    return model.to(dtype)


def sparse_model(
    architecture: str = "llama",
    nsa: NSAConfig | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    shaken: bool = True,
    layers: list[int] | None = None,
    **changes: Any,
) -> Any:
    """A converted model whose selection does not cover a text; `shaken`, since gates start alike for all tokens."""
    nsa = conversion_config(**SIZES) if nsa is None else nsa
    model = convert(base_model(architecture, dtype, **changes), nsa, layers=layers, gates=(0.3, 0.4, 0.3))
    if shaken:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "branch_gate_proj" in name or "compressor" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random tokens without the one for padding, `[rows, columns]`."""
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float64."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
