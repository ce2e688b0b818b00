"""`fsa inspect`: which implementation computes what, and what a trained model selects and gates."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import __version__
from ..analysis import layer_labels, summarize
from ..config import NSAConfig
from ..impl import explain
from ..nn import AttentionRecord, LanguageModel, record_attention
from ..nn.attention import BRANCHES
from ..selections import RecordedSelections, neighbour_overlap, save_selections
from ..training import END_OF_TEXT, VOCAB_SIZE, CheckpointState, find_checkpoint, load_model, resolve_device
from ..training.checkpoint import read_byte_state, versions
from ..training.data import encode
from ..training.files import megabytes
from ..validation import FLOAT_DTYPES, bad, check_choice, check_positive
from .layers import layer_numbers

# Shapes whose loop order is shown: heads of a group, tokens; those of `fsa tune` without options are among them.
_GROUPS, _LENGTHS = (1, 4, 8, 16, 32), (8192, 65536)
_HEADS, _HEAD_DIM, _SLOTS, _BLOCK_SIZE = 32, 128, 16, 64

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def inspect(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Directory of a run or of one of its checkpoints. Left out: only the table of implementations."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="File that the model shall read.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that the model shall read, instead of a file.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the numbers.")] = Path("inspection"),
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut to this many tokens (bytes).")] = 4096,
    pictures: Annotated[bool, typer.Option(help="Draw selection.png and gates.png.")] = True,
    dump: Annotated[
        Path | None, typer.Option(help="File to write the selections to, for selections.load_selections.")
    ] = None,
    dump_layers: Annotated[
        str | None, typer.Option(help="Layers whose selections are written, as 0-3,6.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"auto, {', '.join(_DTYPES)}.")] = "auto",
) -> None:
    """Show which implementation computes what; with a checkpoint, draw what it selects and how it gates.

    Writes selection.png, gates.png and summary.json, and with --dump the selections themselves.
    """
    chosen_device = resolve_device(device)
    check_choice("dtype", dtype, ("auto", *_DTYPES))
    if dtype == "auto":
        dtype = "bfloat16" if chosen_device.type == "cuda" else "float32"
    check_positive("max_tokens", max_tokens)
    if dump is None and dump_layers is not None:
        raise bad("--dump-layers", "left out without --dump", repr(dump_layers), "name the file, --dump FILE.npz")
    if checkpoint is None:
        if text is not None or prompt is not None:
            raise bad("checkpoint", "given for a text to read", None, "name a run, or leave --text and --prompt out")
        if dump is not None:
            raise bad("checkpoint", "given for --dump", None, "name a run, or leave --dump out")
        _print_versions(chosen_device)
        _print_implementations(chosen_device, _DTYPES[dtype])
        if importlib.util.find_spec("triton") is not None:
            _print_loop_orders()
        return

    content = _content(text, prompt)
    config, num_layers = _sparse_config(checkpoint)
    tokens = _tokens(content, config, max_tokens)
    dumped = _dumped_layers(dump_layers, num_layers)
    model, state = load_model(checkpoint, device=chosen_device)
    records = _read(model.to(_DTYPES[dtype]), tokens.to(chosen_device))
    sizes = {name: getattr(config, name) for name in ("block_size", "num_init_blocks", "num_local_blocks")}
    made = ["summary.json"]
    if pictures:
        made = [*_draw(records, sizes, output), *made]
    summary = {
        "checkpoint": str(find_checkpoint(checkpoint)),
        "step": state.step,
        "tokens": len(tokens),
        "device": _device_name(chosen_device),
        "dtype": dtype,
        "nsa": config.to_dict(),
        "layers": summarize(records, **sizes),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_summary(summary)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{'Pictures and numbers' if pictures else 'Numbers'} are in {output}: {', '.join(made)}")
    if dump is not None:
        layers = {name: records[name].block_indices.cpu() for name in [list(records)[i] for i in dumped]}
        origin = _origin(state, tokens, summary)
        save_selections(dump, RecordedSelections(config, layers, origin))
        shared = neighbour_overlap(torch.cat(list(layers.values()), 1), **sizes)
        console.print(
            f"Selections of {_count(len(layers), 'layer')} over {len(tokens):,} tokens are in {dump} "
            f"({megabytes(dump.expanduser().stat().st_size)}); neighbouring queries share {shared:.0%} of the blocks "
            f"that they choose"
        )


def _content(text: Path | None, prompt: str | None) -> list[int]:
    """The bytes to read."""
    if (text is None) == (prompt is None):
        got = "neither" if text is None else "both"
        raise bad("text", "one of --text FILE and --prompt TEXT", got, "the model needs something to read")
    if prompt is not None:
        return encode(prompt)
    assert text is not None
    try:
        return list(text.expanduser().read_bytes())
    except OSError as error:
        raise bad("--text", "a file that can be read", f"{str(text)!r} ({error.strerror})") from error


def _sparse_config(checkpoint: Path) -> tuple[NSAConfig, int]:
    """Sizes of the sparse attention of the checkpoint, and its number of layers.

    Refuses one that has no sparse attention, or reads no bytes.
    """
    model_config = read_byte_state(find_checkpoint(checkpoint)).model_config
    if model_config["attention"] != "nsa":
        got = f"{str(checkpoint)!r}, whose model has attention={model_config['attention']!r}"
        raise bad("checkpoint", "one of a model with sparse attention", got, "full attention selects no blocks")
    if model_config["vocab_size"] != VOCAB_SIZE:
        got = f"one of {model_config['vocab_size']} tokens"
        raise bad("checkpoint", f"one of a model of bytes, with {VOCAB_SIZE} tokens", got)
    return NSAConfig.from_dict(model_config["nsa"]), model_config["num_layers"]


def _tokens(content: list[int], config: NSAConfig, max_tokens: int) -> Tensor:
    """What the model sees, int64 `[N]`: the mark that a text begins, and its bytes."""
    # The first token that has a block before it which is not forced.
    needed = (config.num_init_blocks + config.num_local_blocks) * config.block_size + 1
    cure = f"the first {config.num_init_blocks} and the newest {config.num_local_blocks} blocks are forced"
    if max_tokens < needed:
        raise bad("max_tokens", f"at least {needed}, so that there are blocks to choose from", max_tokens, cure)
    if len(content) < needed - 1:
        expected = f"a text of at least {needed - 1} bytes, so that there are blocks to choose from"
        raise bad("text", expected, f"{len(content)} bytes" if content else "an empty one", cure)
    return torch.tensor([END_OF_TEXT, *content[: max_tokens - 1]])


def _dumped_layers(numbers: str | None, num_layers: int) -> list[int]:
    """The layers to write, ascending."""
    if numbers is None:
        return list(range(num_layers))
    chosen = sorted(set(layer_numbers("--dump-layers", numbers)))
    if chosen[-1] >= num_layers:
        raise bad("--dump-layers", f"layers of the model, 0 to {num_layers - 1}", chosen[-1])
    return chosen


def _read(model: LanguageModel, tokens: Tensor) -> dict[str, AttentionRecord]:
    """What the layers record while the model reads the text once."""
    with record_attention(model) as records, torch.inference_mode():
        model(tokens)
    return records


def _draw(records: Mapping[str, AttentionRecord], sizes: dict[str, int], output: Path) -> list[str]:
    """Draws what was recorded, and returns the names of the pictures."""
    from ..plots import gates_figure, save_png, selection_figure

    selections = {name: record.block_indices for name, record in records.items()}
    save_png(selection_figure(selections, **sizes), output / "selection.png")
    save_png(gates_figure({name: record.gates for name, record in records.items()}), output / "gates.png")
    return ["selection.png", "gates.png"]


def _origin(state: CheckpointState, tokens: Tensor, summary: dict[str, Any]) -> dict[str, Any]:
    """Where selections come from. Of the text only a hash: it may be anyone's, and the file is to be passed on."""
    text = bytes(tokens[1:].tolist())
    return {
        "model": state.model_config,
        "step": state.step,
        "text_sha256": hashlib.sha256(text).hexdigest(),
        "device": summary["device"],
        "dtype": summary["dtype"],
        "versions": versions(),
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _print_versions(device: torch.device) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("flash-sparse-attention", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton_version()),
        ("device", _device_name(device)),
    ):
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def _print_implementations(device: torch.device, dtype: torch.dtype) -> None:
    table = Table(
        title=f'What impl="auto" takes on {device.type} for {str(dtype).removeprefix("torch.")}', title_justify="left"
    )
    for column in ("operator", "implementation", "taken", "why, or why not"):
        table.add_column(column)
    previous = ""
    for decision in explain(device, dtype):
        operator = decision.operator if decision.operator != previous else ""
        if operator and previous:
            table.add_section()
        previous = decision.operator
        taken = "yes" if decision.chosen else "no"
        table.add_row(operator, decision.impl, taken, decision.reason, style="bold" if decision.chosen else "dim")
    Console(markup=False, highlight=False).print(table)


