"""From full to sparse attention: a model trained with full attention here, converted, warmed up, and trained on.

    python benchmarks/conversion.py --output benchmarks/results/h200

Trains a decoder of `nn.LanguageModel` with full attention on source files (bytes as tokens; those of Python's standard
library, and of the installed PyTorch), hands its weights to transformers' `LlamaForCausalLM`, and measures perplexity
on held-out files of at least 16,384 bytes, cut into texts of 4,096 to 16,384 tokens: of the original, right after
`convert`, during `warm_up`, and during training on. The same bytes are predicted in all columns, but those of a longer
text with more before them. Writes JSON and a plot; `--plot-only` draws the JSON again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flash_sparse_attention as fsa
from flash_sparse_attention import NSAConfig
from flash_sparse_attention.bench.machine import source_commit
from flash_sparse_attention.integrations.transformers import conversion_config, convert, warm_up
from flash_sparse_attention.nn import LanguageModel
from flash_sparse_attention.training import VOCAB_SIZE, TrainConfig, load_model, read_corpus, train
from flash_sparse_attention.training.data import Documents, TrainingPacks

LENGTHS = (4096, 8192, 16384)
SHORT = 512
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "rope_theta": 500000.0,
    "attention": "full",
}
TRAINED_ON_RATE = 2e-4


def settings(steps: int, paths: list[str], device: str) -> TrainConfig:
    """The run that makes the original."""
    return TrainConfig.from_dict(
        {
            "paths": paths,
            "suffixes": [".py"],
            "sequence_length": LENGTHS[-1],
            "batch_size": 2,
            "steps": steps,
            "learning_rate": 1.5e-3,
            "warmup_steps": min(100, steps // 4),
            "eval_every": 500,
            "eval_packs": 16,
            "save_every": 500,
            "device": device,
            "model": MODEL,
        }
    )


def as_llama(model: LanguageModel) -> LlamaForCausalLM:
    """The same model, of transformers."""
    own = model.config
    config = LlamaConfig(
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_layers,
        num_attention_heads=own.num_heads,
        num_key_value_heads=own.num_kv_heads,
        head_dim=own.head_dim,
        rms_norm_eps=own.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope_theta},
        tie_word_embeddings=own.tie_embeddings,
        max_position_embeddings=LENGTHS[-1],
        bos_token_id=None,
        eos_token_id=VOCAB_SIZE - 1,
        attn_implementation="sdpa",
    )
    llama = LlamaForCausalLM(config)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    missing = llama.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    return llama


def long_texts(documents: Documents, device: torch.device, most: int) -> Tensor:
    """The first tokens of the longest held-out documents, `[texts, 16384 + 1]`."""
    size = LENGTHS[-1]
    order = [int(i) for i in (-documents.lengths).argsort(kind="stable") if documents.lengths[i] > size]
    starts = [int(documents.bounds[i]) for i in order[:most]]
    texts = [documents.tokens[start : start + size + 1].astype("int64") for start in starts]
    return torch.stack([torch.from_numpy(text) for text in texts]).to(device)


@torch.inference_mode()
def perplexities(model: Any, texts: Tensor) -> dict[str, float]:
    """Perplexity of a byte, in texts of each length."""
    model.eval()
    found = {}
    for length in LENGTHS:
        total = 0.0
        for text in texts:
            tokens, targets = (x.unflatten(0, (-1, length)) for x in (text[:-1], text[1:]))
            with torch.autocast(text.device.type, dtype=torch.bfloat16, enabled=text.device.type == "cuda"):
                logits = model(input_ids=tokens, use_cache=False).logits
            total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum").item()
        found[str(length)] = math.exp(total / (len(texts) * LENGTHS[-1]))
    return found


@torch.inference_mode()
def short_logits(model: Any, texts: Tensor) -> Tensor:
    """Logits in texts so short that the selected and the window branch are full attention, float32 `[N, V]`."""
    model.eval()
    tokens = texts[:8, :-1].reshape(-1, SHORT)
    with torch.autocast(texts.device.type, dtype=torch.bfloat16, enabled=texts.device.type == "cuda"):
        return torch.cat([model(input_ids=x, use_cache=False).logits.float().flatten(0, 1) for x in tokens.split(16)])


def distances(logits: Tensor, original: Tensor) -> dict[str, float]:
    """How far distributions are from those of the original: mean divergence (nats), and how often the first agrees."""
    kl = F.kl_div(logits.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="batchmean")
    same = (logits.argmax(-1) == original.argmax(-1)).float().mean()
    return {"tokens": SHORT, "divergence_nats": kl.item(), "same_first": same.item()}


def batches(packs: TrainingPacks, first: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Packs of training text, as the model takes them, with the tokens that follow."""
    for index in itertools.count(first):
        pack = packs.pack(index).to(device)
        yield {"input_ids": pack.tokens[None], "layout": pack.layout, "targets": pack.targets}


