"""A pretrained model becomes sparse: convert, warm up, save, load, generate.

    python examples/convert.py                                       a tiny random Llama, on a CPU, in seconds
    python examples/convert.py --model meta-llama/Llama-3.2-1B --text my_texts/*.txt --length 16384 --steps 300

The tiny model knows nothing, and so do its texts; the same lines make a real model sparse.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flash_sparse_attention.integrations.transformers import conversion_config, convert, warm_up


def tiny_llama() -> LlamaForCausalLM:
    """A model of two layers for bytes, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes))


def main() -> None:
    """Does it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a Llama, Mistral, Qwen2 or Qwen3; by default a tiny one")
    parser.add_argument("--text", type=Path, nargs="*", default=[Path(__file__)], help="files to warm up on")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--steps", type=int, default=20, help="of the warm-up")
    parser.add_argument("--output", type=Path, default=Path("converted"))
    args = parser.parse_args()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.text)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    if args.model is None:
        model, encode = tiny_llama(), lambda x: list(x.encode())
        nsa = conversion_config(window_size=128, num_selected_blocks=4)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model, encode = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"), tokenizer.encode
        nsa = conversion_config()
        tokenizer.save_pretrained(args.output)
    tokens = torch.tensor(encode(text)).to(device)
    model = convert(model.to(device), nsa)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters")

    length = min(args.length, len(tokens))
    batches = [{"input_ids": piece[None]} for piece in tokens.split(length) if len(piece) == length]
    records = warm_up(model, batches, steps=args.steps)
    print(f"distance from full attention: {records[0].loss:.4f} before, {records[-1].loss:.4f} in the last step")

    model.save_pretrained(args.output)
    loaded = AutoModelForCausalLM.from_pretrained(args.output).to(device)
    prompt = tokens[None, : min(length, 500)]
    out = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    print(f"read {prompt.shape[1]} tokens, wrote {out[0, prompt.shape[1] :].tolist()}")


if __name__ == "__main__":
    main()
