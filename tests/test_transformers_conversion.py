"""`convert`: pretrained models of transformers keep their weights, and stay what they were where sparse is full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.integrations import transformers as integration
from flash_sparse_attention.integrations.transformers import NSAAttention, conversion_config, convert
from flash_sparse_attention.nn import NativeSparseAttention, record_attention
from flash_sparse_attention.nn.rotary import Rotary
from tiny_transformers import (
    ARCHITECTURES,
    COVERING,
    SIZES,
    WITHOUT_COMPRESSED,
    base_config,
    base_model,
    close,
    sparse_model,
    tokens_of,
    transformers,
)

NEW = ("branch_gate_proj", "compressor_k", "compressor_v")
PRESETS = {name: NSAConfig.preset(name, **COVERING) for name in ("paper", "fsa")}
PRESETS["fla"] = NSAConfig.preset("fla", **COVERING | {"kernel_size": 4, "kernel_stride": 4})


def is_new(name: str) -> bool:
    return any(part in name for part in NEW)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classes_and_weights(architecture: str):
    model = base_model(architecture)
    before, base = dict(model.named_parameters()), type(model)
    names = list(before)
    assert convert(model, conversion_config(**SIZES)) is model
    classes = integration.sparse_classes(architecture)
    assert (type(model), type(model.model), type(model.config)) == (classes.causal_lm, classes.model, classes.config)
    assert isinstance(model, base)
    assert type(model).__name__ == f"NSA{base.__name__}" == model.config.architectures[0]
    assert getattr(integration, type(model).__name__) is type(model)
    assert model.config.model_type == f"nsa_{architecture}"
    assert model.config is model.model.config
    # Names of projections that are split between devices do not tell of the new ones.
    assert model.config.base_model_tp_plan is None
    assert not model._can_compile_fullgraph
    assert all(isinstance(layer.self_attn, NSAAttention) for layer in model.model.layers)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    after = dict(model.named_parameters())
    assert [name for name in after if not is_new(name)] == names
    assert all(after[name] is before[name] for name in names)
    gates = model.model.layers[0].self_attn.branch_gate_proj
    close(gates.bias.sigmoid(), torch.tensor(4 * integration.START_OF_GATES, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_the_original_where_all_is_covered(architecture: str, dtype: torch.dtype):
    model, ids = base_model(architecture, dtype), tokens_of(2, 30)
    expected = logits(model, ids)
    got = logits(convert(model, conversion_config(**COVERING), gates=WITHOUT_COMPRESSED), ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    # Selection alone is full attention, and the window alone.
    for gates in ((1e-6, 1 - 2e-6, 1e-6), (1e-6, 1e-6, 1 - 2e-6)) if dtype == torch.float64 else ():
        got = logits(convert(base_model(architecture, dtype), conversion_config(**COVERING), gates=gates), ids)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 500.0,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 500.0,
            }
        },
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 6},
    ],
    ids=str,
)
def test_options_of_the_base_model(changes: dict[str, Any]):
    model, ids = base_model("llama", **changes), tokens_of(2, 30)
    expected = logits(model, ids)
    convert(model, conversion_config(**COVERING), gates=WITHOUT_COMPRESSED)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    tied = changes.get("tie_word_embeddings", False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.rope_parameters == base_config("llama", **changes).rope_parameters


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str, architecture: str):
    model, ids = base_model(architecture), tokens_of(2, 30)
    expected, before = logits(model, ids), model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    convert(model, PRESETS[preset], gates=WITHOUT_COMPRESSED)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    after = model.state_dict()
    times = 3 if preset == "paper" else 1
    for name, value in before.items():
        if "k_proj" in name or "v_proj" in name:
            value = torch.cat([value] * times)
        close(after[name], value)


def test_compression_starts_as_the_mean():
    model = convert(base_model(), conversion_config(**SIZES))
    attention = model.model.layers[1].self_attn
    x = torch.randn(10, 2, 8, dtype=torch.float64)
    close(attention.compressor_k(x)[1], x[2:6].mean(0))
    close(attention.compressor_v(x)[0], x[:4].mean(0))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("preset", ["conversion", "paper"])
def test_attention_is_that_of_the_layer(preset: str, architecture: str):
    nsa = conversion_config(**SIZES) if preset == "conversion" else NSAConfig.preset("paper", **SIZES)
    rope = {"rope_type": "default", "rope_theta": 700.0}
    model = sparse_model(architecture, nsa, rope_parameters=rope)
    ours = model.model.layers[2].self_attn
    layer = NativeSparseAttention(
        24,
        4,
        2,
        nsa,
        head_dim=8,
        rope_theta=700.0,
        qk_norm_eps=model.config.rms_norm_eps if architecture == "qwen3" else None,
        dtype=torch.float64,
    )
    layer.load_state_dict(ours.state_dict())
    if architecture == "qwen3":
        # transformers' norm computes in float32 too.
        layer.q_norm, layer.k_norm = ours.q_norm, ours.k_norm
    hidden = torch.randn(2, 40, 24, dtype=torch.float64)
    # transformers computes angles in float32.
    compute = integration.inputs.rotations_of(model.model.rotary_emb, torch.float64)
    layout = SequenceLayout.uniform(2, 40)
    with torch.no_grad():
        expected = layer(hidden)
        rotary = Rotary(compute(layout.positions()), compute)
        got, _ = ours(hidden, sparse_inputs=integration.inputs.SparseInputs(layout, None, rotary))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        close(got, layer._forward(hidden.flatten(0, 1), layout, rotary, None).view(got.shape))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_some_layers(architecture: str):
    base, ids = base_model(architecture), tokens_of(2, 40)
    with torch.no_grad():
        expected = base(ids, output_hidden_states=True).hidden_states
    model = convert(base, conversion_config(**SIZES), layers=[2, 1])
    assert model.config.nsa_layers == model.config.sparse_layers == [1, 2]
    assert [isinstance(layer.self_attn, NSAAttention) for layer in model.model.layers] == [False, True, True]
    with torch.no_grad():
        got = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    close(got[1], expected[1])
    assert (got[2] - expected[2]).abs().max() > 1e-3
    assert len(got) == len(expected)


def test_sliding_windows_are_replaced():
    # Layers of Mistral and Qwen2 may have windows, which sparse ones do not keep.
    model, ids = base_model("mistral", sliding_window=4), tokens_of(1, 30)
    expected = logits(base_model("mistral"), ids)
    assert (logits(model, ids) - expected).abs().max() > 1e-2
    convert(model, conversion_config(**COVERING), gates=WITHOUT_COMPRESSED)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)


def test_fields_as_a_mapping_and_options():
    model = convert(base_model(), {"window_size": 7}, impl="reference", recompute=["window"])
    assert model.config.nsa_config == conversion_config(window_size=7)
    layer = model.model.layers[0].self_attn
    assert (layer.config.window_size, layer.impl, layer.recompute) == (7, "reference", ("window",))
    assert model.config.nsa_options == {"impl": "reference", "recompute": ["window"]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_and_training_mode(architecture: str):
    model = base_model(architecture, torch.bfloat16).train()
    convert(model, conversion_config(**SIZES))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in convert(base_model(architecture)).modules())
    model.eval()
    assert logits(model, tokens_of(1, 20)).dtype == torch.bfloat16
    # Angles are not rounded.
    by = integration.inputs.rotations_of(model.model.rotary_emb, torch.bfloat16)(torch.arange(9))
    assert by.cos.dtype == by.sin.dtype == torch.float32


def test_autocast():
    model, ids = sparse_model("qwen3", dtype=torch.float32), tokens_of(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, ids)
        with torch.no_grad():
            cached = model(ids[:, :20], use_cache=True)
            last = model(ids[:, 20:], past_key_values=cached.past_key_values).logits
    scale = logits(model, ids).abs().max()
    assert (got - logits(model, ids)).abs().max() < 0.1 * scale
    assert (last - got[:, 20:]).abs().max() < 0.1 * scale


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_full_layers_keep_their_implementation(kind: str):
    model = base_model()
    model.set_attn_implementation(kind)
    convert(model, layers=[1])
    assert model.config._attn_implementation == kind
    assert model.model.layers[0].self_attn.config is model.config
    model.set_attn_implementation("eager" if kind == "sdpa" else "sdpa")
    assert model.model.layers[0].self_attn.config._attn_implementation != kind


def test_records_of_attention():
    model, ids = sparse_model(), tokens_of(2, 30)
    with record_attention(model) as records:
        logits(model, ids)
    assert list(records) == [f"model.layers.{number}.self_attn" for number in range(3)]
    assert records["model.layers.0.self_attn"].gates.shape == (60, 4, 3)


def unchanged(model: Any, before: dict[str, Any]) -> None:
    assert type(model) is before["class"]
    assert type(model.base_model) is before["decoder"]
    assert model.config is before["config"]
    assert model.config.to_dict() == before["values"]
    assert [id(module) for module in model.modules()] == before["modules"]
    assert list(model.state_dict()) == list(before["weights"])
    assert all(torch.equal(value, before["weights"][name]) for name, value in model.state_dict().items())


def state(model: Any) -> dict[str, Any]:
    return {
        "class": type(model),
        "decoder": type(model.base_model),
        "config": model.config,
        "values": model.config.to_dict(),
        "modules": [id(module) for module in model.modules()],
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"layers must be different numbers from 0 to 2, at least one, got \[3\]"),
        ({"layers": []}, "layers must be different numbers from 0 to 2, at least one, got"),
        ({"layers": [1, 1]}, "layers must be different numbers"),
        ({"layers": [True]}, "layers must be different numbers"),
        ({"gates": (0.5, 0.5)}, "nsa_gates must be a number between 0 and 1 for each of compressed, selected, window"),
        ({"gates": (0.0, 0.5, 0.5)}, "nsa_gates must be a number between 0 and 1"),
        ({"nsa": {"window": 7}}, "NSAConfig has no field 'window'"),
        ({"nsa": {"window_size": 0}}, "window_size must be"),
        ({"impl": "fastest"}, "impl must be"),
        ({"loop_order": "fastest"}, "loop_order must be"),
        ({"recompute": ["everything"]}, "recompute must be"),
        ({"dtype": torch.bfloat16}, "dtype must be given with a name or folder"),
    ],
    ids=str,
)
def test_wrong_options_change_nothing(options: dict[str, Any], message: str):
    model = base_model("qwen2")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    unchanged(model, before)


def foreign(name: str) -> Any:
    if name == "gpt2":
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 97}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    if name == "t5":
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    if name == "decoder":
        return base_model().model
    if name == "dynamic rope":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
        return base_model(rope_parameters=rope)
    if name == "partial rope":
        return transformers.StableLmForCausalLM(base_config("stablelm", partial_rotary_factor=0.25))
    if name == "gemma2":
        return transformers.AutoModelForCausalLM.from_config(
            base_config("gemma2", attn_logit_softcapping=0.1, query_pre_attn_scalar=8)
        )
    if name == "cohere":
        return transformers.AutoModelForCausalLM.from_config(base_config("cohere"))
    if name == "gpt_oss":
        return transformers.AutoModelForCausalLM.from_config(base_config("gpt_oss", num_local_experts=2))
    model = base_model()
    attention = model.model.layers[1].self_attn
    if name == "other attention":
        forward = attention.forward
        attention.forward = lambda *args, **kwargs: (2 * forward(*args, **kwargs)[0], None)
    elif name == "extra module":
        attention.gate = nn.Linear(2, 2)
    elif name == "extra parameter":
        attention.sinks = nn.Parameter(torch.zeros(4))
    elif name == "no output":
        del attention.o_proj
    elif name == "wide norm":
        attention.q_norm, attention.k_norm = nn.RMSNorm(32), nn.RMSNorm(16)
    elif name == "one norm":
        attention.q_norm = nn.RMSNorm(8).double()
    elif name == "sparse":
        convert(model)
    else:
        raise AssertionError(name)
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "model must be with layers and rotary_emb, like Llama, got GPT2Model"),
        ("t5", "decoder"),
        ("decoder", "model_or_path must be a LlamaForCausalLM, got LlamaModel"),
        ("dynamic rope", "rope_type must be one of default, linear, llama3, yarn, got 'dynamic'"),
        ("partial rope", "attention|rotary"),
        ("gemma2", "Gemma2Attention with attn_logit_softcapping"),
        ("gpt_oss", "GptOssAttention with sinks"),
        ("other attention", "got one whose output in layer 1 differs by 50%"),
        ("cohere", "got one whose output in layer 0 differs by"),
        ("extra module", "got LlamaAttention with gate"),
        ("extra parameter", "got LlamaAttention with sinks"),
        ("no output", "got LlamaAttention without o_proj"),
        ("wide norm", r"q_norm must be over the 8 channels of a head, got \[32\]"),
        ("one norm", "with norms of both queries and keys, or none"),
        ("sparse", "'nsa_llama', which is sparse already"),
    ],
)
def test_other_models_stay_as_they_are(name: str, message: str):
    model = foreign(name)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        convert(model)
    unchanged(model, before)


def test_other_arguments():
    with pytest.raises(ValueError, match=r"model_or_path must be a model of transformers, .* got Linear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model_type must be that of a decoder of transformers"):
        integration.sparse_classes("no such model")
    model = base_model()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="on one device, got one that is spread over several"):
        convert(model)
    with pytest.raises(ValueError, match="sparse_inputs must be passed by the model"):
        sparse_model().model.layers[0].self_attn(torch.zeros(1, 2, 24))


@pytest.mark.parametrize("architecture", ["granite", "olmo", "smollm3", "phi3"])
def test_further_architectures(architecture: str):
    """What computes the same attention works, whatever its name; others are refused."""
    model = transformers.AutoModelForCausalLM.from_config(base_config(architecture)).eval().double()
    ids = tokens_of(1, 20)
    expected = logits(model, ids)
    if architecture == "phi3":
        with pytest.raises(ValueError, match="Phi3Attention without q_proj"):
            convert(model)
        return
    convert(model, conversion_config(**COVERING), gates=WITHOUT_COMPRESSED)
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
