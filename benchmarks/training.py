"""Training of a decoder of transformers at length, as `fsa train --model` does it, with sparse and with full attention.

    python benchmarks/training.py --output benchmarks/results/h200
    torchrun --standalone --nproc-per-node 2 benchmarks/training.py --name training_2 --output benchmarks/results/h200
    python benchmarks/training.py --quick      (tiny, on a CPU: whether it runs)

A model with the widths and the vocabulary of Qwen3-0.6B, `--layers` layers and random weights is written to a folder,
with a tokenizer that takes a byte for a token. The text is the sources of Python's standard library in documents of
exactly one sequence: of several documents in a sequence, transformers' `sdpa` would make a mask of 16 GiB at 131,072
tokens. Both variants train on the same sequences, `--batch-size` for each step (one for each process), with bf16
products and gradient checkpointing, from the same weights; tokens/s, MFU and peak memory are what `log.jsonl` says.
The first step compiles kernels; the median is over those behind the first two.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import flash_sparse_attention as fsa
from flash_sparse_attention.bench.machine import device_name, source_commit
from flash_sparse_attention.training import TrainConfig, log, train
from flash_sparse_attention.training.parallel import Group

# Of config.json of Qwen3-0.6B; its 28 layers are a flag.
WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QUICK = {**WIDTHS, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK |= {"head_dim": 16, "vocab_size": 320}
VARIANTS: dict[str, dict[str, Any]] = {"nsa": {"convert": True}, "full, sdpa": {"full_attention": "sdpa"}}
WARM_UP = 2  # steps


def write_model(folder: Path, widths: dict[str, Any], layers: int, length: int) -> None:
    """A random model and its tokenizer, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**widths, "num_hidden_layers": layers, "max_position_embeddings": length, "eos_token_id": 0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3", **sizes))
    model.save_pretrained(folder)


def sources() -> Iterator[str]:
    """Python's standard library, again and again."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        yield from (path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def write_documents(path: Path, count: int, length: int) -> None:
    """Documents of `length` tokens: bytes, and the end of the document."""
    texts, kept = sources(), ""
    with path.open("w", encoding="ascii") as file:
        for number in range(count):
            # The number makes documents differ where the library begins again.
            kept = f"# {number}\n{kept}"
            while len(kept) < length - 1:
                kept += next(texts).encode("ascii", errors="ignore").decode()
            file.write(json.dumps({"text": kept[: length - 1]}) + "\n")
            kept = kept[length - 1 :]


def about(device: torch.device, measured: str | None) -> dict[str, Any]:
    """What the report begins with."""
    found = {
        "command": "python benchmarks/training.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "flash_sparse_attention": fsa.__version__,
        "commit": measured,
        "dtype": "bfloat16",
    }
    if device.type == "cuda":
        # Here, as a CPU needs no Triton.
        import triton

        cudnn = torch.backends.cudnn.version()
        found |= {"triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def measure(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Trains, and reads the log."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(config, output)
    records = log.read(output / "log.jsonl")
    behind = records[min(WARM_UP, len(records) - 1) :]
    mfu = [record.mfu for record in behind if record.mfu is not None]
    return {
        "tokens_per_s": round(statistics.median(record.tokens_per_s for record in behind)),
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_memory_gib": records[-1].peak_memory_gib,
        "parameters": json.loads((output / "run.json").read_text())["num_parameters"],
        "nsa": config.nsa,
        "steps": [
            {
                "step": x.step,
                "loss": round(x.loss, 4),
                "tokens_per_s": round(x.tokens_per_s),
                "mfu": x.mfu,
                "peak_memory_gib": x.peak_memory_gib,
            }
            for x in records
        ],
        "eval_loss": records[-1].eval_loss,
    }


def main() -> None:
    """Trains both variants and writes what their logs say as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--full-steps", type=int, default=4, help="of full attention, which takes longer")
    parser.add_argument("--batch-size", type=int, default=None, help="sequences of a step; one for each process")
    parser.add_argument("--vocabulary", type=int, default=None, help="by default that of Qwen3-0.6B")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--compile", action="store_true", help="layers are compiled")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--commit", default=None, help="what to call the commit; by default what git says")
    parser.add_argument("--name", default="training", help="of the report")
    parser.add_argument("--output", type=Path, default=None, help="directory of the report")
    args = parser.parse_args()
    length = min(args.sequence_length, 512) if args.quick else args.sequence_length
    widths = dict(QUICK if args.quick else WIDTHS)
    if args.vocabulary is not None:
        widths["vocab_size"] = args.vocabulary
    group = Group.of_environment()
    config = TrainConfig(
        sequence_length=length,
        batch_size=args.batch_size or group.size,
        warmup_steps=2,
        learning_rate=3e-4,
        held_out_fraction=0.1,
        eval_packs=1,
        precision="bf16",
        gradient_checkpointing=True,
        compile=args.compile,
    )
    device = group.device(config.resolve_device())
    group.connect(device)
    report = about(device, args.commit or source_commit()) | {
        "transformers": transformers.__version__,
        "processes": group.size,
        "sequence_length": length,
        "sequences_of_a_step": config.batch_size,
        "layers": args.layers,
        "widths": widths,
        "variants": {},
    }
    # One folder for all processes of a torchrun, whose number they know.
    folder = Path(tempfile.gettempdir(), f"fsa-training-{os.getpid() if group.size == 1 else os.getppid()}")
    if group.first:
        folder.mkdir()
        write_model(folder / "model", widths, args.layers, length)
        write_documents(folder / "text.jsonl", (max(args.steps, args.full_steps) + 2) * config.batch_size, length)
    group.wait()
    try:
        for variant in args.variants:
            chosen = config.replace(
                paths=[str(folder / "text.jsonl")],
                pretrained=str(folder / "model"),
                token_cache=str(folder / "tokens"),
                steps=args.steps if variant == "nsa" else args.full_steps,
                **VARIANTS[variant],
            )
            row = measure(chosen, folder / variant.split(",")[0])
            report["variants"][variant] = row
            if group.first:
                shown = {key: row[key] for key in ("tokens_per_s", "mfu", "peak_memory_gib")}
                print(json.dumps({"processes": group.size, variant: shown}), flush=True)
                write(report, args.output, args.name)
        # The others read logs in it.
        group.wait()
    finally:
        if group.first:
            shutil.rmtree(folder, ignore_errors=True)


def write(report: dict[str, Any], folder: Path | None, name: str) -> None:
    """The report as far as it goes."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
