"""`NSAAttention`: `nn.NativeSparseAttention` in the place of a transformers model's attention."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...config import NSAConfig
from ...functional import sliding_window_attention
from ...nn import NativeSparseAttention
from ...nn.attention import BranchGate
from ...nn.causal_attention import causal_attention
from ...nn.rotary import rotate
from ...precision import no_autocast
from ...validation import bad
from .inputs import SparseInputs

if TYPE_CHECKING:
    from .matching import Matching

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# What Gemma 2 does to scores hardly shows in small ones.
_SCORE_CHANGES = ("attn_logit_softcapping",)


class NSAAttention(NativeSparseAttention):
    """Sparse attention with the projections, and the norms of queries and keys, of a full attention.

    Parameters keep the names of the full attention; `branch_gate_proj`, `compressor_k` and `compressor_v` are new. With
    independent keys and values of the branches, `k_proj` and `v_proj` hold the original ones three times at the start.

    Args:
        full: attention of a decoder layer in the manner of Llama: `q_proj`, `k_proj`, `v_proj`, `o_proj`, perhaps
            `q_norm` and `k_norm` over the channels of a head. Its modules are taken, not copied.
        config: of sparse attention.
        layer_idx: number of the layer.
        gates: weights that the branches start with.
        options: `impl`, `loop_order` and `recompute`.

    Raises:
        ValueError: if `full` is an attention of another kind.
    """

    def __init__(
        self, full: Any, config: NSAConfig, layer_idx: int, gates: Sequence[float], options: Mapping[str, Any]
    ) -> None:
        modules = check_full_attention(full)
        weight, head_dim = modules["q_proj"].weight, int(full.head_dim)
        heads, kv_heads = (modules[name].out_features // head_dim for name in ("q_proj", "k_proj"))
        super().__init__(
            modules["q_proj"].in_features,
            heads,
            kv_heads,
            config,
            head_dim=head_dim,
            head_dim_v=modules["v_proj"].out_features // kv_heads,
            rope_theta=None,
            softmax_scale=float(full.scaling),
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        for name, module in modules.items():
            if self.num_kv_pairs > 1 and name in ("k_proj", "v_proj"):
                module = _repeated(module, self.num_kv_pairs)
            setattr(self, name, module)
        self.layer_idx = layer_idx
        # Of the full attention, for what it is compared with; sparse attention has a window of its own.
        self.full_window: int | None = getattr(
            full, "sliding_window", getattr(getattr(full, "config", None), "sliding_window", None)
        )
        heads_of_gates = heads if config.gate == "per_head" else 1
        self.branch_gate_proj = BranchGate(
            self.hidden_size, heads_of_gates, gates, device=weight.device, dtype=weight.dtype
        )
        # transformers' full attention has these, and so its tools may look for them.
        self.is_causal, self.scaling = True, self.softmax_scale
        self.num_key_value_groups = heads // kv_heads
        self._matching: Matching | None = None

    def _make_projections(self, *_: Any) -> None:
        """Those of the full attention are taken afterwards."""
        self.q_norm = self.k_norm = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        sparse_inputs: SparseInputs | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention of `[B, S, hidden_size]`; padding comes out as zeros.

        Raises:
            ValueError: without `sparse_inputs`, which the model passes.
        """
        if sparse_inputs is None:
            raise bad("sparse_inputs", "passed by the model", None, "call the model, not its layers")
        inputs = sparse_inputs.to(hidden_states.device)
        hidden = inputs.pack(hidden_states)
        if self._matching is not None:
            out = self._matching.compare(self, hidden, inputs)
        elif inputs.caches is None:
            out = self._forward(hidden, inputs.layout, inputs.rotary, None)
        else:
            with torch.no_grad(), _weights_there(self.compressor_k), _weights_there(self.compressor_v):
                out = self._forward(hidden, inputs.layout, inputs.rotary, inputs.caches.of_layer(self.layer_idx))
        return inputs.unpack(out, hidden_states), None

    def full_attention(self, hidden: Tensor, inputs: SparseInputs) -> Tensor:
        """Full attention of packed tokens `[N, hidden_size]`; of independent keys, with the selected ones."""
        q, k, v = self._heads(hidden)
        pair = self.num_kv_pairs // 2
        q, k = (rotate(x, inputs.rotary.tokens) for x in (q, k[:, pair]))
        if self.full_window is None:
            out = causal_attention(q, k, v[:, pair], inputs.layout, self.softmax_scale)
        else:
            options: dict[str, Any] = {
                "cu_seqlens": inputs.layout,
                "softmax_scale": self.softmax_scale,
                "impl": self.impl,
            }
            with no_autocast(hidden):
                out = sliding_window_attention(q, k, v[:, pair], window_size=self.full_window, **options).out
        return self.o_proj(out.flatten(1))


def check_full_attention(full: nn.Module) -> dict[str, Any]:
    """The modules of a full attention, if it is of the kind that can be made sparse.

    Raises:
        ValueError: if it is not.
    """
    kind = type(full).__name__
    modules: dict[str, Any] = dict(full.named_children())
    cure = "sparse attention takes the place of attention in the manner of Llama, Mistral, Qwen2 and Qwen3"
    missing = [name for name in _PROJECTIONS if name not in modules]
    others = sorted(set(modules) - set(_PROJECTIONS) - set(_NORMS))
    others += [name for name, _ in full.named_parameters(recurse=False)]
    others += [name for name in _SCORE_CHANGES if getattr(full, name, None) is not None]
    if missing or others or not hasattr(full, "head_dim") or not hasattr(full, "scaling"):
        got = f"{kind} without {', '.join(missing)}" if missing else f"{kind} with {', '.join(others) or 'neither'}"
        raise bad("model", "with q_proj, k_proj, v_proj, o_proj, head_dim and scaling, and no more", got, cure)
    for name in _NORMS:
        if name in modules and math.prod(modules[name].weight.shape) != full.head_dim:
            raise bad(f"{name}", f"over the {full.head_dim} channels of a head", list(modules[name].weight.shape), cure)
    if (_NORMS[0] in modules) != (_NORMS[1] in modules):
        raise bad("model", "with norms of both queries and keys, or none", kind, cure)
    return modules


@contextlib.contextmanager
def _weights_there(module: Any) -> Iterator[None]:
    """Accelerate brings offloaded weights for the time of a call; a cache reads those of compressors outside of one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def _repeated(module: nn.Linear, times: int) -> nn.Linear:
    """A projection to as many copies of the same heads."""
    weight = module.weight
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    wide = nn.Linear(module.in_features, times * module.out_features, module.bias is not None, **options)
    with torch.no_grad():
        wide.weight.copy_(weight.repeat(times, 1))
        if module.bias is not None:
            wide.bias.copy_(module.bias.repeat(times))
    return wide
