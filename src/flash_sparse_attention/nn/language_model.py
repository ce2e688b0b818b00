"""`LanguageModel`: a decoder in the manner of Llama, with sparse or full attention and all else equal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..cache import LayerCache, NSACache
from ..config import NSAConfig
from ..functional import CuSeqlens
from ..types import SequenceLayout
from ..validation import bad, check_choice, check_positive, check_tensor
from .attention import NativeSparseAttention, check_attention
from .causal_attention import CausalAttention

AttentionKind = Literal["nsa", "full"]

_INIT_STD = 0.02


@dataclass(frozen=True)
class LanguageModelConfig:
    """Hyper-parameters of `LanguageModel`.

    Attributes:
        vocab_size: tokens that the model knows; 256 for bytes.
        hidden_size: channels of the hidden states.
        intermediate_size: channels inside the SwiGLU.
        num_layers: blocks.
        num_heads: query heads; a multiple of num_kv_heads.
        num_kv_heads: key/value heads.
        head_dim: channels of a head; even where there is rotary embedding.
        rope_theta: base of the rotary frequencies; None for no rotary embedding.
        norm_eps: epsilon of the RMS norms.
        tie_embeddings: whether the output layer is the token embedding.
        attention: `nsa` or `full`.
        nsa: of the sparse attention; ignored for `full`.

    Raises:
        ValueError: on construction, for a value of a wrong type or range, or heads that do not divide.

    Example:
        >>> config = LanguageModelConfig(num_layers=2, nsa=NSAConfig.preset("fsa"))
        >>> LanguageModelConfig.from_dict(config.to_dict()) == config
        True
    """

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float | None = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention: AttentionKind = "nsa"
    nsa: NSAConfig = field(default_factory=NSAConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "intermediate_size", "num_layers"):
            check_positive(name, getattr(self, name))
        check_attention(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.rope_theta
        )
        if isinstance(self.norm_eps, bool) or not isinstance(self.norm_eps, (int, float)) or not 0 < self.norm_eps < 1:
            raise bad("norm_eps", "a number between 0 and 1", repr(self.norm_eps))
        if not isinstance(self.tie_embeddings, bool):
            raise bad("tie_embeddings", "True or False", repr(self.tie_embeddings))
        check_choice("attention", self.attention, get_args(AttentionKind))
        if not isinstance(self.nsa, NSAConfig):
            raise bad("nsa", "an NSAConfig", type(self.nsa).__name__, "NSAConfig.from_dict makes one from a dictionary")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LanguageModelConfig:
        """The configuration with these values, `nsa` as a dictionary or an `NSAConfig`; unknown names are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"LanguageModelConfig has no field {', '.join(map(repr, unknown))}: "
                f"known fields are {', '.join(sorted(known))}"
            )
        nsa = values.get("nsa")
        return cls(**{**values, "nsa": NSAConfig.from_dict(nsa)} if isinstance(nsa, dict) else values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, of types that JSON knows; `nsa` is a dictionary too."""
        return dataclasses.asdict(self)


class LanguageModel(nn.Module):
    """Decoder-only language model: embedding, blocks of attention and SwiGLU behind RMS norms, output layer.

    Parameters have the names of Llama in `transformers`, without the leading `model.`; what differs between
    `attention="nsa"` and `"full"` is in `layers.*.self_attn` alone. Both start alike, see `reset_parameters`.

    Args:
        config: sizes, and the kind of attention.
        impl: implementation of the operators of sparse attention.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        gradient_checkpointing: whether, in training, a block keeps only its input and is computed again in the backward
            pass: less memory for about a third more time. False at the start.

    Example:
        >>> import torch
        >>> model = LanguageModel(LanguageModelConfig(num_layers=1, attention="full"))
        >>> model(torch.randint(256, (2, 50))).shape
        torch.Size([2, 50, 256])
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        impl: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(DecoderLayer(config, impl, **factory) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **factory)
        # A tied head has no module of its own: a tensor with two names cannot be saved by safetensors.
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False, **factory)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills all parameters with their start, the same for sparse and full attention.

        Linear layers and embeddings are normal with standard deviation 0.02. What writes into the residual stream
        (`o_proj`, `down_proj`) is divided by sqrt(2 * num_layers), so that the stream does not grow with depth, as in
        GPT-2. Norms start at 1, biases at 0. What only sparse attention has starts as `Compressor` and
        `NativeSparseAttention.reset_gates` say.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=_INIT_STD)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        residual_std = _INIT_STD / math.sqrt(2 * self.config.num_layers)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            nn.init.normal_(layer.self_attn.o_proj.weight, std=residual_std)
            nn.init.normal_(layer.mlp.down_proj.weight, std=residual_std)
            if isinstance(layer.self_attn, NativeSparseAttention):
                layer.self_attn.reset_gates()
                layer.self_attn.compressor_k.reset_parameters()
                layer.self_attn.compressor_v.reset_parameters()

    def new_cache(self, batch: int, capacity: int | None = None, **options: Any) -> NSACache:
        """An empty cache for this model; see `NativeSparseAttention.new_cache`.

        Raises:
            ValueError: if the attention is not sparse.
        """
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        if not isinstance(layer.self_attn, NativeSparseAttention):
            raise bad("attention", "'nsa' to have a cache", repr(self.config.attention))
        return layer.self_attn.new_cache(batch, capacity, num_layers=self.config.num_layers, **options)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: CuSeqlens = None,
        cache: NSACache | None = None,
        *,
        last_logits: bool = False,
    ) -> Tensor:
        """The logits of the token that follows each token.

        Args:
            tokens: int64, packed `[N]` or batched `[B, S]`, from 0 up to vocab_size - 1.
            cu_seqlens: bounds of the packed sequences, int32 `[B + 1]`, or a `SequenceLayout`; None for one sequence,
                and for a batch.
            cache: what holds the tokens before these, of as many sequences, and will hold these as well; see
                `new_cache`. If anything fails, it is as it was. No gradients.
            last_logits: whether only the logits behind the last token of each sequence are wanted.

        Returns:
            Logits `[N, vocab_size]` or `[B, S, vocab_size]`, in the dtype of the parameters or of autocast: take the
            loss of `logits.float()`. With `last_logits`, `[B, vocab_size]`.

        Raises:
            ValueError: for arguments of a wrong shape or dtype, `cu_seqlens` with a batch, an empty sequence with
                `last_logits`, or a cache that does not fit or is full.
        """
        batched = isinstance(tokens, Tensor) and tokens.dim() == 2
        token_dims: dict[str, int | None] = {"B": None, "S": None} if batched else {"N": None}
        check_tensor(
            "tokens", tokens, token_dims, (torch.int64,), "pack them as [N] with cu_seqlens, or batch as [B, S]"
        )
        # Made once for all layers; a tensor of bounds would be copied to the host by each of them.
        layout = SequenceLayout.of("tokens", tokens, batched, cu_seqlens)
        if last_logits and 0 in layout.lengths:
            raise bad("tokens", "at least one in each sequence with last_logits", list(layout.lengths))
        if cache is not None:
            if not isinstance(cache, NSACache):
                raise bad("cache", "an NSACache or None", type(cache).__name__, "new_cache makes one")
            if len(cache.layers) != len(self.layers):
                raise bad("cache", f"made for num_layers={len(self.layers)}", len(cache.layers))
            with torch.no_grad(), cache.extend(layout):
                hidden = self.embed_tokens(tokens.flatten())
                for layer, kept in zip(self.layers, cache.layers, strict=True):
                    hidden = layer(hidden, layout, None, kept)
                return self._logits(hidden, layout, tokens, last_logits)
        hidden, positions = self.embed_tokens(tokens.flatten()), layout.positions()
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, layout, positions, use_reentrant=False)
            else:
                hidden = layer(hidden, layout, positions)
        return self._logits(hidden, layout, tokens, last_logits)

    def _logits(self, hidden: Tensor, layout: SequenceLayout, tokens: Tensor, last_logits: bool) -> Tensor:
        """The output layer, behind all tokens or the last of each sequence."""
        if last_logits:
            hidden = hidden[layout.cu_seqlens[1:].long() - 1]
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = F.linear(self.norm(hidden), head.weight)
        return logits if last_logits else logits.view(*tokens.shape, self.config.vocab_size)

    def num_parameters(self) -> int:
        """Numbers that are trained; tied embeddings count once.

        Example:
            >>> config = LanguageModelConfig(vocab_size=10, hidden_size=4, num_layers=1, attention="full")
            >>> LanguageModel(config).num_parameters() == 10 * 4 + 4 * 32 * (8 + 2 + 2 + 8) + 3 * 4 * 704 + 3 * 4
            True
        """
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


class DecoderLayer(nn.Module):
    """A block: attention and SwiGLU, each behind an RMS norm and beside a residual, `[N, hidden_size]` in and out."""

    def __init__(
        self,
        config: LanguageModelConfig,
        impl: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta")
        }
        self.self_attn: NativeSparseAttention | CausalAttention
        if config.attention == "nsa":
            self.self_attn = NativeSparseAttention(**sizes, config=config.nsa, impl=impl, **factory)
        else:
            self.self_attn = CausalAttention(**sizes, **factory)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, **factory)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **factory)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps, **factory)

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, positions: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """The block applied to the tokens of `layout`, which stand at these positions, or extend a cache."""
        kept = {} if cache is None else {"cache": cache}
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), layout, positions, **kept)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), `[..., hidden_size]` in and out."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The transformed `x`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
