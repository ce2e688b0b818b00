"""Checkpoints: directories `step-00000100` of plain tensors and JSON, written whole or not at all.

    runs/nsa/step-00000100/model.safetensors      the weights, by name; a tied weight once
                           optimizer.safetensors  the optimizer's tensors, `NAME OF THE WEIGHT:exp_avg`
                           state.json             everything else: `CheckpointState`

Models of transformers are written as `save_pretrained` does, so that `from_pretrained` loads the directory. Weights and
state that are spread over processes are written whole, by the first of them: any number may go on from there.

A checkpoint is written into a hidden directory beside its place, flushed to the disk, and then renamed: at any moment,
whatever fails, a directory called `step-*` is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from ..nn import LanguageModel, LanguageModelConfig
from ..validation import bad
from .files import flush, megabytes
from .parallel import spread_as, whole

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"
# Room for state.json, the headers and the file system's own books.
_SPARE_BYTES = 1 << 20


def versions() -> dict[str, str]:
    """Versions of what computed a run, by name."""
    return {"flash_sparse_attention": __version__, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True)
class CheckpointState:
    """All of a checkpoint but the tensors.

    Attributes:
        step: optimizer steps done.
        train_config: `TrainConfig.to_dict()` of the run.
        model_config: `LanguageModelConfig.to_dict()` of the model; for one of transformers, what differs from the
            defaults of its configuration.
        text_fingerprint: `Corpus.fingerprint` of the text.
        total_tokens: tokens trained on so far; the log goes on from here.
        elapsed_s: seconds that the run has taken so far; the log goes on from here.
        optimizer_scalars: what the optimizer holds for each weight besides tensors, `NAME OF THE WEIGHT:step`.
        versions: of the software that wrote it.
    """

    step: int
    train_config: dict[str, Any]
    model_config: dict[str, Any]
    text_fingerprint: str
    total_tokens: int
    elapsed_s: float
    optimizer_scalars: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)


def save_checkpoint(
    directory: Path,
    state: CheckpointState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep_last: int,
    write_model: Callable[[dict[str, Tensor], Path], None] | None = None,
    writes: bool = True,
) -> Path:
    """Writes the checkpoint of `state.step` into `directory`, then removes all but the newest `keep_last`.

    Args:
        directory: of the run.
        state: all but the tensors.
        model: whose weights are saved.
        optimizer: of these.
        keep_last: checkpoints that stay.
        write_model: writes weights by name into a directory; None for `model.safetensors`.
        writes: whether this process writes; others only send their part of weights and state, and must call this too.

    Returns:
        The directory of the checkpoint.

    Raises:
        OSError: if it cannot be written, on a full disk for one. What was written is removed; earlier checkpoints stay.
        ValueError: if there is a checkpoint of this step already.
    """
    weights = _whole(_unique_tensors(model), writes)
    tensors, scalars = _flatten(model, optimizer)
    tensors = _whole(tensors, writes)
    place = directory / f"step-{state.step:08d}"
    if not writes:
        return place
    if place.exists():
        raise bad("step", "one without a checkpoint", f"{state.step}, whose checkpoint is {place}")
    needed = _bytes_of(weights) + _bytes_of(tensors) + _SPARE_BYTES
    unfinished = directory / f"{_UNFINISHED}{place.name}"
    with _explained(place, needed):
        directory.mkdir(parents=True, exist_ok=True)
        # A run that was killed leaves these behind.
        for left in directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left)
        check_space(place, needed)
        try:
            unfinished.mkdir()
            if write_model is None:
                safetensors.torch.save_file(weights, unfinished / MODEL_FILE, metadata={"format": "pt"})
            else:
                write_model(weights, unfinished)
            safetensors.torch.save_file(tensors, unfinished / OPTIMIZER_FILE)
            written = dataclasses.replace(state, optimizer_scalars=scalars)
            text = json.dumps({"format": _FORMAT, **dataclasses.asdict(written)}, indent=1)
            (unfinished / STATE_FILE).write_text(text + "\n", encoding="utf-8")
            for file in (*unfinished.iterdir(), unfinished):
                flush(file)
            os.replace(unfinished, place)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        flush(directory)
    _remove_oldest(directory, keep_last)
    return place


def check_space(place: Path, needed: int) -> None:
    """The disk of `place`, whose parent exists, has `needed` bytes free.

    Raises:
        OSError: if it has not.
    """
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        raise OSError(
            f"checkpoint {place} needs {megabytes(needed)}, but {megabytes(free)} are free on its disk: make room"
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes on disk of a checkpoint of a model in training: its weights, and two of AdamW's tensors for each."""
    trained = {name: x for name, x in _unique_tensors(model).items() if x.requires_grad}
    return _bytes_of(_unique_tensors(model)) + 2 * _bytes_of(trained) + _SPARE_BYTES


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; none if the directory does not exist."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest one of a run.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(path).expanduser()
    if (path / STATE_FILE).is_file():
        return path
    found = checkpoints(path)
    if found:
        return found[-1]
    if not path.exists():
        what = "which does not exist"
    elif _NAME.fullmatch(path.name):
        what = f"which lacks {STATE_FILE}"
    else:
        what = "which is a file" if path.is_file() else "which holds no step-*"
    raise bad(
        "checkpoint", "the directory of a run or of one of its checkpoints", f"{str(path)!r}, {what}", "see `fsa train`"
    )


