"""Training steps and prefill of decoders at length: sparse attention in both loop orders, and full attention.

    python benchmarks/models.py --output benchmarks/results/h200

Decoders of transformers with the widths of Llama-3-8B, Qwen3-14B and Qwen2.5-32B and `--layers` layers, random weights
in bfloat16, without the vocabulary's embedding and output layer: those belong to a whole model once, not to so many
layers. The sparse ones are what `convert` makes, with the `fsa` preset. All variants of a row have the same weights,
are measured in the same process, and have their layers compiled by `torch.compile` (`--eager`: not).

A training step is forward, backward with every layer computed again (gradient checkpointing), and a fused AdamW step
with states in bfloat16, of one sequence; prefill reads one sequence into an empty cache without gradients. Times are
of CUDA events: the median of the repeats after a warm-up. Before anything is timed, the outputs of the two loop orders
are compared; and full attention, on the first tokens, where it and sparse attention see the same, with the sparse one.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
import transformers
from timing import commit, header, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.integrations.transformers import sparse_classes

# Widths of config.json of the published models: (architecture, fields, layers).
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3-8B": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        32,
    ),
    "Qwen3-14B": (
        "qwen3",
        {
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        40,
    ),
    "Qwen2.5-32B": (
        "qwen2",
        {"hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_key_value_heads": 8},
        64,
    ),
}
VARIANTS = ("nsa, kv_outer", "nsa, query_outer", "full, cudnn", "full, flash")
BACKENDS = {"full, cudnn": SDPBackend.CUDNN_ATTENTION, "full, flash": SDPBackend.FLASH_ATTENTION}
NSA = NSAConfig.preset("fsa")
# Rows of the first tokens that see the same with full and with sparse attention, but for the compressed branch.
SAME_TOKENS, GATES = 512, [1e-4, 0.5, 0.5 - 1e-4]
SAME = 0.04  # relative error; two ways to compute the same in bfloat16 are 0.02 apart after four layers


def decoder(name: str, variant: str, layers: int, length: int, compile_layers: bool) -> torch.nn.Module:
    """A decoder of so many layers with random weights, the same for all variants."""
    model_type, fields, _ = MODELS[name]
    sizes = {"num_hidden_layers": layers, "vocab_size": 256, "max_position_embeddings": length, **fields}
    classes = sparse_classes(model_type)
    sparse = variant.startswith("nsa")
    if sparse:
        options = {"loop_order": variant.split(", ")[1], "impl": "triton"}
        config = classes.config(**sizes, nsa=NSA.to_dict(), nsa_options=options, nsa_gates=GATES)
        kind: Any = classes.model
    else:
        config, kind = classes.config.__bases__[1](**sizes), classes.model.__bases__[1]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("cuda"), default_dtype(torch.bfloat16):
        model = kind(config)
        # The same numbers for the same names, whatever else was drawn.
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(x in parameter_name for x in ("compressor", "branch_gate")):
                torch.manual_seed(zlib.crc32(parameter_name.encode()))
                torch.nn.init.normal_(parameter, std=0.02)
    if compile_layers:
        for layer in model.layers:
            layer.compile()
    return model


class default_dtype:
    """While active, new tensors have this dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def runs_of(model: torch.nn.Module, variant: str, length: int) -> dict[str, Callable[[], object]]:
    """A training step and a prefill of a sequence of random tokens."""
    tokens = torch.randint(256, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    cotangent = torch.randn(1, length, model.config.hidden_size, device="cuda", dtype=torch.bfloat16) / length
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def attention() -> Any:
        return sdpa_kernel(BACKENDS[variant]) if variant in BACKENDS else nullcontext()

    def train() -> None:
        model.train()
        model.gradient_checkpointing_enable()
        with attention():
            hidden = model(input_ids=tokens, use_cache=False).last_hidden_state
            hidden.backward(cotangent)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prefill() -> torch.Tensor:
        model.eval()
        with attention(), torch.inference_mode():
            return model(input_ids=tokens, use_cache=True).last_hidden_state

    return {"prefill": prefill, "train": train}


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """Distance of two tensors beside the length of the second."""
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def measure(name: str, layers: int, length: int, repeats: int, compile_layers: bool, flush: torch.Tensor) -> dict:
    """Times and peak memory of all variants of a model at a length."""
    row: dict[str, Any] = {"model": name, "tokens": length, "layers": layers, "ms": {}, "peak_gib": {}, "relative": {}}
    first: dict[str, torch.Tensor] = {}
    for variant in VARIANTS:
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        model = decoder(name, variant, layers, length, compile_layers)
        for kind, run in runs_of(model, variant, length).items():
            key = f"{kind}, {variant}"
            out = run()
            if out is not None:
                first[variant] = out[0, -SAME_TOKENS:].clone(), out[0, :SAME_TOKENS].clone()
                del out
                if variant == "nsa, query_outer":
                    row["relative"]["loop orders"] = relative(first[variant][0], first["nsa, kv_outer"][0])
                elif variant == "full, cudnn":
                    row["relative"]["sparse to full, first tokens"] = relative(
                        first["nsa, kv_outer"][1], first[variant][1]
                    )
            torch.cuda.reset_peak_memory_stats()
            times = [milliseconds(run, flush) for _ in range(repeats + 1)][1:]
            row["ms"][key] = round(statistics.median(times), 2)
            row["peak_gib"][key] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            print(f"{name} {length} {key}: {row['ms'][key]} ms, {row['peak_gib'][key]} GiB", flush=True)
        del model, run
    if max(row["relative"].values()) > SAME:
        raise RuntimeError(f"outputs differ: {row['relative']}")
    for kind in ("train", "prefill"):
        ours = row["ms"][f"{kind}, nsa, kv_outer"]
        for other in VARIANTS[1:]:
            row.setdefault("gain", {})[f"{kind}, over {other}"] = round(row["ms"][f"{kind}, {other}"] / ours, 3)
    return row


def mean_gain(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How much longer the others take, over all rows."""
    return {name: round(statistics.mean(row["gain"][name] for row in rows), 3) for name in rows[0]["gain"]}


def draw(report: dict[str, Any], path: Path) -> None:
    """How much longer each variant takes than sparse attention in the KV-outer order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    rows = report["rows"]
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("train", "prefill"), strict=True):
        for place, (other, colour) in enumerate(zip(VARIANTS[1:], ("#E69F00", "#0072B2", "#6B7278"), strict=True)):
            gains = [row["gain"][f"{kind}, over {other}"] for row in rows]
            bars = axes.bar([x + 0.27 * (place - 1) for x in range(len(rows))], gains, 0.25, color=colour, label=other)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="#333333", lw=0.8)
        labels = [f"{row['model']}\n{row['tokens'] // 1024}K" for row in rows]
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.set_title("training step" if kind == "train" else "prefill")
    figure.axes[0].set_ylim(0, 3.2)
    figure.axes[0].set_ylabel("time over that of NSA, KV-outer")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures all rows, and writes them as JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 65536])
    parser.add_argument("--layers", type=int, default=4, help="of each decoder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="layers are not compiled")
    parser.add_argument("--commit", default=None, help="what to call the commit; by default what git says")
    parser.add_argument("--output", type=Path, default=None, help="directory of models.json and models.png")
    parser.add_argument("--plot-only", action="store_true", help="draws the JSON again")
    args = parser.parse_args()
    if args.plot_only:
        draw(json.loads((args.output / "models.json").read_text()), args.output / "models.png")
        return
    # A compiled graph names a backend, but its key in the cache does not: another one would be measured.
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message=".*cuDNN Attention defaults to a non-deterministic.*")
    flush = torch.empty(1 << 28, device="cuda")
    report = header(args.commit or commit(), "bfloat16") | {"transformers": transformers.__version__, "rows": []}
    for name in args.models:
        for length in args.lengths:
            row = measure(name, args.layers, length, args.repeats, not args.eager, flush)
            report["rows"].append(row)
            report["mean_gain"] = mean_gain(report["rows"])
            print(json.dumps(row["gain"] | row["relative"]), flush=True)
            if args.output is not None:
                args.output.mkdir(parents=True, exist_ok=True)
                (args.output / "models.json").write_text(json.dumps(report, indent=2) + "\n")
                draw(report, args.output / "models.png")


if __name__ == "__main__":
    main()
