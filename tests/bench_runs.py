"""Results of benchmarks that nobody ran, with times that make the figures in tests easy."""

from __future__ import annotations

import dataclasses

from flash_sparse_attention.bench.results import Report, Roofline, Row, Timing

HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128, "batch": 1, "dtype": "bfloat16"}
ENVIRONMENT = {
    "device": "NVIDIA H200",
    "kind": "cuda",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "cudnn": 91900,
    "driver": "580.1",
    "python": "3.12.1",
    "flash_sparse_attention": "0.1.0",
    "commit": "abc1234",
    "baselines": {"flash-attn": "2.8.3"},
    "method": ["Median of the runs in 1 s.", "L2 is flushed before every run."],
    "clocks": {"operators": {"sm_mhz": 1980, "memory_mhz": 3201, "power_w": 612.4, "temperature_c": 55}},
}


def timing(ms: float, spread: float = 0.02) -> Timing:
    return Timing(ms, ms * (1 - spread / 2), ms * (1 + spread / 2), 20)


def row(operator: str, direction: str, variant: str, ms: float | None, suite: str = "operators", **more) -> Row:
    """Sizes are keywords too: `tokens=65536`."""
    fields = {field.name for field in dataclasses.fields(Row)}
    shape = {**HEADS, **{name: value for name, value in more.items() if name not in fields}}
    more = {name: value for name, value in more.items() if name in fields}
    ours = more.pop("ours", variant in ("triton", "kv_outer", "blockwise"))
    shape = {name: value for name, value in shape.items() if value is not None}
    return Row(suite, operator, direction, variant, ours, shape, ms=None if ms is None else timing(ms), **more)


def operator_rows() -> list[Row]:
    """Selected attention at two lengths, where it loses once, and full attention."""
    rows = []
    for tokens, ours, other, full in ((8192, 0.88, 1.1, 0.44), (65536, 8.0, 10.0, 52.0)):
        blocks = {"tokens": tokens, "block_size": 64, "slots": 16}
        for direction, factor in (("forward", 1.0), ("backward", 2.0)):
            work = {"flops": 1.7e7 * tokens * factor, "bytes": 2.5e4 * tokens, "moved_bytes": 2e5 * tokens}
            check = {"out": 0.25, "lse": 0.125} if direction == "forward" else {"dq": 0.5}
            rows += [
                row("selected attention", direction, "kv_outer", ours * factor, **blocks, **work, check=check),
                row("selected attention", direction, "query_outer", other * factor, **blocks, **work, notes="a note"),
                row("full attention", direction, "cudnn", full * factor, tokens=tokens, flops=2.2e3 * tokens**2),
                row("full attention", direction, "flash", full * factor * 2, tokens=tokens),
            ]
    rows.append(row("selected attention", "forward", "kv_outer", None, tokens=10**6, slots=16, skipped="out of memory"))
    rows.append(row("full attention", "forward", "cudnn", 9000.0, tokens=10**6))
    rows.append(row("full attention", "forward", "flash-attn", None, tokens=65536, skipped="not installed"))
    rows.append(row("combine", "forward", "triton", 0.05, tokens=65536, bytes=1.5e8, compile_s=1.5))
    return rows


def attention_rows() -> list[Row]:
    """The whole attention by length and by heads, and its memory."""
    rows = []
    for tokens in (8192, 16384, 32768, 65536):
        full = 50.0 * (tokens / 65536) ** 2
        for direction, factor in (("forward", 1.0), ("backward", 1.75), ("both", 2.75)):
            ms = 20.0 * tokens / 65536 * factor
            rows += [
                row("whole attention", direction, "triton", ms, suite="attention", tokens=tokens, window_size=512),
                row("full attention", direction, "cudnn", full * factor, suite="attention", tokens=tokens),
                row("full attention", direction, "flash", full * 2 * factor, suite="attention", tokens=tokens),
            ]
        memory = {"inputs": tokens * 12288, "kept": tokens * 40000, "workspace": 2**29, "peak": tokens * 80000}
        rows.append(
            row("whole attention", "both", "triton", None, "memory", tokens=tokens, window_size=512, memory=memory)
        )
    for heads, kv_heads in ((4, 4), (64, 4)):
        for direction, factor in (("forward", 1.0), ("backward", 1.5)):
            sizes = {"tokens": 65536, "heads": heads, "kv_heads": kv_heads}
            ms = 0.7 * heads * factor
            rows += [
                row("whole attention", direction, "triton", ms, suite="attention", window_size=512, **sizes),
                row("full attention", direction, "cudnn", 1.8 * heads * factor, suite="attention", **sizes),
            ]
    return rows


def decode_rows() -> list[Row]:
    rows = []
    for tokens, attention, step, dense in ((8192, 0.066, 0.081, 0.133), (65536, 0.128, 0.146, 0.933)):
        sizes = {"suite": "decode", "tokens": tokens, "batch": 16, "new_tokens": 1}
        rows += [
            row("decode attention", "forward", "triton", attention, **sizes),
            row("decode step", "forward", "triton", step, **sizes),
            row("full attention", "forward", "cudnn", dense, **sizes),
        ]
    return rows


def model_rows() -> list[Row]:
    rows = []
    for tokens in (8192, 65536):
        sizes = {"suite": "model", "tokens": tokens, "model": "8B", "layers": 4}
        for operator, direction, factor in (("training step", "step", 3.0), ("prefill", "forward", 1.0)):
            rows += [
                row(operator, direction, "triton", tokens / 1000 * factor, **sizes),
                row(operator, direction, "full, cudnn", tokens / 1000 * factor * tokens / 16384, ours=False, **sizes),
            ]
    return rows


def run(rows: list[Row], date: str = "2026-11-01T10:00:00", **environment) -> Report:
    command = "fsa bench --suite operators"
    return Report(command, date, ENVIRONMENT | environment, Roofline(4.0, {"bfloat16": 800.0}), tuple(rows))


def everything() -> Report:
    return run([*operator_rows(), *attention_rows(), *decode_rows(), *model_rows()])


def cpu_run() -> Report:
    rows = []
    for tokens in (4096, 8192):
        sizes = {"suite": "attention", "tokens": tokens, "dtype": "float32", "window_size": 512}
        rows.append(row("whole attention", "both", "blockwise", tokens / 5.0, **sizes))
        rows.append(row("full attention", "both", "sdpa", tokens**2 / 32768, **(sizes | {"window_size": None})))
    environment = {"device": "AMD EPYC", "kind": "cpu", "torch": "2.13.0", "commit": "abc1234"}
    return Report("fsa bench --device cpu", "2026-11-02T10:00:00", environment, Roofline(), tuple(rows))
