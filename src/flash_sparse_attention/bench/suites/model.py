"""Training steps and prefill of decoders of transformers at length: sparse attention in both loop orders, and full.

The widths are those of published models, the weights random, and without the vocabulary's embedding and output layer,
which belong to a whole model once and not to a few layers. All variants of a row have one set of weights, and are run
in turn: a decoder for each, whose modules share their parameters. The sparse ones are what `convert` makes, with the
`fsa` preset.

training step    forward, backward with every layer computed again (gradient checkpointing), fused AdamW whose states
                 have the dtype of the weights; one sequence
prefill          reads one sequence into an empty cache

Layers are compiled by `torch.compile`, and all of a decoder run one graph: which cache is a layer's is found outside of
it. Before anything is timed, hidden states behind the first layers are compared: those of the two loop orders, and on
the first tokens, where full and sparse attention see the same, those of both. Of few layers gradients are compared too:
those of the projections of the first one's attention, which all others had a part in.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ...config import NSAConfig
from ...training.flops import AttentionCost, ModelCost, unused_weights
from ...validation import bad, check_choice, check_positive
from ..cases import Bench
from ..results import Row
from ..timing import first_run_s, interleaved, synchronize

SUITE = "model"
TRAINING, PREFILL = OPERATORS = ("training step", "prefill")
FIT = "fit"
# As many of the first and of the last tokens are compared, behind so many layers.
SAME_TOKENS, SAME_LAYERS = 512, 4
# The first tokens see the same with full and with sparse attention, but for the compressed branch.
GATES = (1e-4, 0.5, 0.5 - 1e-4)
# Relative distance; two ways to compute the same in bfloat16 are 0.02 apart after four layers.
SAME = 0.04
# The same of gradients. On a CPU, four layers of 512 channels, 2,048 tokens, bfloat16 with noise as large as rounding:
# hidden states 0.013 apart, gradients of the first layer 0.010 to 0.017. Those of full attention are 0.3 to 0.4 apart.
# On an H200, three models, 2 and 4 layers, 8,192 to 65,536 tokens: 0.011 to 0.033.
SAME_GRADIENTS = 0.12
# Runs that count take so many times as long in all as those of an operator: three runs of a prefill of 0.2 s were up to
# 4 % apart from those of another process, as the clocks were.
_LONGER = 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Share of the free memory that is planned with, and what a token takes while a layer is computed again and its backward
# pass runs, in numbers of the dtype; 3.4 and 10.2 were measured with four layers of three models at 65,536 tokens.
PLANNED = 0.95
WORKSPACE = {"intermediate_size": 4, "hidden_size": 14}


@dataclass(frozen=True)
class Widths:
    """Of config.json of a published model.

    Attributes:
        model_type: architecture of transformers.
        fields: of its configuration.
        layers: of the whole model.
    """

    model_type: str
    fields: dict[str, int]
    layers: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.fields.get("head_dim", self.fields["hidden_size"] // self.fields["num_attention_heads"])

    @property
    def channels(self) -> int:
        """Of all query heads."""
        return self.fields["num_attention_heads"] * self.head_dim


def _widths(model_type: str, hidden: int, intermediate: int, heads: int, layers: int, **others: int) -> Widths:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads}
    return Widths(model_type, {**sizes, "num_key_value_heads": 8, **others}, layers)


MODELS = {
    "llama-3-8b": _widths("llama", 4096, 14336, 32, 32),
    "qwen3-14b": _widths("qwen3", 5120, 17408, 40, 40, head_dim=128),
    "qwen2.5-32b": _widths("qwen2", 5120, 27648, 40, 64),
    # Of nobody: to see that all works, on any device.
    "tiny": _widths("llama", 64, 96, 4, 2, num_key_value_heads=2),
}
REAL = tuple(name for name in MODELS if name != "tiny")


@dataclass(frozen=True)
class ModelOptions:
    """What to measure.

    Attributes:
        models: of `MODELS`.
        lengths: tokens of the sequence.
        layers: of each decoder; `fit` for as many as fit into memory, at most those of the model.
        repeats: runs of each variant that count at the least, at first; see `timing.Effort` for fewer and more.
        compile_layers: whether layers are compiled.
        operators: of `OPERATORS`.
        full_attention: of `cudnn` and `flash`, on a CPU of `sdpa`, those that take part; None for all.
        nsa: of the sparse layers; keys and values are shared by the branches.
        dtype: of the weights.
    """

    models: tuple[str, ...] = REAL
    lengths: tuple[int, ...] = (32768, 65536)
    layers: int | str = FIT
    repeats: int = 3
    compile_layers: bool = True
    operators: tuple[str, ...] = OPERATORS
    full_attention: tuple[str, ...] | None = None
    nsa: NSAConfig = field(default_factory=lambda: NSAConfig.preset("fsa"))
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in self.models:
            check_choice("models", name, tuple(MODELS))
        for name in self.operators:
            check_choice("operators", name, OPERATORS)
        for length in self.lengths:
            check_positive("lengths", length)
        if self.layers != FIT:
            check_positive("layers", self.layers)
        check_positive("repeats", self.repeats)
        if self.nsa.branch_kv != "shared":
            raise bad("nsa", "with branch_kv='shared', as full attention has one k and v", self.nsa.branch_kv)


def options(quick: bool, device: torch.device, **given: Any) -> ModelOptions:
    """The options for a device; `given` are fields that were asked for."""
    fields: dict[str, Any] = {}
    if quick:
        fields = {"models": REAL[:1], "lengths": (8192,), "layers": 2, "repeats": 2}
    if device.type == "cpu":
        fields |= {"dtype": torch.float32, "compile_layers": False}
        if quick:
            fields |= {"models": ("tiny",), "lengths": (128,)}
    return ModelOptions(**fields | given)


def rows(options: ModelOptions, bench: Bench) -> list[Row]:
    """All rows of the suite."""
    return [row for _, found in groups(options, bench) for row in found]


def groups(options: ModelOptions, bench: Bench) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each model at each length."""
    reason = ""
    try:
        importlib.import_module("flash_sparse_attention.integrations.transformers")
    except ImportError as error:
        reason = f"transformers cannot be used here: {error}"
    if not reason and bench.device.type == "cpu" and "tiny" not in options.models:
        reason = "the widths of real models are for GPUs; --quick runs tiny ones on a CPU"
    if reason:
        row = Row(SUITE, options.operators[0], "step", variants_on(bench.device, options)[0], True, {}, skipped=reason)
        yield SUITE, [row]
        return
    for name in options.models:
        for length in options.lengths:
            title = f"{name}, {length:,} tokens"
            bench.announce(title)
            found = measured(name, length, options, bench)
            yield f"{title}, {found[0].shape['layers']} layers", found


