"""Training of models with sparse layers, with the tools that people train models of transformers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5")

from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.integrations.transformers import NSAAttention
from tiny_transformers import SIZES, close, sparse_model, tokens_of


def gradients_of(model: Any, **batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# transformers renames it.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(layers: list[int] | None, reentrant: bool):
    model = sparse_model("qwen3", NSAConfig.preset("paper", **SIZES), layers=layers).train()
    ids = tokens_of(2, 30)
    mask = (torch.arange(30) >= torch.tensor([[4], [0]])).long()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
    expected = gradients_of(model, **batch)
    assert all(gradient.any() for name, gradient in expected.items() if "branch_gate_proj" in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    got = gradients_of(model, **batch)
    assert set(got) == set(expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)


def test_when_a_cache_is_kept():
    model, ids = sparse_model(), tokens_of(1, 20)
    assert model.config.use_cache
    assert model(ids).past_key_values is None
    assert model(ids).logits.requires_grad
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length() == 20
        assert model(ids, use_cache=False).past_key_values is None
    # Asked for: what is kept has no gradients.
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 20
    model.train()
    with pytest.raises(ValueError, match="use_cache must be False in training, got True: what a cache holds has no"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="use_cache must be False in training"):
        model(ids, past_key_values=DynamicCache(config=model.config))
    with torch.no_grad():
        assert model(ids).past_key_values is not None
    model.config.use_cache = False
    with torch.no_grad():
        assert model(ids).past_key_values is None


@pytest.mark.slow
def test_a_pack_compiles_to_one_graph():
    model, lengths = sparse_model("llama", dtype=torch.float32, num_hidden_layers=1).train(), (20, 13)
    ids = tokens_of(1, sum(lengths))
    batch = {"input_ids": ids, "labels": ids, "layout": SequenceLayout.from_lengths(lengths)}
    expected = gradients_of(model, **batch)
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


class LowRank(nn.Module):
    """A frozen projection and what is trained beside it, without a `weight`."""

    def __init__(self, frozen: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False, dtype=frozen.weight.dtype)
        self.up = nn.Linear(rank, frozen.out_features, bias=False, dtype=frozen.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def test_low_rank_adapters():
    model, ids = sparse_model("qwen3"), tokens_of(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name)))
    with torch.no_grad():
        close(model(ids, use_cache=False).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
    model.train()(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.up.weight.grad.any()
        assert layer.self_attn.q_proj.frozen.weight.grad is None


@pytest.fixture
def trainer_of(tmp_path: Path) -> Any:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": tokens_of(1, 10 + 3 * number, seed=number)[0].tolist()} for number in range(8)]

    def make(model: Any, collator: Any, **options: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            learning_rate=1e-2,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        return Trainer(model, arguments, data_collator=collator, train_dataset=data, eval_dataset=data[:4])

    return make


def padding_collator(texts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    rows = [torch.tensor(text["input_ids"]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["padding", "positions", "bounds"])
def test_trainer(trainer_of: Any, kind: str, tmp_path: Path):
    flash = kind == "bounds"
    flattening = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_position_ids=not flash)
    collator = padding_collator if kind == "padding" else flattening
    model = sparse_model("llama", dtype=torch.float32, layers=[0, 2])
    options = {"gradient_checkpointing": True} if kind == "padding" else {}
    trainer = trainer_of(model, collator, **options)
    assert trainer.train().global_step == 3
    # Evaluation of packs is that of the sequences in them.
    evaluated = trainer.evaluate()["eval_loss"]
    alone = trainer_of(model, padding_collator, per_device_eval_batch_size=4)
    assert evaluated == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-4)
    trainer.save_model(tmp_path / "end")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype="auto")
    assert isinstance(loaded.model.layers[2].self_attn, NSAAttention)
    end = model.state_dict()
    assert all(torch.equal(value, end[name]) for name, value in loaded.state_dict().items())
    resumed = sparse_model("llama", dtype=torch.float32, layers=[0, 2])
    trainer_of(resumed, collator, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, end[name])
