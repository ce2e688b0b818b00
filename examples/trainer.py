"""Training a sparse model with transformers' own `Trainer`: nothing of this library but the model.

    python examples/trainer.py                                 a tiny random Llama, on a CPU, in seconds
    python examples/trainer.py --model converted --text my_texts/*.txt --length 8192

`DataCollatorWithFlattening` puts the documents of a batch one behind the other in one row; positions that begin anew
tell the model where, and no document sees another.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

from flash_sparse_attention.integrations.transformers import NSALlamaConfig, NSALlamaForCausalLM, conversion_config


def tiny_llama() -> NSALlamaForCausalLM:
    """A sparse model of two layers for bytes, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    nsa = conversion_config(window_size=128, num_selected_blocks=4)
    return NSALlamaForCausalLM(NSALlamaConfig(vocab_size=256, num_key_value_heads=2, nsa=nsa.to_dict(), **sizes))


def main() -> None:
    """Trains, saves, and says how the loss fell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a converted model; by default a tiny one with random weights")
    parser.add_argument("--text", type=Path, nargs="*", default=sorted(Path(__file__).parent.glob("*.py")))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document at the most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="by default a temporary folder")
    args = parser.parse_args()

    if args.model is None:
        model, encode = tiny_llama(), lambda x: list(x.encode())
    else:
        model, encode = (
            AutoModelForCausalLM.from_pretrained(args.model),
            AutoTokenizer.from_pretrained(args.model).encode,
        )
    documents = [
        {"input_ids": tokens[start : start + args.length]}
        for tokens in (encode(path.read_text(encoding="utf-8")) for path in args.text)
        for start in range(0, len(tokens), args.length)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=str(args.output or folder),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            gradient_checkpointing=True,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, args.steps // 5),
            report_to=[],
        )
        collator = DataCollatorWithFlattening()
        trainer = Trainer(model=model, args=arguments, train_dataset=documents, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model()
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
