"""`fsa tune`: measures which tiles and loop order of selected attention are the fastest on this machine."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..impl import interpreting, resolve
from ..validation import FLOAT_DTYPES, bad, check_choice, check_positive

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES if dtype.itemsize <= 4}
# What a line needs where nobody looks at a terminal: nothing is cut off or wrapped.
_PLAIN_WIDTH = 200


def tune(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    head_dim_v: Annotated[
        int | None, typer.Option(help="Channels of a head of the values.", show_default="as --head-dim")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a selection block.")] = 64,
    slots: Annotated[int, typer.Option(help="Blocks that a query selects.")] = 16,
    dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = "bfloat16",
    lengths: Annotated[
        list[int] | None,
        typer.Option(help="Tokens to measure at; may be repeated.", show_default="8192 and 65536"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for the candidates of a length.")] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Shows what it found, and stores nothing.")] = False,
) -> None:
    """Measure the tiles and loop orders of selected attention here, and keep the fastest for this user.

    A choice counts for this shape on this kind of device, at lengths up to a factor of 4 away. Needs a CUDA device.
    """
    sizes = {"--heads": heads, "--kv-heads": kv_heads, "--head-dim": head_dim, "--block-size": block_size}
    sizes |= {"--slots": slots} if head_dim_v is None else {"--slots": slots, "--head-dim-v": head_dim_v}
    for name, size in sizes.items():
        check_positive(name, size)
    lengths = list(dict.fromkeys(lengths or (8192, 65536)))
    for length in lengths:
        check_positive("--lengths", length)
    if heads % kv_heads:
        cure = "every key/value head serves an equal group of query heads"
        raise bad("--heads", f"a multiple of --kv-heads={kv_heads}", heads, cure)
    check_choice("--dtype", dtype, _DTYPES)
    if not seconds > 0:
        raise bad("--seconds", "more than 0", seconds)
    dim_v = head_dim if head_dim_v is None else head_dim_v
    device = _device()
    resolve("selected_attention", "triton", device, _DTYPES[dtype], max(head_dim, dim_v))

    from ..impl.triton import tuning

    file = tuning.tuning_file()
    if not dry_run:
        tuning.read_entries(file)  # Refuses a file that cannot be added to, before the work.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    console.print(
        f"Selected attention, {heads}/{kv_heads} heads of {head_dim}/{dim_v}, blocks of {block_size}, {dtype}"
    )
    entries = []
    for length in lengths:
        shape = tuning.SelectedShape(
            length, kv_heads, heads // kv_heads, slots, block_size, head_dim, dim_v, _DTYPES[dtype]
        )
        entry = _measure(shape, device, seconds, console)
        entries.append(entry)
        if not dry_run:
            tuning.store(entry)
    _print_table(entries, tuning.LOOP_ORDERS, console)
    kept = "Stored nothing, as this is a dry run." if dry_run else f"Stored in {escape(str(file))}"
    console.print(kept, soft_wrap=True)


def _device() -> torch.device:
    """The CUDA device; refuses a machine that kernels cannot be measured on."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "fsa tune measures Triton kernels, and Triton is not installed: "
            "pip install 'flash-sparse-attention[triton]'"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "fsa tune measures kernels on a CUDA device, and PyTorch finds none: run it on the machine that the model "
            "runs on, and see fsa inspect for what runs here"
        )
    if interpreting():
        raise ValueError("fsa tune measures compiled kernels, and TRITON_INTERPRET is set: unset it")
    return torch.device("cuda", torch.cuda.current_device())


def _measure(shape: Any, device: torch.device, seconds: float, console: Console) -> Any:
    """The entry of one length. Shows the progress on a terminal, and why candidates are out anywhere."""
    from ..impl.triton import measure

    total = {name: len(tiles) for name, tiles in measure.candidates(shape)._asdict().items()}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[best]}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{shape.total_tokens:,} tokens", total=sum(total.values()), best="")
        fastest: dict[str, float] = {}

        def show(step: Any) -> None:
            done = sum(list(total.values())[: measure.KERNELS.index(step.kernel)]) + step.number
            if step.ms is None:
                console.print(f"[dim]left out: {step.kernel} {describe(step.tiles)}: {escape(step.problem)}[/]")
            else:
                fastest[step.kernel] = min(step.ms, fastest.get(step.kernel, step.ms))
            best = f"{fastest[step.kernel]:.2f} ms" if step.kernel in fastest else ""
            description = f"{shape.total_tokens:,} tokens, {step.kernel}"
            progress.update(task, completed=done, description=description, best=best)

        try:
            return measure.tune(shape, device=device, seconds=seconds, progress=show)
        except torch.cuda.OutOfMemoryError as error:
            cure = "measure at fewer; the choice counts for lengths up to a factor of 4 away"
            raise bad("--lengths", "of tokens that the device has memory for", shape.total_tokens, cure) from error


def describe(tiles: Any) -> str:
    """Tiles in a few words."""
    keys, launch = f"{tiles.keys} keys", f"{_count(tiles.warps, 'warp')}, {_count(tiles.stages, 'stage')}"
    if not hasattr(tiles, "rows"):
        return f"{keys}, {launch}"
    near = ", near blocks dense" if tiles.dense_near else ""
    if tiles.specialized:
        return f"{tiles.rows} rows, {keys}, {tiles.segment_pairs} pairs, specialized warps{near}"
    registers = "" if tiles.registers is None else f", {tiles.registers} registers"
    return f"{tiles.rows} rows, {keys}, {tiles.segment_pairs} pairs, {launch}{registers}{near}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _print_table(entries: Sequence[Any], loop_orders: Sequence[str], console: Console) -> None:
    """For each length both loop orders with the best tiles, those taken if passes differ, and the built-in choice."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("loop order")
    for column in ("forward ms", "backward ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("best tiles")
    for entry in entries:
        tiles = {
            "kv_outer": f"{describe(entry.tiles.kv_outer_forward)}\n{describe(entry.tiles.kv_outer_backward)}",
            "query_outer": describe(entry.tiles.query_outer),
        }
        rows = [
            *((order, order, tiles[order]) for order in loop_orders),
            ("built_in", "default", "the built-in choice"),
        ]
        chosen = str(entry.loop_orders)
        if chosen not in tiles:
            rows.insert(len(loop_orders), (chosen, chosen, "those of each"))
        for number, (schedule, name, text) in enumerate(rows):
            tokens = "" if number else f"{entry.shape.total_tokens:,}"
            times = [f"{entry.ms[schedule][direction]:.3f}" for direction in ("forward", "backward")]
            taken = schedule == chosen
            table.add_row(tokens, f"{name} (taken)" if taken else name, *times, text, style="bold" if taken else None)
        table.add_section()
    console.print(table)
