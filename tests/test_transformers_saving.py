"""Models with sparse layers on disk: what is saved comes back, and what is missing starts as it should."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.integrations import transformers as integration
from flash_sparse_attention.integrations.transformers import NSAAttention, conversion_config, convert
from tiny_transformers import ARCHITECTURES, SIZES, base_config, base_model, close, sparse_model, tokens_of

PAPER = NSAConfig.preset("paper", **SIZES)


def same_outputs(got: PreTrainedModel, expected: PreTrainedModel) -> None:
    ids = tokens_of(2, 30)
    with torch.no_grad():
        close(got(ids, use_cache=False).logits, expected(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("architecture", "layers"), [*((name, None) for name in ARCHITECTURES), ("qwen3", [1])], ids=str
)
def test_round_trip(architecture: str, layers: list[int] | None, tmp_path: Path):
    model = sparse_model(architecture, PAPER, layers=layers)
    model.save_pretrained(tmp_path)
    classes = integration.sparse_classes(architecture)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is classes.config
    assert config.nsa_config == PAPER
    assert config.nsa_layers == layers
    assert config.nsa_gates == [0.3, 0.4, 0.3]
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(notes.values())
    assert type(loaded) is type(model) is classes.causal_lm
    assert type(loaded.model) is classes.model
    assert loaded.config is loaded.model.config
    assert not loaded.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    same_outputs(loaded, model)
    ids = tokens_of(1, 20)
    with torch.no_grad():
        decoder = AutoModel.from_pretrained(tmp_path, dtype="auto")
        assert type(decoder) is classes.model
        close(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
        assert len(loaded(ids, output_hidden_states=True).hidden_states) == 4
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_tied_embeddings_and_bias(tmp_path: Path):
    model = sparse_model("llama", tie_word_embeddings=True, attention_bias=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    same_outputs(loaded, model)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {}], ids=str)
def test_shards_and_device_maps(options: dict[str, Any], tmp_path: Path):
    model = sparse_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    same_outputs(loaded, model)
    assert torch.equal(
        loaded.generate(tokens_of(1, 9), max_new_tokens=3), model.generate(tokens_of(1, 9), max_new_tokens=3)
    )


def test_bfloat16(tmp_path: Path):
    model = sparse_model("qwen2")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = tokens_of(1, 20)
    assert loaded.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 24)
    loaded.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_convert_loads(tmp_path: Path):
    base = base_model("qwen3", torch.bfloat16)
    base.save_pretrained(tmp_path)
    for model in (convert(tmp_path, conversion_config(**SIZES)), convert(str(tmp_path), SIZES, device_map="cpu")):
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, base.model.layers[1].self_attn.q_proj.weight)
        assert model.config.name_or_path == str(tmp_path)
    assert convert(tmp_path, SIZES, dtype=torch.float32).dtype == torch.float32


def test_generation_config_is_kept(tmp_path: Path):
    base = base_model()
    base.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    model = convert(base, SIZES)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 7


@pytest.mark.parametrize("preset", ["conversion", "fsa", "mlp"])
def test_a_plain_checkpoint_gets_the_start_of_what_is_new(preset: str, tmp_path: Path):
    nsa = {"conversion": {}, "fsa": {**NSAConfig.preset("fsa").to_dict()}, "mlp": {"compression": "mlp"}}[preset]
    nsa = NSAConfig.from_dict(conversion_config().to_dict() | nsa | SIZES)
    base = base_model("llama")
    base.save_pretrained(tmp_path)
    classes = integration.sparse_classes("llama")
    values = {name: value for name, value in base.config.to_dict().items() if name != "model_type"}
    config = classes.config(**values, nsa=nsa.to_dict(), nsa_gates=[0.1, 0.6, 0.2])
    loaded, notes = classes.causal_lm.from_pretrained(tmp_path, config=config, dtype="auto", output_loading_info=True)
    assert notes["missing_keys"]
    assert all("branch_gate_proj" in name or "compressor" in name for name in notes["missing_keys"])
    assert not notes["unexpected_keys"]
    ids = tokens_of(2, 40)
    for layer in loaded.model.layers:
        check_start(layer.self_attn, [0.1, 0.6, 0.2])
    if preset == "conversion":
        close(loaded(ids).logits, convert(base, nsa, gates=(0.1, 0.6, 0.2))(ids).logits)


def check_start(attention: NSAAttention, gates: list[float]) -> None:
    """Gates are these, and compressors about the mean."""
    assert not attention.branch_gate_proj.weight.any()
    count = attention.branch_gate_proj.out_features // 3
    dtype = attention.branch_gate_proj.bias.dtype
    torch.testing.assert_close(attention.branch_gate_proj.bias.sigmoid(), torch.tensor(gates * count, dtype=dtype))
    x = torch.randn(4, 2, 8, dtype=dtype)
    for compressor in (attention.compressor_k, attention.compressor_v):
        torch.testing.assert_close(compressor(x)[0], x.mean(0), rtol=0, atol=0.4)
        if compressor.position_embedding is not None:
            assert 0 < compressor.position_embedding.std() < 0.05


def test_a_checkpoint_that_has_only_some_of_what_is_new(tmp_path: Path):
    model = sparse_model("llama", PAPER)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [
        "model.layers.0.self_attn.branch_gate_proj.weight",
        "model.layers.1.self_attn.compressor_k.bias",
        "model.layers.2.self_attn.compressor_v.position_embedding",
    ]:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name]), name
    attentions = [layer.self_attn for layer in loaded.model.layers]
    assert not attentions[0].branch_gate_proj.weight.any()
    assert not attentions[1].compressor_k.bias.any()
    assert 0 < attentions[2].compressor_v.position_embedding.std() < 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_models(architecture: str):
    config = integration.sparse_classes(architecture).config(
        **{name: value for name, value in base_config(architecture).to_dict().items() if name != "model_type"},
        nsa=conversion_config(**SIZES).to_dict(),
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == f"NSA{type(base_model(architecture)).__name__}"
    assert type(AutoModel.from_config(config)).__name__ == type(model.model).__name__
    check_start(model.model.layers[0].self_attn, list(integration.START_OF_GATES))
    assert 0.01 < model.model.layers[0].self_attn.q_proj.weight.std() < 0.03
    assert model(tokens_of(1, 9), labels=tokens_of(1, 9)).loss.isfinite()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(copied: Any):
    model = sparse_model("qwen3", layers=[0, 2])
    again = copied(model)
    assert type(again) is type(model)
    assert again.config.to_dict() == model.config.to_dict()
    same_outputs(again, model)
    config = copied(model.config)
    assert type(config) is type(model.config)
    assert config.to_dict() == model.config.to_dict()


def test_config_is_json(tmp_path: Path):
    config = sparse_model("mistral", layers=[2], sliding_window=16).config
    values = json.loads(config.to_json_string(use_diff=False))
    assert values["model_type"] == "nsa_mistral"
    assert values["nsa"] == conversion_config(**SIZES).to_dict()
    assert values["nsa_layers"] == [2]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded._name_or_path = config._name_or_path
    assert loaded.to_dict() == config.to_dict()
    again = type(config).from_dict(values)
    assert again.sparse_layers == [2]
    assert again.nsa_config == config.nsa_config
    defaults = integration.NSALlamaConfig(num_hidden_layers=2)
    assert defaults.nsa_config == conversion_config()
    assert defaults.sparse_layers == [0, 1]
    assert defaults.nsa_gates == list(integration.START_OF_GATES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsa": {"window": 3}}, "NSAConfig has no field 'window'"),
        ({"nsa_layers": [2]}, "layers must be different numbers from 0 to 1"),
        ({"nsa_gates": [0.5]}, "nsa_gates must be a number between 0 and 1"),
        ({"nsa_options": {"speed": 9}}, "nsa_options must be of impl, loop_order and recompute, got speed"),
        ({"nsa_options": {"impl": "fast"}}, "impl must be one of auto, "),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type must be one of"),
    ],
    ids=str,
)
def test_wrong_fields(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        integration.NSALlamaConfig(num_hidden_layers=2, **fields)


# Up to version 5.17 transformers takes the place of the weights for that of the model.
@pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type:UserWarning"
)
def test_weights_that_are_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model, ids = sparse_model("llama", PAPER), tokens_of(2, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
        close(model(ids, use_cache=False).logits, expected)
        close(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
