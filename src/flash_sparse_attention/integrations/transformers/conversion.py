"""`convert`: a pretrained transformers model with full attention becomes one with sparse attention."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...config import NSAConfig
from ...nn.rotary import Rotary
from ...types import SequenceLayout
from ...validation import bad
from .attention import NSAAttention
from .configuration import START_OF_GATES, check_layers, conversion_config
from .inputs import SparseInputs, rotations_of
from .modeling import PREFIX, SparseClasses, attention_of, become, sparse_classes

_CHECKED_TOKENS = 16
# Relative error of the same attention, computed in two ways in bfloat16; another attention is off by about 1.
_SAME = 0.05
# Standard deviation of the scores that are compared: in small ones, neither rotation nor softmax shows.
_SPREAD = 3.0


def convert(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    nsa: NSAConfig | Mapping[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    gates: Sequence[float] = START_OF_GATES,
    impl: str = "auto",
    loop_order: str = "auto",
    recompute: Sequence[str] = (),
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Gives layers of a decoder sparse attention. All pretrained weights are kept, under their names.

    What is new starts such that the model stays close to the original: compressed tokens are means, and the gates of
    the branches sum to 1. Where selection and window cover all earlier tokens, those two branches are full attention,
    and only the weight of the compressed branch makes a difference. How close that is: docs/transformers.md.

    Args:
        model_or_path: a causal language model of transformers, which is changed and returned; or the name or folder of
            one, which is loaded.
        nsa: sizes and kinds of sparse attention; `conversion_config()` by default.
        layers: numbers of the layers that become sparse; all by default.
        gates: weights that the compressed, the selected and the window branch start with.
        impl: implementation of the operators; see `nn.NativeSparseAttention`.
        loop_order: of selected attention.
        recompute: what the Triton kernels compute again in the backward pass.
        **from_pretrained: options of `AutoModelForCausalLM.from_pretrained`, with a name or folder: `dtype` (by
            default that of the weights), `device_map` and so on.

    Returns:
        The model, now of a class such as `NSALlamaForCausalLM`. `save_pretrained`, then
        `AutoModelForCausalLM.from_pretrained` after `import flash_sparse_attention.integrations.transformers`.

    Raises:
        ValueError: for a model whose attention is not that of Llama, Mistral, Qwen2 or Qwen3 (what it computes is
            compared, on a few tokens), one that is sparse already, or one that is spread over devices; nothing has
            changed then.

    Example:
        >>> model = convert("meta-llama/Llama-3.1-8B", conversion_config(window_size=1024))  # doctest: +SKIP
    """
    if isinstance(model_or_path, nn.Module):
        model = model_or_path
        if from_pretrained:
            raise bad(", ".join(from_pretrained), "given with a name or folder", "with a model that is loaded")
    else:
        from_pretrained.setdefault("dtype", "auto")
        model = AutoModelForCausalLM.from_pretrained(model_or_path, **from_pretrained)
    if not isinstance(model, PreTrainedModel):
        raise bad("model_or_path", "a model of transformers, or the name or folder of one", type(model).__name__)
    model_type = model.config.model_type
    if model_type.startswith(PREFIX):
        raise bad("model_or_path", "a model with full attention", f"{model_type!r}, which is sparse already")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        cure = "convert it on one device, save it, and load it with a device_map"
        raise bad("model_or_path", "on one device", "one that is spread over several", cure)
    classes = sparse_classes(model_type)
    if type(model) is not classes.causal_lm.__bases__[1]:
        raise bad("model_or_path", f"a {classes.causal_lm.__bases__[1].__name__}", type(model).__name__)
    options: dict[str, Any] = {
        "impl": impl,
        "loop_order": loop_order,
        "recompute": [recompute] if isinstance(recompute, str) else list(recompute),
    }
    options = {name: value for name, value in options.items() if value not in ("auto", [])}
    config = _config(model.config, classes, nsa, layers, gates, options)
    decoder = getattr(model, model.base_model_prefix)
    made = _converted_layers(decoder, config)
    # Nothing can fail from here on.
    for number, attention in made.items():
        decoder.layers[number].self_attn = attention
    # Layers that stay full look there for their implementation.
    base = model.config
    for module in model.modules():
        if getattr(module, "config", None) is base:
            module.config = config
    become(decoder, classes.model)
    become(model, classes.causal_lm)
    return model