def train_on(model: Any, source: Iterator[dict[str, Any]], steps: int) -> None:
    """Trains all weights for some steps, at a rate that falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINED_ON_RATE, weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = TRAINED_ON_RATE * (1 - step / steps)
        batch = next(source)
        targets = batch.pop("targets")
        with torch.autocast(targets.device.type, dtype=torch.bfloat16, enabled=targets.device.type == "cuda"):
            logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(logits[0].float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def draw(report: dict[str, Any], path: Path) -> None:
    """Perplexity over the steps of warm-up and of training on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for length, colour in zip(LENGTHS, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        axes.axhline(report["original"][str(length)], color=colour, ls=":", lw=1)
        points = [(x["step"], x["perplexity"][str(length)]) for x in report["curve"]]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=f"{length:,} tokens")
    axes.axvline(report["warm_up_steps"], color="#6B7278", lw=0.8)
    axes.set(xlabel="steps after conversion: warm-up, then training of all weights", ylabel="perplexity of a byte")
    axes.set_title("A converted model on held-out source files (dotted: the original, full attention)")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def original(args: argparse.Namespace) -> tuple[LlamaForCausalLM, Any, torch.device]:
    """The model with full attention, trained or loaded from `--runs`, its text, and where it is."""
    paths = args.paths or [sysconfig.get_path("stdlib"), str(Path(torch.__file__).parent)]
    config = settings(args.steps, paths, args.device)
    run = args.runs / "full"
    result = train(config, run, resume=any(run.glob("step-*")))
    print(f"original: {result.evaluation}, {result.tokens_per_s:,.0f} tokens/s", flush=True)
    model, _ = load_model(result.checkpoint)
    corpus = read_corpus(config.paths, suffixes=config.suffixes, held_out_fraction=config.held_out_fraction)
    device = config.resolve_device()
    return as_llama(model).to(device), corpus, device


def main() -> None:
    """Trains, converts, warms up, trains on; writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="*", help="files and folders; by default those of Python and PyTorch")
    parser.add_argument("--steps", type=int, default=2000, help="of the original, of 32,768 tokens")
    parser.add_argument("--warm-up-steps", type=int, default=300, help="of 16,384 tokens")
    parser.add_argument("--new-steps", type=int, default=200, help="of these, of gates and compressors alone")
    parser.add_argument("--train-steps", type=int, default=200, help="of all weights afterwards")
    parser.add_argument("--nsa", type=json.loads, default={}, help="fields of NSAConfig that differ, as JSON")
    parser.add_argument("--texts", type=int, default=32, help="held-out texts at the most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--commit", default=None, help="what to call the commit; by default what git says")
    parser.add_argument("--output", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    file = args.output / "conversion.json"
    if args.plot_only:
        draw(json.loads(file.read_text()), file.with_suffix(".png"))
        return
    model, corpus, device = original(args)
    texts = long_texts(corpus.held_out, device, args.texts)
    nsa: NSAConfig = conversion_config(**args.nsa)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flash_sparse_attention": fsa.__version__,
        "commit": args.commit or source_commit(),
        "model": MODEL | {"parameters": model.num_parameters()},
        "nsa": nsa.to_dict(),
        "steps": args.steps,
        "warm_up_steps": args.warm_up_steps,
        "held_out_texts": len(texts),
        "original": perplexities(model, texts),
        "curve": [],
    }

    def note(step: int, stage: str, **more: Any) -> None:
        found = {"step": step, "stage": stage, "perplexity": perplexities(model, texts), **more}
        report["curve"].append(found)
        print(json.dumps(found), flush=True)

    print("original", report["original"], flush=True)
    before = short_logits(model, texts)
    convert(model, nsa)
    report["short"] = distances(short_logits(model, texts), before)
    print("short", report["short"], flush=True)
    note(0, "converted")
    source = batches(TrainingPacks(corpus.train, LENGTHS[-1], seed=1), 0, device)
    began, every = time.perf_counter(), max(1, args.warm_up_steps // 6)
    warm_source = ({name: x for name, x in batch.items() if name != "targets"} for batch in source)
    records = []

    def on_step(record: Any) -> None:
        records.append(record.loss)
        if record.step % every == 0 and record.step < args.warm_up_steps:
            seconds = round(time.perf_counter() - began, 1)
            print(f"warm-up {record.step}: distance {record.loss:.4f}, {seconds} s", flush=True)

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        warm_up(model, warm_source, steps=args.warm_up_steps, new_steps=args.new_steps, on_step=on_step)
    report["warm_up_s"] = round(time.perf_counter() - began, 1)
    report["distance"] = [round(x, 5) for x in records]
    note(args.warm_up_steps, "warmed up")
    train_on(model, source, args.train_steps)
    note(args.warm_up_steps + args.train_steps, "trained on")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
