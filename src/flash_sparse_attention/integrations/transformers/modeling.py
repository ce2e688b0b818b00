"""Transformers' decoders with sparse attention: `NSALlamaForCausalLM` and so on.

A class for each architecture, made from transformers' own by `sparse_classes`, and not one class around any model: the
result *is* a `LlamaForCausalLM`, with its modules and the names of its parameters, so that what works with Llama
(PEFT, Trainer, device maps, other people's code) works with it. Nothing of transformers is
changed: a layer's `self_attn` is another module, and the decoder's `forward` prepares what it needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...nn.attention import BranchGate
from ...nn.compressors import Compressor
from ...nn.rotary import Rotary
from ...types import SequenceLayout
from ...validation import bad
from .attention import NSAAttention
from .cache import SparseCaches, adopt
from .configuration import SparseFields
from .inputs import SparseInputs, is_packed, layout_of, rotations_of

PREFIX = "nsa_"


class SparseClasses(NamedTuple):
    """The classes of an architecture with sparse attention."""

    config: type
    model: type
    causal_lm: type


class _SparseWeights:
    """How the parameters begin that only sparse attention has."""

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, (BranchGate, Compressor)):
            super()._init_weights(module)  # type: ignore[misc]
            return
        # What a checkpoint held is marked, and stays.
        loaded = {
            parameter: parameter.detach().clone()
            for parameter in module.parameters()
            if getattr(parameter, "_is_hf_initialized", False)
        }
        module.reset_parameters()
        with torch.no_grad():
            for parameter, value in loaded.items():
                parameter.copy_(value)


class SparseDecoder(_SparseWeights):
    """The part of a decoder that knows of sparse layers; stands before transformers' model among the base classes."""

    # Of transformers' model.
    config: Any
    layers: Any
    rotary_emb: Any
    training: bool
    get_input_embeddings: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        make_sparse(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: `[B, S]`, or `[B, past + S]` with a cache: 0 for padding, on the left or on the right.
            position_ids: int64 `[B, S]`; where they begin anew within a row, another sequence begins. Counted without
                padding by default. With a cache they are counted on in any case.
            past_key_values: an empty `DynamicCache` or `StaticCache`, or one that this model has filled.
            inputs_embeds: `[B, S, hidden_size]` instead of `input_ids`.
            use_cache: whether to keep keys and values; by default as configured, but not where gradients are recorded
                or rows pack sequences.
            layout: bounds of the sequences that one row packs, which spares copies to the host; or `cu_seq_lens_q`,
                as for flash-attention.
            **kwargs: as the base model's.

        Raises:
            ValueError: for masks, bounds or caches that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise bad("input_ids", "given, or else inputs_embeds", "none of them" if input_ids is None else "both")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        config = self.config
        bounds = kwargs.get("cu_seq_lens_q")
        if use_cache is None:
            use_cache = config.use_cache and not torch.is_grad_enabled()
            # Evaluation of packs, where nobody asks for a cache.
            if use_cache and past_key_values is None:
                use_cache = not is_packed(attention_mask, position_ids, layout, bounds)
        cached = use_cache or past_key_values is not None
        if cached and self.training and torch.is_grad_enabled():
            raise bad("use_cache", "False in training", True, "what a cache holds has no gradients")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        caches = None if past_key_values is None else self.sparse_caches(past_key_values, inputs_embeds)
        past = None if caches is None else caches.columns
        rows, columns = inputs_embeds.shape[:2]
        packed, tokens = layout_of(
            (rows, columns),
            inputs_embeds.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            layout=layout,
            cu_seq_lens=bounds,
            past=past,
        )
        positions = packed.positions()
        if position_ids is not None and caches is None:
            positions = position_ids.expand(rows, -1).flatten()
            positions = positions if tokens is None else positions[tokens]
        elif layout is not None or bounds is not None or tokens is not None:
            position_ids = _placed(positions, tokens, rows, columns)
        if len(config.sparse_layers) == config.num_hidden_layers:
            # Nobody reads a mask: transformers passes on what has four dimensions, and makes none.
            attention_mask = torch.empty(1, 1, 1, 1, device=inputs_embeds.device)
        compute = rotations_of(self.rotary_emb, inputs_embeds.dtype)
        with contextlib.ExitStack() as stack:
            if caches is not None:
                positions = stack.enter_context(caches.extend(packed, columns)).to(inputs_embeds.device)
                # `generate` goes on from the position of the last column, which may be padding.
                position_ids = _placed(positions, tokens, rows, columns)
            output = super().forward(  # type: ignore[misc]
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                sparse_inputs=SparseInputs(packed, tokens, Rotary(compute(positions), compute), caches),
                **kwargs,
            )
        return output if caches is None or tokens is None else _with_last_repeated(output, tokens)

    def sparse_caches(self, cache: Any, inputs_embeds: Tensor | None = None) -> SparseCaches:
        """What the sparse layers keep in this cache, which they take over if it is empty.

        Keys are in autocast's dtype, or in that of the embeddings, where they are known before the first tokens:
        weights that are sharded may have another one while they are not gathered.
        """
        config, layers = self.config, self.layers
        sparse = [layers[number].self_attn for number in config.sparse_layers]

        def make_one(
            device: torch.device, numbers: Sequence[int], batch: int, capacity: int | None, dtype: torch.dtype | None
        ) -> Any:
            first = layers[numbers[0]].self_attn
            options: dict[str, Any] = {"num_layers": len(numbers), "rotary": True, "device": device}
            if dtype is not None:
                options["dtype"] = dtype
            return first.new_cache(batch, capacity, **options)

        def make(capacity: int | None) -> SparseCaches:
            return SparseCaches(config.sparse_layers, make_one, [_device(layer) for layer in sparse], capacity)

        caches = adopt(cache, config.num_hidden_layers, make)
        if inputs_embeds is not None and not torch.is_autocast_enabled(inputs_embeds.device.type):
            caches.dtype = inputs_embeds.dtype
        return caches


class SparseCausalLM(_SparseWeights):
    """The part of a language model that knows of sparse layers; stands before transformers' among the base classes."""

    # Of transformers' model.
    base_model_prefix: str

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        as_sparse_decoder(self)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Before `generate` looks whether the cache could be compiled, which sparse layers do not need.
        prepared = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        if model_kwargs.get("past_key_values") is not None:
            decoder = getattr(self, self.base_model_prefix)
            decoder.sparse_caches(model_kwargs["past_key_values"])
        return prepared


def sparse_classes(model_type: str) -> SparseClasses:
    """The classes of an architecture of transformers with sparse attention, registered with its `Auto` classes.

    Args:
        model_type: as in the configuration of the base model: `llama`, `mistral`, `qwen2`, `qwen3`, or another one with
            the same attention.

    Raises:
        ValueError: for a name that transformers does not know, or an architecture that is no decoder.

    Example:
        >>> sparse_classes("llama").causal_lm.__name__
        'NSALlamaForCausalLM'
    """
    model_type = model_type.removeprefix(PREFIX)
    if model_type in _CLASSES:
        return _CLASSES[model_type]
    try:
        base = AutoConfig.for_model(model_type).__class__
        bases = AutoModel._model_mapping[base], AutoModelForCausalLM._model_mapping[base]
    except (KeyError, ValueError) as error:
        expected = "that of a decoder of transformers, such as llama, mistral, qwen2 or qwen3"
        raise bad("model_type", expected, repr(model_type)) from error
    if None in bases:
        raise bad("model_type", "that of a decoder", repr(model_type))
    config = _derived(SparseFields, base, model_type=PREFIX + model_type, base_model_tp_plan=None)
    classes = SparseClasses(
        config,
        _derived(SparseDecoder, bases[0], config_class=config, config=config),
        _derived(SparseCausalLM, bases[1], config_class=config, config=config, _can_compile_fullgraph=False),
    )
    AutoConfig.register(PREFIX + model_type, config)
    AutoModel.register(config, classes.model)
    AutoModelForCausalLM.register(config, classes.causal_lm)
    _CLASSES[model_type] = classes
    return classes


def make_sparse(decoder: Any) -> None:
    """Gives the sparse layers of a decoder their attention. Nothing has changed if one of them cannot have it."""
    config = decoder.config
    made = {}
    for number in config.sparse_layers:
        full = attention_of(decoder, number)
        if isinstance(full, NSAAttention):
            continue
        made[number] = NSAAttention(full, config.nsa_config, number, config.nsa_gates, config.nsa_options)
        width = 2 * decoder.rotary_emb.inv_freq.numel()
        if made[number].head_dim != width:
            raise bad("rotary embedding", f"of all {made[number].head_dim} channels of a head", width)
    for number, attention in made.items():
        decoder.layers[number].self_attn = attention.train(decoder.layers[number].training)


def as_sparse_decoder(causal_lm: Any) -> None:
    """Makes the decoder inside a language model, which transformers has built, one with sparse layers."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    decoder.config = causal_lm.config
    make_sparse(decoder)
    become(decoder, sparse_classes(causal_lm.config.model_type).model)


def become(model: Any, sparse: Any) -> None:
    """Makes a model that has its configuration and its modules already one of this class."""
    # What transformers knows of a class, as which outputs it can record, it notes when one of it is constructed.
    PreTrainedModel.__init__(sparse.__new__(sparse), model.config)
    model.__class__ = sparse


def attention_of(decoder: Any, number: int) -> Any:
    """The attention of a layer.

    Raises:
        ValueError: for a decoder that is not built like Llama's.
    """
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise bad("model", "with layers and rotary_emb, like Llama", type(decoder).__name__)
    if not hasattr(decoder.layers[number], "self_attn"):
        got = f"{type(decoder.layers[number]).__name__} in layer {number}"
        raise bad("model", "of layers with self_attn, like Llama", got)
    return decoder.layers[number].self_attn


def _derived(first: type, base: Any, **attributes: Any) -> type:
    """A class of this module that is both; its name is that of `base` with NSA before it."""
    name = f"NSA{base.__name__}"
    doc = f"`{base.__name__}` of transformers with sparse attention; see `{first.__name__}`."
    made = type(name, (first, base), {"__module__": __name__, "__doc__": doc, **attributes})
    globals()[name] = made
    return made


def _device(attention: nn.Module) -> torch.device:
    """Where a layer runs: where accelerate brings its inputs and weights for the time of a call, or where these are."""
    for module in attention.modules():
        runs_on = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if runs_on is not None:
            return torch.device(runs_on)
    return next(attention.parameters()).device


def _placed(positions: Tensor, tokens: Tensor | None, rows: int, columns: int) -> Tensor:
    """Positions of the real tokens in their places in the batch, `[B, S]`, 0 elsewhere."""
    if tokens is not None:
        positions = positions.new_zeros(rows * columns).index_copy(0, tokens, positions)
    return positions.view(rows, columns)


def _with_last_repeated(output: Any, tokens: Tensor) -> Any:
    """The output with the state of the last token of a row in the padding behind it.

    `generate` takes the last column in any case, and so goes on behind the last token, whichever side is padded.
    """
    hidden = output[0]
    # The last layer of a model that is spread over devices is on another one than the first.
    tokens = tokens.to(hidden.device)
    rows, columns = hidden.shape[:2]
    column = torch.arange(columns, device=hidden.device)
    real = torch.zeros(rows * columns, dtype=torch.bool, device=hidden.device).index_fill(0, tokens, True)
    last = torch.where(real.view(rows, columns), column, -1).amax(1, keepdim=True)
    source = torch.minimum(column, last.clamp(min=0))
    hidden = hidden.gather(1, source[..., None].expand_as(hidden))
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output.last_hidden_state = hidden
    return output


_CLASSES: dict[str, SparseClasses] = {}