def _config(
    base: Any,
    classes: SparseClasses,
    nsa: NSAConfig | Mapping[str, Any] | None,
    layers: Sequence[int] | None,
    gates: Sequence[float],
    options: dict[str, Any],
) -> Any:
    """The configuration of the converted model: that of the base model and what is sparse."""
    fields = conversion_config() if nsa is None else nsa if isinstance(nsa, NSAConfig) else conversion_config(**nsa)
    values = base.to_dict()
    for name in ("model_type", "transformers_version"):
        values.pop(name, None)
    values |= {
        "architectures": [classes.causal_lm.__name__],
        "nsa": fields.to_dict(),
        "nsa_layers": None if layers is None else check_layers(layers, base.num_hidden_layers),
        "nsa_gates": list(gates),
        "nsa_options": options,
    }
    config = classes.config(**values)
    config._attn_implementation = base._attn_implementation
    config._name_or_path = base._name_or_path
    return config


def _converted_layers(decoder: Any, config: Any) -> dict[int, NSAAttention]:
    """The new attention of the sparse layers, each compared with what it replaces."""
    made = {}
    for number in config.sparse_layers:
        full = attention_of(decoder, number)
        attention = NSAAttention(full, config.nsa_config, number, config.nsa_gates, config.nsa_options)
        attention.train(full.training)
        if attention.q_proj.weight.device.type != "meta":
            _check_same(decoder, number, full, attention)
        made[number] = attention
    return made


@torch.no_grad()
def _check_same(decoder: Any, number: int, full: Any, attention: NSAAttention) -> None:
    """The full attention of a layer is what `NSAAttention` takes it for: projections, norms, rotation, softmax."""
    weight = attention.q_proj.weight
    tokens, hidden_size = _CHECKED_TOKENS, attention.hidden_size
    generator = torch.Generator().manual_seed(number)
    hidden = torch.randn(1, tokens, hidden_size, generator=generator).to(weight)
    if attention.q_norm is None:
        q, k, _ = attention._heads(hidden[0])
        scores = full.scaling * (q[:, 0] @ k[:, 0, 0].T).float()
        hidden = hidden * (_SPREAD / scores.std()).sqrt().clamp(1e-2, 1e2).to(hidden)
    layout = SequenceLayout.uniform(1, tokens, weight.device)
    compute = rotations_of(decoder.rotary_emb, weight.dtype)
    try:
        inputs = SparseInputs(layout, None, Rotary(compute(layout.positions()), compute))
        ours = attention.full_attention(hidden[0], inputs)
        theirs = _eager(decoder, full, hidden, layout.positions()[None], attention.full_window or tokens)
    except (TypeError, RuntimeError, ValueError) as error:
        raise bad("model", "with the attention of Llama", f"another one in layer {number} ({error})") from error
    error_size = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    if not error_size < _SAME:
        got = f"one whose output in layer {number} differs by {error_size:.0%}"
        raise bad("model", "with the attention of Llama, Mistral, Qwen2 or Qwen3", got)


def _eager(decoder: Any, full: Any, hidden: Tensor, positions: Tensor, window: int) -> Tensor:
    """What the attention of a decoder makes of tokens that see so many up to themselves."""
    tokens = hidden.shape[1]
    unseen = hidden.new_full((tokens, tokens), torch.finfo(hidden.dtype).min)
    mask = unseen.triu(1) + unseen.tril(-window)
    config, training = full.config, full.training
    before = config._attn_implementation
    try:
        # Other implementations take other masks.
        config._attn_implementation = "eager"
        full.eval()
        out = full(
            hidden_states=hidden,
            position_embeddings=decoder.rotary_emb(hidden, positions),
            attention_mask=mask[None, None],
            past_key_values=None,
        )[0]
    finally:
        config._attn_implementation = before
        full.train(training)
    return out[0]