def _print_loop_orders() -> None:
    """The schedule of selected attention that its Triton kernels take by themselves, for a few shapes."""
    from ..impl.triton import tuning

    sizes = f"{_HEADS} heads of {_HEAD_DIM}, T = {_SLOTS}, blocks of {_BLOCK_SIZE}, bfloat16"
    table = Table(title=f'What loop_order="auto" takes in Triton, {sizes}', title_justify="left")
    for column in ("heads of a group", "tokens"):
        table.add_column(column, justify="right")
    for column in ("loop order", "from"):
        table.add_column(column)
    tuned = False
    for group in _GROUPS:
        for length in _LENGTHS:
            shape = tuning.SelectedShape(
                length, _HEADS // group, group, _SLOTS, _BLOCK_SIZE, _HEAD_DIM, _HEAD_DIM, torch.bfloat16
            )
            choice = tuning.choice_of(shape)
            tuned = tuned or choice.entry is not None
            origin = "built in" if choice.entry is None else f"tuned at {choice.entry.shape.total_tokens:,} tokens"
            table.add_row(str(group), f"{length:,}", str(choice.loop_orders), origin)
    console = Console(markup=False, highlight=False)
    console.print(table)
    if tuned:
        console.print(f"Tuned choices are in {tuning.tuning_file()}", soft_wrap=True)


def _print_summary(summary: dict[str, Any]) -> None:
    """A line for each layer, means over its heads. The distance is from the chosen blocks to the query's own."""
    block_size = summary["nsa"]["block_size"]
    title = f"{summary['checkpoint']}, step {summary['step']:,}, over {summary['tokens']:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    for branch in BRANCHES:
        table.add_column(f"gate\n{branch}", justify="right")
    for column in ("chosen blocks\na query", "distance\n(blocks)", "distance\n(tokens)"):
        table.add_column(column, justify="right")
    for label, layer in zip(layer_labels(summary["layers"]), summary["layers"].values(), strict=True):
        gates = [_mean([head[branch] for head in layer["gates"]]) for branch in BRANCHES]
        per_query = _mean([head["per_query"] for head in layer["chosen"]])
        known = [head["mean_distance"] for head in layer["chosen"] if head["mean_distance"] is not None]
        distance = [f"{_mean(known):.1f}", f"{_mean(known) * block_size:,.0f}"] if known else ["-", "-"]
        table.add_row(label, *(f"{gate:.2f}" for gate in gates), f"{per_query:.1f}", *distance)
    Console(markup=False, highlight=False).print(table)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
