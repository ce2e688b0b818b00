"""`LanguageModel`: its configuration, its start, what it computes, and that it learns."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig, NativeSparseAttention, record_attention
from flash_sparse_attention.nn.causal_attention import CausalAttention
from flash_sparse_attention.nn.rotary import apply_rotary

NSA = NSAConfig(kernel_size=4, kernel_stride=2, block_size=4, num_selected_blocks=4, window_size=5)
KINDS = ["nsa", "full"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def configure(attention="nsa", **changes):
    values = {
        "vocab_size": 17,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "attention": attention,
        "nsa": NSA,
    }
    return LanguageModelConfig(**{**values, **changes})


def make(attention="nsa", dtype=torch.float64, **changes):
    """A model whose parameters are far from their small start, so that every part of it shows in the logits."""
    model = LanguageModel(configure(attention, **changes), impl="reference", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(*shape):
    return torch.randint(17, shape)


def loss_of(model, sequence):
    logits = model(sequence)
    return F.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), sequence[..., 1:].flatten())


@pytest.mark.parametrize("nsa", [NSA, NSAConfig.preset("fsa", window_size=7)], ids=["small", "fsa"])
def test_config_survives_json(nsa):
    config = configure(tie_embeddings=False, rope_theta=None, norm_eps=1e-6, attention="full", nsa=nsa)
    assert LanguageModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert LanguageModelConfig.from_dict({"nsa": nsa}) == LanguageModelConfig(nsa=nsa)
    assert LanguageModelConfig.from_dict({}) == LanguageModelConfig()


def test_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        configure().num_layers = 3
    assert len({configure(), configure(), configure("full")}) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 2, "a": 1}, "LanguageModelConfig has no field 'a', 'layers': known fields are attention, head_dim"),
        ({"nsa": {"window": 2}}, "NSAConfig has no field 'window'"),
        ({"nsa": None}, "nsa must be an NSAConfig, got NoneType"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"hidden_size": 1.5}, "hidden_size must be an integer of at least 1, got 1.5"),
        ({"intermediate_size": 0}, "intermediate_size must be an integer"),
        ({"num_layers": True}, "num_layers must be an integer of at least 1, got True"),
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads=2, got 5"),
        ({"head_dim": 7}, "head_dim must be even for rotary embedding, got 7"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"norm_eps": 0.0}, "norm_eps must be a number between 0 and 1, got 0.0"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a number between 0 and 1, got '1e-5'"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False, got 1"),
        ({"attention": "dense"}, "attention must be one of nsa, full, got 'dense'"),
    ],
)
def test_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig.from_dict(values)


def test_sparse_and_full_differ_in_attention_alone():
    names = {kind: dict(make(kind).named_parameters()) for kind in KINDS}
    shared = set(names["nsa"]) & set(names["full"])
    assert set(names["full"]) == shared
    assert {name.split(".")[3] for name in set(names["nsa"]) - shared} == {
        "branch_gate_proj",
        "compressor_k",
        "compressor_v",
    }
    projections = ("k_proj.weight", "v_proj.weight")
    for name in shared:
        times = 3 if name.endswith(projections) else 1
        assert names["nsa"][name].numel() == times * names["full"][name].numel(), name
    model = make(nsa=NSA.replace(branch_kv="shared"))
    assert all(dict(model.named_parameters())[name].shape == names["full"][name].shape for name in shared)


def test_parameter_names_are_llamas():
    names = {name for name, _ in make("full", num_layers=1, tie_embeddings=False).named_parameters()}
    assert names == {
        "embed_tokens.weight",
        *(f"layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
        "norm.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize("attention", KINDS)
def test_starts_as_documented(attention):
    config = configure(
        attention, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=99, tie_embeddings=False
    )
    model = LanguageModel(config)
    for name, parameter in model.named_parameters():
        module, kind = name.rsplit(".", 2)[-2:]
        if "norm" in name:
            assert parameter.eq(1).all(), name
        elif module == "branch_gate_proj":
            value = 0.0 if kind == "weight" else -math.log(2)
            assert parameter.tolist() == torch.full_like(parameter, value).tolist(), name
        elif "compressor" not in name:
            std = 0.02 / 2 if module in ("o_proj", "down_proj") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
            assert parameter.mean().abs() < 0.1 * std, name
    if attention == "nsa":
        weight = model.layers[1].self_attn.compressor_k.weight.view(2, 4, 16, 2, 16)
        diagonal = weight.diagonal(dim1=2, dim2=4).mean((0, 1, 3)).tolist()
        assert diagonal == pytest.approx([1 / 4, -1 / 4], abs=0.01)


def test_starts_with_even_odds():
    sequence = tokens(2, 30)
    for kind in KINDS:
        loss = loss_of(LanguageModel(configure(kind)), sequence)
        assert loss.item() == pytest.approx(math.log(17), abs=0.1)


def test_reset_parameters_starts_again():
    model = make()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    model.reset_parameters()
    assert all(parameter.abs().max() <= 1.5 for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_num_parameters(tied):
    model = make("full", tie_embeddings=tied)
    layer = 16 * 8 * (4 + 2 + 2 + 4) + 3 * 16 * 24 + 2 * 16
    assert model.num_parameters() == (1 if tied else 2) * 17 * 16 + 2 * layer + 16
    model.embed_tokens.requires_grad_(False)
    assert model.num_parameters() == (0 if tied else 1) * 17 * 16 + 2 * layer + 16


def test_blocks_are_pre_norm_with_residuals_and_swiglu():
    model = make("full", num_layers=1, norm_eps=0.3)
    layer, sequence = model.layers[0], tokens(12)

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + 0.3).sqrt() * module.weight

    hidden = model.embed_tokens.weight[sequence]
    hidden = hidden + layer.self_attn(norm(hidden, layer.input_layernorm))
    x = norm(hidden, layer.post_attention_layernorm)
    mlp = layer.mlp
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    hidden = hidden + (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
    expected = norm(hidden, model.norm) @ model.embed_tokens.weight.T
    torch.testing.assert_close(model(sequence), expected)


def test_untied_head_is_its_own():
    model = make("full", tie_embeddings=False)
    sequence = tokens(12)
    logits = model(sequence)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(model(sequence), 2 * logits)


@pytest.mark.parametrize("rope_theta", [100.0, None])
@pytest.mark.parametrize("lengths", [[9, 0, 1, 5], [15], [5, 5, 5], [0], []], ids=str)
def test_full_attention_is_softmax_over_earlier_tokens(lengths, rope_theta):
    layer = CausalAttention(12, 6, 2, head_dim=8, rope_theta=rope_theta, qkv_bias=True, dtype=torch.float64)
    hidden, layout = torch.randn(sum(lengths), 12, dtype=torch.float64), SequenceLayout.from_lengths(lengths)
    positions = layout.positions() * 3
    expected = []
    for x, position in zip(hidden.split(lengths), positions.split(lengths), strict=True):
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        if rope_theta is not None:
            q, k = apply_rotary(q, position, rope_theta), apply_rotary(k, position, rope_theta)
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(3, 1)) * 8**-0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(3, 1))
        expected.append(layer.o_proj(out.flatten(1)))
    out = layer(hidden, layout, positions)
    torch.testing.assert_close(out, torch.cat(expected) if expected else hidden)
    default = layer(hidden, layout.cu_seqlens)
    torch.testing.assert_close(default, layer(hidden, layout, layout.positions()))
    if len(set(lengths)) == 1:
        batched = layer(hidden.unflatten(0, (len(lengths), lengths[0])))
        torch.testing.assert_close(batched.flatten(0, 1), default)


def test_full_attention_resets_and_refuses():
    layer = CausalAttention(12, 6, 2, head_dim=8, qkv_bias=True)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    layer.reset_parameters()
    assert all(parameter.abs().max() < 1 for parameter in layer.parameters())
    assert "num_heads=6, num_kv_heads=2, head_dim=8" in repr(layer)
    with pytest.raises(ValueError, match="num_heads must be a multiple"):
        CausalAttention(12, 5, 2)
    with pytest.raises(ValueError, match="hidden_states must be"):
        layer(torch.randn(4, 11))


@pytest.mark.parametrize("attention", KINDS)
def test_packed_is_batched_is_one_at_a_time(attention):
    model, sequence = make(attention), tokens(40)
    alone = torch.cat([model(sequence[:20]), model(sequence[20:])])
    torch.testing.assert_close(model(sequence, torch.tensor([0, 20, 40], dtype=torch.int32)), alone)
    torch.testing.assert_close(model(sequence, SequenceLayout.from_lengths([20, 20])), alone)
    batched = model(sequence.view(2, 20))
    assert batched.shape == (2, 20, 17)
    torch.testing.assert_close(batched.flatten(0, 1), alone)


@pytest.mark.parametrize("attention", KINDS)
def test_later_tokens_and_other_sequences_change_nothing(attention):
    model, sequence = make(attention), tokens(40)
    layout = SequenceLayout.from_lengths([18, 0, 22])
    before = model(sequence, layout)
    sequence[30] = (sequence[30] + 1) % 17
    changed = (model(sequence, layout) - before).abs().amax(-1) > 1e-12
    assert not changed[:30].any()
    assert changed[30:].all()


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("lengths", [[1], [0], [3, 0], []], ids=str)
def test_short_sequences(attention, lengths):
    model = make(attention)
    logits = model(tokens(sum(lengths)), SequenceLayout.from_lengths(lengths))
    assert logits.shape == (sum(lengths), 17)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attention", KINDS)
def test_every_parameter_learns(attention):
    model = make(attention)
    loss_of(model, tokens(2, 30)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("attention", KINDS)
def test_learns_a_short_text_by_heart(attention):
    text = tokens(20).repeat(2)
    model = LanguageModel(configure(attention, num_layers=1, hidden_size=32, intermediate_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(32):
        optimizer.zero_grad()
        loss = loss_of(model, text)
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize("attention", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(attention):
    model, sequence = make(attention), tokens(2, 20)
    passes = []
    model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))

    def gradients():
        passes.clear()
        model.zero_grad()
        loss_of(model, sequence).backward()
        return [parameter.grad for parameter in model.parameters()], len(passes)

    expected, once = gradients()
    model.gradient_checkpointing = True
    grads, twice = gradients()
    assert (once, twice) == (1, 2)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)
    model.eval()
    assert gradients()[1] == 1


@pytest.mark.parametrize("attention", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_survives_safetensors(attention, tied, tmp_path):
    model, other = make(attention, tie_embeddings=tied), make(attention, tie_embeddings=tied)
    # Refuses tensors that share memory, as a tied head would.
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    sequence = tokens(20)
    torch.testing.assert_close(other(sequence), model(sequence), rtol=0, atol=0)
    assert not list(model.buffers())


@pytest.mark.parametrize("attention", KINDS)
def test_autocast_and_bfloat16(attention):
    model = LanguageModel(configure(attention))
    sequence = tokens(2, 20)
    expected = model(sequence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(sequence)
        loss = loss_of(model, sequence)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.02)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    low = model.to(torch.bfloat16)
    torch.testing.assert_close(low(sequence).float(), expected, rtol=0.1, atol=0.02)


def test_options_reach_the_layers():
    config = configure(rope_theta=77.0)
    model = LanguageModel(config, impl="reference", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for layer in model.layers:
        attention = layer.self_attn
        assert isinstance(attention, NativeSparseAttention)
        assert (attention.config, attention.rope_theta, attention.impl) == (NSA, 77.0, "reference")
    full = LanguageModel(configure("full", rope_theta=77.0), device="meta")
    assert {p.device.type for p in full.parameters()} == {"meta"}
    assert full.layers[0].self_attn.rope_theta == 77.0
    with pytest.raises(ValueError, match="impl must be one of"):
        LanguageModel(config, impl="fastest")(tokens(5))


def test_records_of_a_model():
    model = make()
    with record_attention(model) as records:
        model(tokens(2, 20))
    assert set(records) == {"layers.0.self_attn", "layers.1.self_attn"}
    with record_attention(make("full")) as records:
        pass
    assert records == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(tokens(20).int()), r"tokens must be int64 \[N\], got int32"),
        (lambda f: f(tokens(1, 2, 3)), r"tokens must be int64 \[N\], got \[1, 2, 3\]: pack them as \[N\]"),
        (lambda f: f([1, 2]), r"tokens must be a tensor int64 \[N\], got list"),
        (lambda f: f(tokens(2, 10), torch.tensor([0, 20]).int()), r"cu_seqlens must be left out for a batched tokens"),
        (lambda f: f(tokens(20), torch.tensor([0, 19]).int()), r"cu_seqlens must be ending at .*N=20, got 19"),
    ],
)
def test_refuses_tensors(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