def read_state(checkpoint: Path) -> CheckpointState:
    """What `state.json` of the checkpoint says.

    Raises:
        ValueError: if it is missing, damaged, or of another version of the format.
    """
    file = checkpoint / STATE_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad(str(file), "a file that can be read", error.strerror, "choose another checkpoint") from error
    except ValueError as error:
        raise bad(str(file), "JSON", str(error), "the file is damaged; choose another checkpoint") from error
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise bad(
            str(file), f"the state of a checkpoint of format {_FORMAT}", "something else", "choose another checkpoint"
        )
    wanted = {item.name for item in dataclasses.fields(CheckpointState)}
    if set(values) != wanted:
        raise bad(str(file), f"made of {', '.join(sorted(wanted))}", ", ".join(sorted(values)), "the file is damaged")
    return CheckpointState(**values)


def read_byte_state(checkpoint: Path) -> CheckpointState:
    """What `read_state` says, of a checkpoint of a `LanguageModel` of bytes.

    Raises:
        ValueError: as `read_state`, and if the model is one of transformers.
    """
    state = read_state(checkpoint)
    if state.train_config.get("pretrained") is not None:
        cure = f"use transformers: AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}), and generate() of that"
        raise bad("checkpoint", "that of a model of bytes", f"{str(checkpoint)!r}, of a model of transformers", cure)
    return state


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Puts the weights of the checkpoint into `model`.

    Raises:
        ValueError: if the file is missing or damaged, or holds other tensors than the model has.
    """
    _load(checkpoint / MODEL_FILE, _unique_tensors(model), "the weights of this model")


def load_optimizer(
    checkpoint: Path, state: CheckpointState, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Puts the state of the optimizer, made by `save_checkpoint` with the same kind of optimizer, into `optimizer`.

    Raises:
        ValueError: if the file is missing or damaged, or does not fit the weights of the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = {name: parameter for parameter, name in names.items()}
    wanted = {
        f"{names[p]}:{key}": torch.empty(p.shape, dtype=p.dtype)
        for group in optimizer.param_groups
        for p in group["params"]
        for key in ("exp_avg", "exp_avg_sq")
        if f"{names[p]}:step" in state.optimizer_scalars
    }
    _load(checkpoint / OPTIMIZER_FILE, wanted, "the optimizer's tensors for this model")
    full = optimizer.state_dict()
    ordered = [names[p] for group in optimizer.param_groups for p in group["params"]]
    full["state"] = {
        index: {
            "step": torch.tensor(state.optimizer_scalars[f"{name}:step"], dtype=torch.float32),
            **{key: spread_as(wanted[f"{name}:{key}"], parameters[name]) for key in ("exp_avg", "exp_avg_sq")},
        }
        for index, name in enumerate(ordered)
        if f"{name}:step" in state.optimizer_scalars
    }
    optimizer.load_state_dict(full)


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", impl: str = "auto"
) -> tuple[LanguageModel, CheckpointState]:
    """The model of a checkpoint, in evaluation mode, and what else the checkpoint says.

    Args:
        path: directory of a checkpoint, or of a run, whose newest checkpoint is taken.
        device: where the model shall be.
        impl: implementation of the operators, see `functional`.

    Raises:
        ValueError: if there is no checkpoint, or it is damaged.
    """
    checkpoint = find_checkpoint(path)
    state = read_byte_state(checkpoint)
    model = LanguageModel(LanguageModelConfig.from_dict(state.model_config), impl=impl)
    load_weights(checkpoint, model)
    return model.to(device).eval(), state


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; a tied one under its first name only, as safetensors wants it."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    # keep_vars: the parameters themselves, which are one object where they are tied.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _whole(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors that may be spread over processes, contiguous; nothing where they are not to be kept."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor, keep)
        if full is not None:
            found[name] = full.contiguous()
    return found


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The optimizer's state by `NAME OF THE WEIGHT:key`: tensors, and scalars."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                tensors[f"{name}:{key}"] = value
            else:
                scalars[f"{name}:{key}"] = float(value)
    return tensors, scalars


def _load(file: Path, wanted: dict[str, Tensor], what: str) -> None:
    """Fills the tensors in `wanted` from a file that must hold exactly these."""
    if not file.is_file():
        raise bad(str(file), what, "no such file", "choose another checkpoint")
    try:
        with safetensors.safe_open(file, framework="pt") as stored, torch.no_grad():
            shapes = {name: list(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
            expected = {name: list(tensor.shape) for name, tensor in wanted.items()}
            differing = [
                f"{name} must be {expected.get(name, 'absent')}, got {shapes.get(name, 'none')}"
                for name in sorted({*expected, *shapes})
                if expected.get(name) != shapes.get(name)
            ]
            if differing:
                listed = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
                raise ValueError(f"{file} does not hold {what}: {listed}; use the configuration that it was made with")
            for name, tensor in wanted.items():
                tensor.copy_(stored.get_tensor(name))
    except safetensors.SafetensorError as error:
        raise bad(str(file), "a safetensors file", str(error), "it is damaged; choose another checkpoint") from error


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


@contextlib.contextmanager
def _explained(place: Path, needed: int) -> Iterator[None]:
    """Errors of the disk name the checkpoint and the space. safetensors wraps those it meets in its own class."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise
        free = "an unknown amount is"
        with contextlib.suppress(OSError):
            free = f"{megabytes(shutil.disk_usage(place.parent).free)} are"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OSError(
            f"checkpoint {place} could not be written ({reason}): it needs {megabytes(needed)}, {free} free on its "
            f"disk; earlier checkpoints are as they were"
        ) from error


def _remove_oldest(directory: Path, keep_last: int) -> None:
    for old in checkpoints(directory)[:-keep_last]:
        remove_checkpoint(old)


def remove_checkpoint(place: Path) -> None:
    """Removes a checkpoint, such that a half-removed one is never taken for a whole; warns if it cannot."""
    hidden = place.with_name(f"{_UNFINISHED}removed-{place.name}")
    try:
        os.replace(place, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        warnings.warn(f"old checkpoint {place} could not be removed: {error}", stacklevel=2)
