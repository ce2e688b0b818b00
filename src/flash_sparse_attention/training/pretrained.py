"""Models of transformers in training: loading, conversion, the loss of long packs, saving.

transformers is imported when a model is loaded, and not before. Every process of several loads all weights before they
are sharded.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as computed_again

from ..config import NSAConfig
from ..nn import Compressor, NativeSparseAttention
from ..types import SequenceLayout
from ..validation import bad
from .config import TrainConfig
from .data import Corpus, Pack
from .documents import optional
from .flops import AttentionCost, ModelCost, unused_weights
from .parallel import Group
from .tasks import Task
from .tokens import Tokenizer, read_tokens

# Logits that are there at once, in float32 1 GiB: those of 128K tokens would be 70 GiB for the vocabulary of Qwen3.
_LOGITS = 1 << 28
_TOKENS = "tokens"


class PackedCausalLM(nn.Module):
    """A causal language model of transformers, from packed tokens to the loss of each.

    Logits are computed for a part of the tokens at a time, and again in the backward pass, where the model's logits are
    those of its output layer alone; some models scale or cap them, which the first call finds out.

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` or `convert` returns.
        compiled: whether its layers are to be compiled.
        group: the processes that the model is spread over; all of them must call it alike.
    """

    def __init__(self, model: Any, compiled: bool = False, group: Group | None = None) -> None:
        super().__init__()
        self.model = model
        self.compiled = compiled
        self.group = Group() if group is None else group
        self.sparse = any(nsa_of(layer) is not None for layer in decoder_of(model).layers)
        self._hidden: Tensor | None = None
        self._plain_head: bool | None = None
        decoder_of(model).register_forward_hook(self._keep_hidden)

    def forward(self, tokens: Tensor, targets: Tensor, layout: SequenceLayout) -> Tensor:
        """-log p of each target (nats).

        Args:
            tokens: int64 `[N]`.
            targets: the token that follows each, int64 `[N]`.
            layout: bounds of the sequences.

        Returns:
            float32 `[N]`.
        """
        if self._plain_head is None or self._plain_head:
            # What the model does with the hidden states of one token shows whether it is its output layer alone.
            logits = self._logits(tokens, layout, logits_to_keep=1)
            hidden, self._hidden = self._hidden, None
            assert hidden is not None
            head = self.model.get_output_embeddings()
            if self._plain_head is None:
                with torch.no_grad():
                    # To the bit: a cap far above the logits of a young model hardly changes them. What is no number
                    # says nothing.
                    found, alone = (x.nan_to_num() for x in (logits[0], head(hidden[0, -1:])))
                    # One answer for all processes: to gather weights, each waits for the others.
                    self._plain_head = not self.group.largest(int(not torch.equal(found, alone)), hidden.device)
            if self._plain_head:
                return _losses(head, hidden[0], targets)
        logits = self._logits(tokens, layout)
        self._hidden = None
        return F.cross_entropy(logits[0].float(), targets, reduction="none")

    def _logits(self, tokens: Tensor, layout: SequenceLayout, **options: Any) -> Tensor:
        if self.sparse:
            options["layout"] = layout
        elif "flash" in str(self.model.config._attn_implementation):
            # The others make a mask out of the positions.
            if self.compiled:
                torch._dynamo.maybe_mark_dynamic(layout.cu_seqlens, 0)
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), layout.cu_seqlens)
            # An upper bound is enough, and one that does not change compiles once.
            options |= dict.fromkeys(("max_length_q", "max_length_k"), layout.total_tokens)
        positions = layout.positions()[None]
        return self.model(input_ids=tokens[None], position_ids=positions, use_cache=False, **options).logits

    def _keep_hidden(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state


class TransformersTask(Task):
    """The tokenizer and the model of a folder that `save_pretrained` wrote, converted to sparse attention or as it is.

    Args:
        config: of the run.
        folder: of the model and the tokenizer: `config.pretrained`, or the checkpoint to continue from.
        group: the processes of the run.

    Raises:
        ValueError: if transformers or the tokenizer is missing.
    """

    def __init__(self, config: TrainConfig, folder: str | Path, group: Group) -> None:
        super().__init__(config)
        self.group = group
        self.folder = str(folder)
        self.transformers = optional("transformers", "train", "training a model of transformers")
        # Makes converted models known to transformers.
        self.integration = importlib.import_module("flash_sparse_attention.integrations.transformers")
        found = _loaded(self.transformers.AutoTokenizer, self.folder, "a tokenizer")
        self.tokenizer = Tokenizer(found, self.folder)

    def read_corpus(self, output: Path, writes: bool, tokenised: Callable[[int, int], None]) -> Corpus:
        config = self.config
        return read_tokens(
            config.paths,
            tokenizer=self.tokenizer,
            cache=output / _TOKENS if config.token_cache is None else Path(config.token_cache).expanduser(),
            suffixes=config.suffixes,
            text_field=config.text_field,
            held_out_fraction=config.held_out_fraction,
            writes=writes,
            tokenised=tokenised,
        )

    def build(self, checkpoint: Path | None, max_token: int) -> PackedCausalLM:
        config = self.config
        options: dict[str, Any] = {"dtype": torch.float32}
        if config.full_attention is not None:
            options["attn_implementation"] = config.full_attention
        model = _loaded(self.transformers.AutoModelForCausalLM, self.folder, "a causal language model", **options)
        if config.convert and checkpoint is None:
            # What the conversion adds is drawn anew, and the caller's generator is left alone.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                model = self._convert(model)
        if config.impl != "auto":
            for module in model.modules():
                if isinstance(module, (NativeSparseAttention, Compressor)):
                    module.impl = config.impl
        largest, known = max(max_token, self.tokenizer.beginning), model.get_input_embeddings().num_embeddings
        if largest >= known:
            expected = f"a model with embeddings for all tokens of the text, up to {largest}"
            raise bad("pretrained", expected, f"{self.folder!r} with {known}", "its tokenizer is another model's")
        if config.gradient_checkpointing:
            _enable_checkpointing(model)
        return PackedCausalLM(model, config.compile, self.group)

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, PackedCausalLM)
        return list(decoder_of(model.model).layers)

    def losses(self, model: nn.Module, pack: Pack) -> Tensor:
        return model(pack.tokens, pack.targets, pack.layout)

    def cost(self, model: nn.Module) -> ModelCost:
        assert isinstance(model, PackedCausalLM)
        causal = model.model
        sizes = causal.config.get_text_config()
        heads = sizes.num_attention_heads
        channels = heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
        kinds = getattr(sizes, "layer_types", None) or ["full_attention"] * sizes.num_hidden_layers
        # Models without kinds of layers have a window in all of them, or none.
        window = getattr(sizes, "sliding_window", None)
        everywhere = getattr(sizes, "layer_types", None) is None
        attention = []
        for layer, kind in zip(self.layers(model), kinds, strict=True):
            nsa = nsa_of(layer)
            windowed = nsa is None and (everywhere or kind == "sliding_attention")
            attention.append(AttentionCost(channels, nsa, window if windowed else None))
        table = causal.get_input_embeddings().weight
        tied = causal.get_output_embeddings().weight is table
        trained = sum(x.numel() for x in causal.parameters() if x.requires_grad)
        lookup = 0 if tied or not table.requires_grad else table.numel()
        return ModelCost(trained - lookup - unused_weights(causal), tuple(attention))

    def saved(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, PackedCausalLM)
        return model.model

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        assert isinstance(model, PackedCausalLM)
        return model.model.config.to_diff_dict()

    def write_model(self, model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
        assert isinstance(model, PackedCausalLM)
        with _without_bars():
            model.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.tokenizer.save_pretrained(folder)

    def _convert(self, model: Any) -> Any:
        config = self.config
        nsa = self.integration.conversion_config(**config.nsa)
        return self.integration.convert(model, nsa, layers=config.convert_layers, impl=config.impl)


def decoder_of(model: Any) -> Any:
    """What of a causal language model is below the output layer.

    Raises:
        ValueError: if it has no list of layers.
    """
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise bad("pretrained", "a decoder with a list of layers, as Llama and Qwen3 are", type(model).__name__)
    return decoder


def nsa_of(layer: nn.Module) -> NSAConfig | None:
    """The hyper-parameters of a layer with sparse attention; None for one without."""
    return next((nsa for nsa in map(_nsa_in, layer.modules()) if nsa is not None), None)


def _nsa_in(module: nn.Module) -> NSAConfig | None:
    return next((value for value in vars(module).values() if isinstance(value, NSAConfig)), None)


def _losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target from hidden states `[N, D]`, a part at a time."""
    width = head.get_parameter("weight").shape[0]
    rows = max(1, _LOGITS // width)
    if len(hidden) <= rows:
        return _losses_of(head, hidden, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([computed_again(_losses_of, head, *part, use_reentrant=False) for part in parts])


def _losses_of(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _loaded(auto: Any, folder: str, what: str, **options: Any) -> Any:
    """`auto.from_pretrained`, of a folder only: nothing is downloaded."""
    if not Path(folder).expanduser().is_dir():
        raise bad("pretrained", "a folder that `save_pretrained` wrote", f"{folder!r}, which is none")
    try:
        with _without_bars():
            return auto.from_pretrained(str(Path(folder).expanduser()), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise bad("pretrained", f"a folder with {what}", f"{folder!r} ({reason})") from error


def _enable_checkpointing(model: Any) -> None:
    """Layers keep their inputs only, under the name that this version of transformers has for it."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws no bars of its own, which would run into ours."""
    logging = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