def variants_on(device: torch.device, options: ModelOptions) -> tuple[str, ...]:
    """Sparse attention, ours first, then full attention."""
    cuda = device.type == "cuda"
    sparse, full = (("kv_outer", "query_outer"), tuple(_BACKENDS)) if cuda else (("blockwise",), ("sdpa",))
    wanted = full if options.full_attention is None else options.full_attention
    return *sparse, *(name for name in full if name in wanted)


_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_SPARSE = ("kv_outer", "query_outer", "blockwise")


def measured(name: str, length: int, options: ModelOptions, bench: Bench) -> list[Row]:
    """Rows of a model at a length, with as many layers as there is memory for if they shall fit."""
    fit = options.layers == FIT
    layers = fitting_layers(MODELS[name], length, options, bench.device) if fit else int(options.layers)
    while True:
        _clear(bench.device)
        try:
            return _Measurement(name, layers, length, options, bench).rows()
        except torch.OutOfMemoryError:
            if not fit or layers == 1:
                break
        # Here, where nothing holds what there was no memory for.
        bench.announce(f"{name}, {length:,} tokens: {layers} layers do not fit")
        layers -= max(1, layers // 8)
    _clear(bench.device)
    shape = _shape(name, layers, length, options)
    reason = "out of memory" if layers > 1 or not fit else "out of memory with one layer"
    return [
        Row(SUITE, operator, "step", variant, variant == variants_on(bench.device, options)[0], shape, skipped=reason)
        for operator in options.operators
        for variant in variants_on(bench.device, options)
    ]


def fitting_layers(widths: Widths, length: int, options: ModelOptions, device: torch.device) -> int:
    """An estimate of how many layers can be trained in the free memory; those of the model where nothing says."""
    if device.type != "cuda":
        return widths.layers
    _clear(device)
    free, _ = torch.cuda.mem_get_info(device)
    return estimated_layers(widths, length, options, free)


def estimated_layers(widths: Widths, length: int, options: ModelOptions, free: int) -> int:
    """How many layers can be trained in so many bytes.

    >>> free = 148 * 10**9
    >>> [estimated_layers(MODELS[name], 65536, ModelOptions(), free) for name in REAL]
    [32, 35, 24]
    """
    sizes, nsa = widths.fields, options.nsa
    hidden, kv = sizes["hidden_size"], sizes["num_key_value_heads"] * widths.head_dim
    weights = 2 * hidden * (widths.channels + kv) + 3 * hidden * sizes["intermediate_size"]
    # Of the compressors of keys and values, at the most.
    weights += 2 * kv * nsa.kernel_size * widths.head_dim
    workspace = length * sum(factor * sizes[name] for name, factor in WORKSPACE.items())
    # Weights, gradients and two states of the optimizer, and what is kept of a layer to compute it again.
    layer = 4 * weights + length * hidden
    numbers = PLANNED * free / options.dtype.itemsize - workspace - 4 * length * hidden
    return max(1, min(widths.layers, int(numbers // layer)))


class _Measurement:
    """All variants of a model at a length, with one set of weights."""

    def __init__(self, name: str, layers: int, length: int, options: ModelOptions, bench: Bench) -> None:
        self._name, self._layers, self._length = name, layers, length
        self._options, self._bench, self._device = options, bench, bench.device
        self._held = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def rows(self) -> list[Row]:
        """Checked, then timed in turn."""
        with _compiling():
            self._decoders = decoders(self._name, self._layers, self._length, self._options, self._device)
            self._sets = {
                variant: LayerSet(decoder, self._options.compile_layers) for variant, decoder in self._decoders.items()
            }
            generator = torch.Generator(self._device).manual_seed(1)
            hidden_size = MODELS[self._name].fields["hidden_size"]
            like: dict[str, Any] = {"device": self._device, "generator": generator}
            self._tokens = torch.randint(256, (1, self._length), **like)
            cotangent = torch.randn(1, self._length, hidden_size, dtype=self._options.dtype, **like)
            self._cotangent = cotangent / self._length
            # Training first: what fits there fits everywhere.
            found = []
            if TRAINING in self._options.operators:
                found += self._rows(TRAINING, {variant: self._training(variant) for variant in self._decoders})
                self._optimizer = None
                _clear(self._device)
            if PREFILL in self._options.operators:
                found += self._rows(PREFILL, {variant: self._prefill(variant) for variant in self._decoders})
            return found

    _optimizer: torch.optim.Optimizer | None = None
    # By variant, of its first step; in the memory of the host, as peaks are those of a step.
    _gradients: dict[str, tuple[Tensor, ...]]

    def _rows(self, operator: str, runs: Mapping[str, Callable[[], object]]) -> list[Row]:
        found: dict[str, dict[str, Any]] = {}
        seen: dict[str, Seen] = {}
        self._gradients = {}
        for variant, run in runs.items():
            self._bench.announce(f"{self._name}, {self._length:,} tokens, {operator}, {variant}")
            found[variant] = {}
            self._sets[variant].seen = None
            try:
                found[variant]["compile_s"] = round(first_run_s(run, self._device), 2)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if "out of memory" in str(error).lower():
                    raise torch.OutOfMemoryError(str(error)) from error
                what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                found[variant] = {"skipped": f"{'failed' if variant in _SPARSE else 'refused'}: {what}"}
                continue
            finally:
                self._no_gradients()
            last, first = self._sets[variant].normed()
            seen[variant] = Seen(last, first, self._gradients.get(variant, ()))
            if operator == PREFILL:
                # Writing a cache breaks graphs, and what is behind a break may be compiled in the second run only.
                self._settle(self._sets[variant], run)
        for variant, errors in errors_of(seen, self._length <= SAME_TOKENS).items():
            found[variant]["check"] = errors
            wrong = {name: error for name, error in errors.items() if not error <= 1.0}
            if wrong:
                which = ", ".join(f"{name} ({error:.3g} of what it may differ)" for name, error in wrong.items())
                found[variant]["skipped"] = f"{'failed' if variant in _SPARSE else 'refused'}: wrong {which}"
        self._bench.announce(f"{self._name}, {self._length:,} tokens, {operator}, times")
        peaks: dict[str, int] = {}
        chosen = {name: self._with_peak(name, runs[name], peaks) for name in seen if "skipped" not in found[name]}
        usual, repeats = self._bench.effort, self._options.repeats
        effort = dataclasses.replace(
            usual,
            warm_up_ms=0.0,
            target_ms=_LONGER * usual.target_ms,
            min_repeats=repeats,
            max_repeats=max(repeats, usual.max_repeats),
        )
        graphs = {variant: self._sets[variant].graphs for variant in chosen}
        times = interleaved(chosen, self._bench.clock, effort)
        for variant, before in graphs.items():
            if self._sets[variant].graphs > before:
                found[variant]["notes"] = "compiled again while it was timed, "
        return [self._row(operator, variant, times.get(variant), peaks, found[variant]) for variant in runs]

    def _row(self, operator: str, variant: str, ms: Any, peaks: Mapping[str, int], found: dict[str, Any]) -> Row:
        ours = variant == variants_on(self._device, self._options)[0]
        compiled = "layers compiled" if self._options.compile_layers else "layers not compiled"
        how = "gradient checkpointing" if operator == TRAINING else "into an empty cache"
        notes = found.pop("notes", "") + f"{compiled}, {how}"
        memory = {"peak": peaks[variant]} if variant in peaks else {}
        return Row(
            SUITE, operator, "step", variant, ours, _shape(self._name, self._layers, self._length, self._options),
            ms=ms, flops=self._flops(operator, variant), memory=memory, notes=notes, **found,
        )  # fmt: skip

    def _flops(self, operator: str, variant: str) -> float:
        """As MFU counts them: nothing for what is computed again."""
        decoder, widths = self._decoders[variant], MODELS[self._name]
        sparse = variant in _SPARSE
        attention = AttentionCost(widths.channels, self._options.nsa if sparse else None)
        weights = sum(w.numel() for w in decoder.layers.parameters()) - unused_weights(decoder)
        training = ModelCost(weights, (attention,) * self._layers).training_flops([self._length])
        # The backward pass has twice as many as the forward pass.
        return training if operator == TRAINING else training / 3

    def _training(self, variant: str) -> Callable[[], None]:
        """A step on the sequence."""
        if self._optimizer is None:
            every = dict.fromkeys(w for decoder in self._decoders.values() for w in decoder.parameters())
            # With a rate of 0 it does all its work, and the weights stay the same for all variants.
            self._optimizer = torch.optim.AdamW(list(every), lr=0.0, fused=self._device.type == "cuda")
        decoder, optimizer = self._decoders[variant], self._optimizer

        def step() -> None:
            decoder.train()
            with _attention_by(variant):
                hidden = decoder(input_ids=self._tokens, use_cache=False).last_hidden_state
                hidden.backward(self._cotangent)
            if variant not in self._gradients:
                self._gradients[variant] = gradients(decoder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _prefill(self, variant: str) -> Callable[[], None]:
        """Reads the sequence."""
        decoder = self._decoders[variant]

        def read() -> None:
            decoder.eval()
            with _attention_by(variant), torch.inference_mode():
                decoder(input_ids=self._tokens, use_cache=True)

        return read

    def _settle(self, layers: LayerSet, run: Callable[[], object], most: int = 4) -> None:
        """Runs until nothing is compiled any more."""
        for _ in range(most if self._options.compile_layers else 0):
            before = layers.graphs
            run()
            if layers.graphs == before:
                break

    def _with_peak(self, variant: str, run: Callable[[], object], peaks: dict[str, int]) -> Callable[[], object]:
        """A run that notes the most memory that it takes; asking for it does not wait for the device."""
        if self._device.type != "cuda":
            return run

        def noted() -> None:
            torch.cuda.reset_peak_memory_stats(self._device)
            run()
            peak = torch.cuda.max_memory_allocated(self._device) - self._held
            peaks[variant] = max(peaks.get(variant, 0), peak)

        return noted

    def _no_gradients(self) -> None:
        """What a run left that did not come to its end."""
        for decoder in self._decoders.values():
            decoder.zero_grad(set_to_none=True)


def decoders(name: str, layers: int, length: int, options: ModelOptions, device: torch.device) -> dict[str, Any]:
    """A decoder with random weights for each variant; they share all parameters that they have in common."""
    from ...integrations.transformers import convert, sparse_classes

    widths = MODELS[name]
    classes: Any = sparse_classes(widths.model_type)
    config = classes.config.__bases__[1](
        num_hidden_layers=layers, vocab_size=256, max_position_embeddings=length, **widths.fields
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(options.dtype):
        full = classes.causal_lm.__bases__[1](config)
        # The same numbers for the same names, however many there are.
        for parameter_name, parameter in full.model.named_parameters():
            if parameter.dim() == 2:
                torch.manual_seed(zlib.crc32(parameter_name.encode()))
                torch.nn.init.normal_(parameter, std=0.02)
    made = {}
    for variant in variants_on(device, options):
        if variant in _BACKENDS or variant == "sdpa":
            made[variant] = _with_same_weights(full)
        elif variant == "query_outer":
            made[variant] = _with_same_weights(made["kv_outer"])
            for layer in made[variant].model.layers:
                layer.self_attn.loop_order = "query_outer"
        else:
            impl, loop_order = ("triton", "kv_outer") if variant == "kv_outer" else (variant, "auto")
            made[variant] = convert(
                _with_same_weights(full), options.nsa, gates=GATES, impl=impl, loop_order=loop_order
            )
    return {variant: causal_lm.model for variant, causal_lm in made.items()}


class LayerSet:
    """The layers of a decoder, compiled together; each is computed again in the backward pass.

    Attributes:
        seen: hidden states behind the layers that are compared, of the last and of the first tokens, in the first pass
            since this was set to None.
        graphs: how many were compiled.
    """

    def __init__(self, decoder: Any, compile_them: bool) -> None:
        forward = type(decoder.layers[0]).forward
        self._norm = decoder.norm
        self._last = min(SAME_LAYERS, len(decoder.layers)) - 1
        self.seen: tuple[Tensor, Tensor] | None = None
        self.graphs = 0

        def compute(layer: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            return forward(layer, hidden_states, **kwargs)

        self._compute: Callable[..., Any] = compute
        if compile_them:
            self._compute = torch.compile(compute, backend=self._backend(_inductor()), dynamic=False)
        for number, layer in enumerate(decoder.layers):
            # A graph that knew its number would be of one layer.
            layer.self_attn.layer_idx = 0
            layer.forward = functools.partial(self._run, layer, number)

    def _backend(self, compile_graph: Callable[..., Any]) -> Callable[..., Any]:
        """A backend of its own: Dynamo tells compiled code apart by the backend, not by which kernel SDPA takes."""

        def counted(graph: Any, example_inputs: Any) -> Any:
            self.graphs += 1
            return compile_graph(graph, example_inputs)

        return counted

    def normed(self) -> tuple[Tensor, Tensor]:
        """What was seen, behind the decoder's norm."""
        assert self.seen is not None
        with torch.no_grad():
            last, first = (self._norm(hidden) for hidden in self.seen)
        return last, first

    def _run(self, layer: Any, number: int, hidden_states: Tensor, **kwargs: Any) -> Any:
        """What transformers calls instead of the layer's own `forward`."""
        if layer.training and torch.is_grad_enabled():
            out = checkpoint(self._compute, layer, hidden_states, use_reentrant=False, **kwargs)
        else:
            out = self._compute(layer, hidden_states, **_with_own_cache(kwargs, number))
        if number == self._last and self.seen is None:
            hidden = (out[0] if isinstance(out, tuple) else out).detach()
            self.seen = hidden[0, -SAME_TOKENS:].clone(), hidden[0, :SAME_TOKENS].clone()
        return out


class _OneLayer:
    """The cache of one layer with full attention, in the place of the cache of all."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As that of transformers' `Cache`."""
        return self._layer.update(keys, values, *args, **kwargs)


class _OneSparseLayer:
    """The same of one with sparse attention, in the place of `SparseCaches`."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def of_layer(self, number: int) -> Any:
        """The layer."""
        return self._layer


def _with_own_cache(kwargs: dict[str, Any], number: int) -> dict[str, Any]:
    """Arguments of a layer with a cache of its own, so that the same graph serves all layers."""
    cache, sparse = kwargs.get("past_key_values"), kwargs.get("sparse_inputs")
    if cache is None:
        return kwargs
    if sparse is not None:
        own = dataclasses.replace(sparse, caches=_OneSparseLayer(sparse.caches.of_layer(number)))
        return {**kwargs, "past_key_values": None, "sparse_inputs": own}
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= number:
        cache.layers.append(cache.layer_class_to_replicate())
    return {**kwargs, "past_key_values": _OneLayer(cache.layers[number])}


@dataclass(frozen=True)
class Seen:
    """What a variant computed.

    Attributes:
        last, first: hidden states of the last and of the first tokens, behind the layers that are compared.
        gradients: of weights; none if they are not compared.
    """

    last: Tensor
    first: Tensor
    gradients: tuple[Tensor, ...] = ()


def gradients(decoder: Any) -> tuple[Tensor, ...]:
    """Of the weights of `PROJECTIONS` of the first layer; none of many layers, behind which differences are larger."""
    if len(decoder.layers) > SAME_LAYERS:
        return ()
    return tuple(getattr(decoder.layers[0].self_attn, name).weight.grad.cpu() for name in PROJECTIONS)


def errors_of(seen: Mapping[str, Seen], short: bool = False) -> dict[str, dict[str, float]]:
    """How far variants are apart, as shares of `SAME` and `SAME_GRADIENTS`, by variant.

    Args:
        seen: by variant.
        short: whether full and sparse attention see the same of all tokens, and have the same gradients.
    """
    sparse = [variant for variant in seen if variant in _SPARSE]
    full = [variant for variant in seen if variant not in _SPARSE]
    errors: dict[str, dict[str, float]] = {variant: {} for variant in seen}
    for variant in seen:
        if full and variant != full[0]:
            errors[variant]["first tokens"] = _distance(seen[variant].first, seen[full[0]].first) / SAME
    for kind in (sparse, full):
        for variant in kind[1:]:
            apart = {"last tokens": _distance(seen[variant].last, seen[kind[0]].last) / SAME}
            apart |= _gradients_apart(seen[variant], seen[kind[0]])
            errors[variant] |= apart
            if kind is sparse:
                # Nobody knows which of the two is wrong.
                errors[kind[0]] |= apart
    if short and full:
        for variant in sparse:
            errors[variant] |= _gradients_apart(seen[variant], seen[full[0]])
    return errors


def _gradients_apart(x: Seen, y: Seen) -> dict[str, float]:
    if not (x.gradients and y.gradients):
        return {}
    distances = [_distance(a, b) for a, b in zip(x.gradients, y.gradients, strict=True)]
    # Not max(), which loses NaN.
    return {"gradients": torch.tensor(distances).amax().item() / SAME_GRADIENTS}


def _distance(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def _with_same_weights(model: Any) -> Any:
    """Modules of its own, with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _attention_by(variant: str) -> Any:
    return sdpa_kernel(_BACKENDS[variant]) if variant in _BACKENDS else contextlib.nullcontext()


def _inductor() -> Callable[..., Any]:
    """Compiles a graph."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """What compiled layers need, whatever was compiled before."""
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    # A compiled graph names a kernel of SDPA, but its key in the cache does not: another one would be measured.
    no_caches = torch._inductor.config.patch(force_disable_caches=True)
    # Buffers are given away whatever another suite said before.
    no_graphs = torch._functorch.config.patch(enable_autograd_cache=False, donated_buffer=True)
    # Four variants have graphs of their own of the same code, for training and for prefill; 8 is the default.
    many = torch._dynamo.config.patch(recompile_limit=16)
    with no_caches, no_graphs, many, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cuDNN Attention defaults to a non-deterministic.*")
        # Of torch.compile itself.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        try:
            yield
        finally:
            torch._dynamo.reset()


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While active, new tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _shape(name: str, layers: int, length: int, options: ModelOptions) -> dict[str, int | str]:
    widths = MODELS[name]
    return {
        "model": name,
        "layers": layers,
        "tokens": length,
        "heads": widths.fields["num_attention_heads"],
        "kv_heads": widths.fields["num_key_value_heads"],
        "head_dim": widths.head_dim,
        "dtype": str(options.dtype).removeprefix("torch."),
    }


def _clear(device: torch.device) -> None:
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
