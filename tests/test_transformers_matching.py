"""`matching` and `warm_up`: sparse layers learn to give what full attention gives, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.integrations.transformers import (
    NSAAttention,
    WarmUpRecord,
    conversion_config,
    matching,
    warm_up,
)
from tiny_transformers import ARCHITECTURES, COVERING, SIZES, base_model, close, sparse_model, tokens_of

BATCHES = [{"input_ids": tokens_of(2, 40, seed)} for seed in range(3)]


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_new(name: str) -> bool:
    return "branch_gate_proj" in name or "compressor" in name


@pytest.mark.parametrize("preset", ["conversion", "paper"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_the_original_meanwhile(architecture: str, preset: str):
    nsa = conversion_config(**SIZES) if preset == "conversion" else NSAConfig.preset("paper", **SIZES)
    model, ids = sparse_model(architecture, nsa, layers=[0, 2]), tokens_of(2, 40)
    with torch.no_grad():
        expected, sparse = base_model(architecture)(ids).logits, model(ids, use_cache=False).logits
        with matching(model):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)
        close(model(ids, use_cache=False).logits, sparse)
        assert (sparse - expected).abs().max() > 1e-2


def test_losses_are_relative_errors():
    model = sparse_model("llama", layers=[1])
    outs: dict[str, Tensor] = {}
    layer = model.model.layers[1].self_attn
    with matching(model) as match:
        handle = layer.register_forward_hook(lambda module, args, out: outs.setdefault("full", out[0]))
        hidden = []
        before = layer.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append((kwargs["hidden_states"], kwargs["sparse_inputs"])),
            with_kwargs=True,
        )
        losses = match(**BATCHES[0])
        handle.remove()
        before.remove()
    sparse, _ = layer(hidden[0][0], sparse_inputs=hidden[0][1])
    expected = (sparse - outs["full"]).square().sum() / outs["full"].square().sum()
    assert losses.shape == (1,)
    torch.testing.assert_close(losses[0], expected.float())
    assert losses[0].item() > 1e-3


def test_covered_texts_have_no_error():
    model = sparse_model("llama", conversion_config(**COVERING), shaken=False)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.self_attn.branch_gate_proj.bias.copy_(torch.tensor([-30.0, 0, 0] * 4))
    with matching(model) as match:
        assert match(input_ids=tokens_of(2, 30)).max().item() < 1e-9


@pytest.mark.parametrize("trained", ["new", "attention"])
def test_what_takes_gradients(trained: Any):
    model = sparse_model("qwen3", layers=[1, 2])
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with matching(model, trained) as match:
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        sparse = {name for name in before if ".1.self_attn" in name or ".2.self_attn" in name}
        assert names == {name for name in sparse if trained == "attention" or is_new(name)}
        assert {id(parameter) for parameter in match.parameters} == {
            id(parameter) for name, parameter in model.named_parameters() if name in names
        }
        losses = match(**BATCHES[0])
        losses.mean().backward()
        assert all(parameter.grad is not None for parameter in match.parameters)
        # A layer's loss depends on that layer alone.
        model.zero_grad()
        match(**BATCHES[0])[0].backward()
        others = [p.grad for name, p in model.named_parameters() if ".2.self_attn" in name]
        assert all(grad is None or not grad.any() for grad in others)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("batches", ["ids", "padding", "pack", "labels", "embeddings"])
def test_kinds_of_batches(batches: str):
    model, ids = sparse_model("llama"), tokens_of(1, 50)
    layout = SequenceLayout.from_lengths([20, 30])
    pieces = ids.split([20, 30], 1)
    with matching(model) as match:
        if batches == "padding":
            wide = torch.zeros(2, 30, dtype=torch.int64)
            wide[0, 10:], wide[1] = pieces[0], pieces[1]
            mask = (torch.arange(30) >= torch.tensor([[10], [0]])).long()
            got = match(input_ids=wide, attention_mask=mask)
            torch.testing.assert_close(got, match(input_ids=ids, layout=layout))
        elif batches == "pack":
            positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
            got = match(input_ids=ids, position_ids=positions)
            torch.testing.assert_close(got, match(input_ids=ids, layout=layout))
            assert not torch.equal(got, match(input_ids=ids))
        elif batches == "labels":
            torch.testing.assert_close(match(input_ids=ids, labels=ids), match(input_ids=ids))
        elif batches == "embeddings":
            embeds = model.get_input_embeddings()(ids)
            torch.testing.assert_close(match(inputs_embeds=embeds), match(input_ids=ids))
        else:
            assert match(input_ids=ids).shape == (3,)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_new_parameters_alone(architecture: str):
    model = sparse_model(architecture, shaken=False).train()
    before, seen = weights(model), []
    records = warm_up(model, BATCHES, steps=12, on_step=seen.append)
    assert records == seen
    assert [record.step for record in records] == list(range(1, 13))
    assert isinstance(records[0], WarmUpRecord)
    assert all(abs(record.loss - sum(record.layer_losses) / 3) < 1e-6 for record in records)
    assert records[9].loss < 0.95 * records[0].loss
    names = changed(model, before)
    assert names
    assert all(is_new(name) for name in names)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_then_the_attention_too():
    model = sparse_model("qwen3", layers=[0, 2], shaken=False)
    before = weights(model)
    with torch.no_grad():
        full = base_model("qwen3")(BATCHES[0]["input_ids"]).logits
        start = (model(**BATCHES[0], use_cache=False).logits - full).norm()
    records = warm_up(model, BATCHES[:1], steps=16, new_steps=6, attention_learning_rate=3e-3)
    assert len(records) == 16
    assert records[-1].loss < records[5].loss < records[0].loss
    names = changed(model, before)
    sparse = {name for name in before if ".0.self_attn" in name or ".2.self_attn" in name}
    assert names <= sparse
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "branch_gate_proj"):
        assert {f"model.layers.{number}.self_attn.{part}.weight" for number in (0, 2)} <= names
    assert not model.training
    with torch.no_grad():
        assert (model(**BATCHES[0], use_cache=False).logits - full).norm() < start


def test_teachers_stay():
    """While projections are trained, they are compared with what they were."""
    model, ids = sparse_model("llama"), tokens_of(2, 40)
    with torch.no_grad():
        expected = base_model("llama")(ids).logits
    with matching(model, "attention") as match, torch.no_grad():
        for layer in match.layers.values():
            layer.q_proj.weight.mul_(2)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)


def test_full_attention_has_the_keys_of_selection():
    model, ids = sparse_model("llama", NSAConfig.preset("paper", **SIZES)), tokens_of(2, 40)
    with torch.no_grad():
        expected = base_model("llama")(ids).logits
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                compressed, _, window = projection.weight.view(3, -1, 24)
                compressed.neg_()
                window.zero_()
        with matching(model):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)


def test_learning_rates_fall(monkeypatch: pytest.MonkeyPatch):
    rates, step = [], torch.optim.AdamW.step

    def noted(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    model = sparse_model("llama", layers=[1])
    warm_up(model, BATCHES, steps=4, new_steps=2, learning_rate=0.1, attention_learning_rate=0.01)
    assert rates == [[0.1], [pytest.approx(0.075)], [0.05, 0.005], pytest.approx([0.025, 0.0025])]


def test_an_iterator_and_a_generator():
    model = sparse_model("llama", layers=[1])
    assert len(warm_up(model, iter(BATCHES), steps=3)) == 3
    with pytest.raises(ValueError, match="batches must be as many as steps, or a list of at least one, got an end"):
        warm_up(model, iter(BATCHES), steps=4)
    assert model.model.layers[1].self_attn._matching is None


def test_errors():
    model = sparse_model("llama", layers=[1])
    with pytest.raises(
        ValueError, match="model must be one with sparse layers, got LlamaForCausalLM: convert makes one"
    ):
        warm_up(base_model(), BATCHES)
    with pytest.raises(ValueError, match="batches must be as many as steps"):
        warm_up(model, [], steps=1)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, got 0"):
        warm_up(model, BATCHES, steps=0)
    with pytest.raises(ValueError, match="new_steps must be an integer of at least 0, got -1"):
        warm_up(model, BATCHES, steps=2, new_steps=-1)
    with pytest.raises(ValueError, match="trained must be one of new, attention, got 'all'"), matching(model, "all"):
        pass
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), matching(model):
        _ = 1 / 0
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert isinstance(model.model.layers[1].self_attn, NSAAttention)
    assert model.model.layers[1].self_attn._matching is None


def test_a_loss_that_is_not_finite():
    model = sparse_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.branch_gate_proj.bias[0] = torch.nan
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"loss and gradient must be finite, got nan .* lower learning_rate"):
        warm_up(model, BATCHES, steps=3)
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_a_window_of_the_original_is_kept_in_what_is_compared(architecture: str):
    changes: dict[str, Any] = {"sliding_window": 7}
    if architecture == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 1}
    base, model = base_model(architecture, **changes), sparse_model(architecture, **changes)
    ids = tokens_of(2, 40)
    with matching(model):
        close(model(ids, use_cache=False).logits, base(ids, use_cache=False).logits)


def test_small_steps_reach_weights_of_few_bits():
    """Half a step between two numbers of bfloat16 is more than one step of the optimizer."""
    model = sparse_model("llama").to(torch.bfloat16)
    before = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    warm_up(model, BATCHES, steps=40, new_steps=0, attention_learning_rate=5e-5)
    after = model.model.layers[0].self_attn.o_proj.weight
    assert after.dtype == torch.bfloat16
    assert (after != before).float().mean() > 0.2
    assert all(x.grad is None for x in model.parameters())


def test_gradients_are_taken_layer_by_layer(monkeypatch: pytest.MonkeyPatch):
    """The graph of a layer is gone before the next one is computed."""
    alive: list[int] = []
    count = 0

    def forward(layer: Any, *inputs: Any) -> Tensor:
        nonlocal count
        alive.append(count)
        count += 1
        out = original(layer, *inputs)

        def gone(gradient: Tensor) -> None:
            nonlocal count
            count -= 1

        if out.requires_grad:
            out.register_hook(gone)
        return out

    original = NSAAttention._forward
    monkeypatch.setattr(NSAAttention, "_forward", forward)
    warm_up(sparse_model("llama"), BATCHES, steps=2)
    assert alive == [0] * 6


def test_gradients_that_were_there_do_not_count():
    models = [sparse_model("llama") for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    for model in models:
        warm_up(model, BATCHES, steps=2, new_steps=1)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
