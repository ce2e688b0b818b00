"""Runs with a tiny model of transformers and a tokenizer that a test makes by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from flash_sparse_attention.training import TrainConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ("red", "green", "blue", "cat", "dog", "runs", "sleeps", "äpfel", "1234", "the", "a", "and")
FAMILIES = ("llama", "qwen3")


def texts(count: int = 24, seed: int = 0, words: int = 40) -> list[str]:
    """Texts of about as many words, no two alike."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=random.integers(words // 2, 2 * words))) + "\n" for _ in range(count)]


def write_tokenizer(folder: Path, *, eos: bool = True, bos: bool = False) -> None:
    """A tokenizer of about 300 tokens, bytes among them, so that it knows every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<start>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    special: dict[str, Any] = {"eos_token": "<end>"} if eos else {}
    if bos:
        special["bos_token"] = "<start>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random model of two layers and its tokenizer, as `save_pretrained` writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family == "qwen3",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes}))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_jsonl(path: Path, rows: list[str], field: str = "text") -> Path:
    """A document a line."""
    path.write_text("".join(json.dumps({field: row, "id": 1}) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(model: Path, text: Path, **changes: Any) -> TrainConfig:
    """Four steps of two packs."""
    options: dict[str, Any] = {
        "paths": [str(text)],
        "pretrained": str(model),
        "held_out_fraction": 0.2,
        "sequence_length": 64,
        "batch_size": 2,
        "steps": 4,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "eval_every": 2,
        "eval_packs": 3,
        "save_every": 2,
        "device": "cpu",
    }
    return TrainConfig.from_dict(options | changes)
