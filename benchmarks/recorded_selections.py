"""Records what a trained model selects, for benchmarks: the file that `selections.recorded_selections` reads.

    python benchmarks/recorded_selections.py                                          # on a GPU

Trains a model of bytes with the paper's sizes on the sources of Python's standard library (4 layers of 2 KV heads),
lets it read the files that training held out, one behind the other, and writes what its upper layers select
(`--layers`; of all four the file would be larger than 1.5 MB). These are `fsa train` and `fsa inspect --dump`; it
prints their command lines. The defaults are for a GPU, on a CPU a short run is

    python benchmarks/recorded_selections.py --steps 120 --sequence-length 8192 --tokens 16384 --hidden-size 128 \
        --head-dim 16 --device cpu --output selections.npz
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from contextlib import nullcontext
from pathlib import Path

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.cli import app
from flash_sparse_attention.selections import PACKAGED_FILE, load_selections, neighbour_overlap
from flash_sparse_attention.training import END_OF_TEXT, read_corpus

LAYERS, HEADS, KV_HEADS = 4, 8, 2
# Every option of sparse attention is named, as the defaults of `fsa train` are smaller than the paper's.
SPARSE = {f"--{name.replace('_', '-')}": str(value) for name, value in NSAConfig().to_dict().items()}


def held_out_text(length: int) -> bytes:
    """The first bytes of the files that `fsa train` holds out by default, one behind the other."""
    documents = read_corpus().held_out
    text = bytes(documents.tokens[documents.tokens != END_OF_TEXT].tolist())
    if len(text) < length:
        raise SystemExit(f"{len(text):,} bytes are held out here, fewer than --tokens")
    return text[:length]


def fsa(*words: str) -> None:
    """Runs the command, and says so."""
    print(f"$ fsa {shlex.join(words)}", flush=True)
    app(list(words), standalone_mode=False)


def main() -> None:
    """Trains, reads, writes; shows how much neighbouring queries share, layer by layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sequence-length", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=32768, help="that are read for the file")
    parser.add_argument("--layers", default="1-3", help="that are recorded")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", type=Path, help="folder for the run, which stays; a temporary one by default")
    parser.add_argument("--output", type=Path, default=PACKAGED_FILE)
    arguments = parser.parse_args()
    with nullcontext(arguments.run) if arguments.run else tempfile.TemporaryDirectory() as folder:
        run, text = Path(folder) / "run", Path(folder) / "held_out.txt"
        model = {
            "--num-layers": LAYERS,
            "--num-heads": HEADS,
            "--num-kv-heads": KV_HEADS,
            "--hidden-size": arguments.hidden_size,
            "--intermediate-size": arguments.hidden_size * 11 // 4,
            "--head-dim": arguments.head_dim,
            **SPARSE,
        }
        schedule = {
            "--steps": arguments.steps,
            "--sequence-length": arguments.sequence_length,
            "--eval-every": max(1, arguments.steps // 4),
            "--eval-packs": 2,
            "--save-every": arguments.steps,
            "--device": arguments.device,
            "--output": run,
        }
        fsa("train", *(str(word) for option in (schedule | model).items() for word in option))
        # One token less: what the model reads begins with the mark of a text's beginning.
        text.write_bytes(held_out_text(arguments.tokens - 1))
        fsa(
            *("inspect", str(run), "--text", str(text), "--max-tokens", str(arguments.tokens)),
            *("--dump", str(arguments.output), "--output", str(Path(folder) / "inspection"), "--no-pictures"),
            *("--device", arguments.device, "--dump-layers", arguments.layers),
        )
    recorded = load_selections(arguments.output)
    sizes = {name: getattr(recorded.config, name) for name in ("block_size", "num_init_blocks", "num_local_blocks")}
    for name, indices in recorded.layers.items():
        shared = (neighbour_overlap(indices[:, [head]], **sizes) for head in range(indices.shape[1]))
        print(f"{name}: {', '.join(f'{share:.3f}' for share in shared)} of the chosen blocks shared, by KV head")


if __name__ == "__main__":
    main()
