"""A run that takes a second: little text, a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flash_sparse_attention.training import TrainConfig

TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 8,
    # The loop does not know the difference, and this is the faster one; tests that want the other say so.
    "attention": "full",
    "nsa": {
        "kernel_size": 8,
        "kernel_stride": 4,
        "block_size": 8,
        "num_selected_blocks": 4,
        "window_size": 16,
        "compression": "mean",
        "position_embedding": "none",
    },
}


def write_texts(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """A folder with `count` texts of 60 to 400 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        words = random.choice(["red ", "green ", "blue\n", "ä", "1234 "], size=random.integers(15, 80))
        (folder / f"{index:02}.txt").write_text("".join(words), encoding="utf-8")
    return folder


def tiny_config(texts: Path, **changes: object) -> TrainConfig:
    """Six steps on the texts in a folder."""
    options: dict[str, object] = {
        "paths": (str(texts),),
        "held_out_fraction": 0.2,
        "sequence_length": 64,
        "model": TINY_MODEL,
        "steps": 6,
        "warmup_steps": 2,
        "eval_every": 3,
        "eval_packs": 2,
        "save_every": 3,
        "device": "cpu",
    }
    return TrainConfig.from_dict(options | changes)
