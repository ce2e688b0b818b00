"""`NativeSparseAttention`: against an independent computation, in every combination of its options, and as a module."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from flash_sparse_attention import (
    Interval,
    NSAConfig,
    SequenceLayout,
    combine,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
)
from flash_sparse_attention.config import compression_kinds, preset_names
from flash_sparse_attention.nn import AttentionRecord, NativeSparseAttention, attention, record_attention
from flash_sparse_attention.nn.attention import BranchGate

# Small enough that 40 tokens have blocks to choose from, and windows that do not reach back to the start.
SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "num_selected_blocks": 4, "window_size": 5}
LENGTHS = [21, 0, 3, 1, 15]
COMBINATIONS = [
    dict(zip(("compression", "position_embedding", "rope", "branch_kv", "gate"), values, strict=True))
    for values in itertools.product(
        compression_kinds(), ("none", "k", "kv"), ("after", "before"), ("shared", "independent"), ("per_head",)
    )
]
COMBINATIONS += [{**COMBINATIONS[index], "gate": "per_token"} for index in (0, 21, -1)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(config=None, dtype=torch.float64, shaken=True, **options):
    """A layer with G = 3 and Dk != Dv; `shaken`, since gates start without weights and windows as a mean."""
    config = config or NSAConfig(**SIZES)
    options = {"head_dim": 8, "head_dim_v": 6, "impl": "reference", **options}
    layer = NativeSparseAttention(12, 6, 2, config, dtype=dtype, **options)
    if shaken:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def hidden_states(tokens=sum(LENGTHS), dtype=torch.float64):
    return torch.randn(tokens, 12, dtype=dtype)


def turned(x, positions, theta):
    """Rotary embedding with complex numbers, where channel c is the real and channel c + D / 2 the imaginary part."""
    real, imaginary = x.chunk(2, -1)
    frequencies = theta ** -(torch.arange(x.shape[-1] // 2, dtype=torch.float64) / (x.shape[-1] // 2))
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None, None] * frequencies)
    z = torch.complex(real, imaginary) * turn
    return torch.cat((z.real, z.imag), -1)


def compressed(compressor, x):
    """One window and one head after the other."""
    c, (kind, weight, bias, weight_out, bias_out, embedding) = SIZES, compressor.compression()
    starts = range(0, x.shape[0] - c["kernel_size"] + 1, c["kernel_stride"])
    rows = []
    for start, head in itertools.product(starts, range(x.shape[1])):
        window = x[start : start + c["kernel_size"], head]
        window = window if embedding is None else window + embedding
        if kind == "mean":
            rows.append(window.mean(0))
        elif kind == "weighted":
            rows.append(weight[head] @ window)
        elif kind == "linear":
            rows.append(window.flatten() @ weight[head])
        else:
            rows.append(F.gelu(window.flatten() @ weight[head] + bias[head]) @ weight_out[head] + bias_out[head])
    return torch.stack(rows).view(len(starts), *x.shape[1:]) if rows else x[:0]


def one_sequence(layer, hidden, positions):
    """The layer by the spec for one sequence, branch by branch, on the layer's parameters taken apart by hand."""
    config, theta = layer.config, layer.rope_theta
    if theta is None:
        theta, positions = 1.0, torch.zeros_like(positions)

    def project(linear, heads, branch=0, branches=1, scale=1.0):
        weight = linear.weight.view(branches, -1, hidden.shape[-1])[branch]
        bias = 0 if linear.bias is None else linear.bias.view(branches, -1)[branch]
        return (scale * hidden @ weight.T + bias).view(len(hidden), heads, -1)

    branches = 3 if config.branch_kv == "independent" else 1
    ks = [project(layer.k_proj, 2, min(b, branches - 1), branches) for b in range(3)]
    vs = [project(layer.v_proj, 2, min(b, branches - 1), branches) for b in range(3)]
    q = turned(project(layer.q_proj, 6), positions, theta)
    if config.rope == "before":
        k_compressed = compressed(layer.compressor_k, turned(ks[0], positions, theta))
    else:
        k_compressed = compressed(layer.compressor_k, ks[0])
        starts = positions[[i * SIZES["kernel_stride"] for i in range(len(k_compressed))]]
        k_compressed = turned(k_compressed, starts, theta)
    common = {"softmax_scale": layer.softmax_scale, "impl": "reference"}
    windows = {name: SIZES[name] for name in ("kernel_size", "kernel_stride")}
    out_compressed, lse = interval_attention(
        q, k_compressed, compressed(layer.compressor_v, vs[0]), Interval(**windows), **common
    )
    sizes = {name: size for name, size in SIZES.items() if name != "window_size"}
    indices = select_blocks(q, k_compressed, lse, **sizes, **common)
    out_selected = selected_attention(q, turned(ks[1], positions, theta), vs[1], indices, block_size=4, **common).out
    window = Interval(window_size=SIZES["window_size"])
    out_window = interval_attention(q, turned(ks[2], positions, theta), vs[2], window, **common).out
    gates = project(layer.branch_gate_proj, 6 if config.gate == "per_head" else 1, scale=layer.hidden_size**-0.5)
    return combine(out_compressed, out_selected, out_window, gates, impl="reference").flatten(1) @ layer.o_proj.weight.T


def by_the_spec(layer, hidden, lengths=LENGTHS, positions=None):
    positions = torch.cat([torch.arange(length) for length in lengths]) if positions is None else positions
    parts = zip(hidden.split(lengths), positions.split(lengths), strict=True)
    return torch.cat([one_sequence(layer, part, position) for part, position in parts if len(part)])


@pytest.mark.parametrize("choices", COMBINATIONS, ids=lambda choices: "-".join(choices.values()))
def test_follows_the_spec_in_every_combination(choices):
    layer = make(NSAConfig(**SIZES, **choices))
    assert (layer.compressor_k.position_embedding is not None) == (choices["position_embedding"] in ("k", "kv"))
    assert (layer.compressor_v.position_embedding is not None) == (choices["position_embedding"] == "kv")
    hidden = hidden_states().requires_grad_()
    out = layer(hidden, SequenceLayout.from_lengths(LENGTHS))
    expected = by_the_spec(layer, hidden)
    torch.testing.assert_close(out, expected)
    wrt = {"hidden_states": hidden, **dict(layer.named_parameters())}
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, list(wrt.values()), cotangent)
    for name, grad, wanted in zip(
        wrt, grads, torch.autograd.grad(expected, list(wrt.values()), cotangent), strict=True
    ):
        assert grad.isfinite().all(), name
        assert grad.count_nonzero() > 0, name
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("preset", preset_names())
def test_presets_run_forward_and_backward(preset, impl):
    layer = NativeSparseAttention(32, 4, 2, NSAConfig.preset(preset), head_dim=16, impl=impl)
    hidden = torch.randn(2, 150, 32)
    out = layer(hidden)
    assert out.shape == hidden.shape
    assert out.isfinite().all()
    out.pow(2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name


def test_default_implementation_agrees_with_the_reference():
    hidden, layout = hidden_states(), SequenceLayout.from_lengths(LENGTHS)
    for preset in preset_names():
        layer = make(NSAConfig.preset(preset, **SIZES))
        expected = layer(hidden, layout)
        layer.impl = layer.compressor_k.impl = layer.compressor_v.impl = "auto"
        torch.testing.assert_close(layer(hidden, layout), expected)


@pytest.mark.parametrize(
    "options",
    [{"qkv_bias": True}, {"softmax_scale": 0.7}, {"rope_theta": 50.0}, {"rope_theta": None}, {"head_dim_v": None}],
    ids=str,
)
def test_options_follow_the_spec(options):
    for rope in ("after", "before"):
        layer = make(NSAConfig(**SIZES, rope=rope), **options)
        assert (layer.q_proj.bias is not None) == options.get("qkv_bias", False)
        hidden = hidden_states()
        out = layer(hidden, SequenceLayout.from_lengths(LENGTHS))
        torch.testing.assert_close(out, by_the_spec(layer, hidden))


def test_compressed_keys_stand_at_the_start_of_their_windows(monkeypatch):
    seen = {}
    monkeypatch.setattr(attention, "nsa_attention", lambda *args, **kw: seen.update(kw) or nsa_attention(*args, **kw))
    layer = make(NSAConfig.preset("fla", **SIZES, rope="after"))
    hidden = hidden_states(10)
    layer(hidden)
    k = layer.k_proj(hidden).view(10, 2, 8)
    means = torch.stack([k[i * 2 : i * 2 + 4].mean(0) for i in range(4)])
    torch.testing.assert_close(seen["k_compressed"], turned(means, torch.tensor([0, 2, 4, 6]), 10000.0))


# Weights that mix channels, applied to rotated keys, see more than distances: "before" is for pooling.
@pytest.mark.parametrize(("rope", "compression"), [("after", "mlp"), ("before", "weighted")])
def test_position_ids_move_queries_and_all_keys(rope, compression):
    layer = make(NSAConfig(**SIZES, rope=rope, compression=compression, position_embedding="none"))
    hidden, layout = hidden_states(), SequenceLayout.from_lengths(LENGTHS)
    positions = torch.randint(-50, 50, (len(hidden),))
    out = layer(hidden, layout, positions)
    torch.testing.assert_close(out, by_the_spec(layer, hidden, positions=positions))
    torch.testing.assert_close(layer(hidden, layout, positions.int()), out)
    default = layer(hidden, layout)
    assert not torch.allclose(out, default)
    # Only distances count.
    torch.testing.assert_close(layer(hidden, layout, layout.positions() + 1000), default)


def test_position_ids_of_a_batch():
    layer = make()
    hidden, positions = hidden_states().view(2, 20, 12), torch.randint(0, 50, (2, 20))
    expected = by_the_spec(layer, hidden.flatten(0, 1), [20, 20], positions.flatten())
    torch.testing.assert_close(layer(hidden, position_ids=positions), expected.view(2, 20, 12))


def test_without_rotary_positions_do_not_matter():
    layer = make(rope_theta=None)
    hidden = hidden_states()
    torch.testing.assert_close(layer(hidden, position_ids=torch.randint(0, 50, (40,))), layer(hidden))


@pytest.mark.parametrize("preset", preset_names())
def test_later_tokens_and_other_sequences_change_nothing(preset):
    layer = make(NSAConfig.preset(preset, **SIZES))
    layout = SequenceLayout.from_lengths([18, 22])
    hidden = hidden_states()
    before = layer(hidden, layout)
    hidden[30] += 1.0
    changed = (layer(hidden, layout) - before).abs().amax(-1) > 1e-12
    assert not changed[:30].any()
    # The token itself, and its neighbours by the window; later ones by blocks and compression, too.
    assert changed[30:].all()


def test_a_token_reaches_far_beyond_the_window():
    layer = make()
    hidden = hidden_states()
    before = layer(hidden)
    hidden[0] += 1.0
    assert ((layer(hidden) - before).abs().amax(-1) > 1e-12).all()


@pytest.mark.parametrize("preset", preset_names())
def test_packed_is_batched_is_one_at_a_time(preset):
    layer = make(NSAConfig.preset(preset, **SIZES))
    hidden = hidden_states()
    alone = torch.cat([layer(hidden[:20]), layer(hidden[20:])])
    cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
    torch.testing.assert_close(layer(hidden, cu_seqlens), alone)
    torch.testing.assert_close(layer(hidden, SequenceLayout.from_cu_seqlens(cu_seqlens)), alone)
    torch.testing.assert_close(layer(hidden.view(2, 20, 12)).flatten(0, 1), alone)
    # A batch that is no contiguous tensor.
    strided = hidden.view(2, 20, 12).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(layer(strided).flatten(0, 1), alone)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("lengths", [[1], [3], [0], [0, 1, 0], []], ids=str)
@pytest.mark.parametrize("preset", preset_names())
def test_short_sequences(preset, lengths, impl):
    layer = make(NSAConfig.preset(preset, **SIZES), impl=impl)
    hidden = hidden_states(sum(lengths))
    out = layer(hidden, SequenceLayout.from_lengths(lengths))
    assert out.shape == hidden.shape
    assert out.isfinite().all()
    out.sum().backward()
    # Also what no window was made for has a gradient (0), as training on several devices asks.
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_one_token_returns_its_own_value():
    layer = make(NSAConfig(**SIZES, branch_kv="shared"), shaken=False)
    hidden = hidden_states(1)
    value = layer.v_proj(hidden).view(2, 6).repeat_interleave(3, 0).flatten()
    # The selected and the window branch at 1/3 each; no window is full, so the compressed branch is empty.
    torch.testing.assert_close(layer(hidden)[0], layer.o_proj(value * 2 / 3))


@pytest.mark.parametrize("shape", [(2, 0, 12), (0, 4, 12)], ids=str)
def test_empty_batches(shape):
    assert make()(torch.zeros(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("gate", ["per_head", "per_token"])
def test_gates_start_at_a_third(gate):
    layer = make(NSAConfig(**SIZES, gate=gate), shaken=False)
    with record_attention(layer) as records:
        layer(hidden_states())
    heads = 6 if gate == "per_head" else 1
    torch.testing.assert_close(records[""].gates, torch.full((40, heads, 3), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("num_gates", [1, 6])
def test_gates_start_where_they_are_told(num_gates):
    gate = BranchGate(12, num_gates, (0.02, 0.9, 0.08), dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    weights = gate(x).sigmoid().unflatten(-1, (num_gates, 3))
    torch.testing.assert_close(weights, torch.tensor([0.02, 0.9, 0.08], dtype=torch.float64).expand(5, num_gates, 3))
    torch.nn.init.normal_(gate.weight)
    gate.bias.data.zero_()
    gate.reset_parameters()
    torch.testing.assert_close(gate(x).sigmoid().unflatten(-1, (num_gates, 3)), weights)
    assert BranchGate(12, num_gates).start == (1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize("start", [(), (0.5, 0.5), (0.25,) * 4, (0.0, 0.5, 0.5), (1.0, 0.5, 0.5), (math.nan, 0.5, 0.5)])
def test_gates_cannot_start_elsewhere(start):
    with pytest.raises(
        ValueError, match="start must be a number between 0 and 1 for each of compressed, selected, window"
    ):
        BranchGate(12, 2, start)


@pytest.mark.parametrize("preset", preset_names())
def test_norms_of_queries_and_keys(preset):
    """The same as norms by hand: before compression and rotation, over the channels of each head."""
    sizes = SIZES | ({"kernel_size": 4, "kernel_stride": 4} if preset == "fla" else {})
    config, eps = NSAConfig.preset(preset, **sizes), 0.3
    layer = make(config, qk_norm_eps=eps)
    plain = make(config)
    missing = plain.load_state_dict(layer.state_dict(), strict=False).unexpected_keys
    assert missing == ["q_norm.weight", "k_norm.weight"]
    heads = plain._heads

    def by_hand(hidden):
        q, k, v = heads(hidden)
        q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
        return q * layer.q_norm.weight, k * layer.k_norm.weight, v

    plain._heads = by_hand
    hidden, layout = hidden_states(), SequenceLayout.from_lengths(LENGTHS)
    out = layer(hidden, layout)
    torch.testing.assert_close(out, plain(hidden, layout))
    out.square().sum().backward()
    assert layer.q_norm.weight.grad.all()
    assert layer.k_norm.weight.grad.all()
    cache = layer.new_cache(1)
    with torch.no_grad():
        for piece in hidden[:21].split([12, 1, 8]):
            with cache.extend(SequenceLayout.uniform(1, len(piece))):
                last = layer(piece[None], cache=cache.layers[0])
    torch.testing.assert_close(last[0], out[13:21].detach())


def test_norms_start_at_one_and_are_saved():
    layer = make(qk_norm_eps=1e-6)
    again = make(qk_norm_eps=1e-6)
    again.load_state_dict(layer.state_dict())
    x = hidden_states()
    torch.testing.assert_close(again(x), layer(x))
    layer.reset_parameters()
    assert layer.q_norm.weight.tolist() == layer.k_norm.weight.tolist() == [1.0] * 8
    assert make().q_norm is make().k_norm is None


def test_norms_under_autocast():
    layer = make(dtype=torch.float32, qk_norm_eps=1e-6, impl="auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(hidden_states(dtype=torch.float32)).dtype == torch.bfloat16


def test_softmax_scale_in_a_cache():
    layer, x = make(softmax_scale=0.7), hidden_states(20)
    cache = layer.new_cache(1)
    with torch.no_grad():
        for piece in x.split([12, 1, 7]):
            with cache.extend(SequenceLayout.uniform(1, len(piece))):
                last = layer(piece[None], cache=cache.layers[0])
        torch.testing.assert_close(last[0], layer(x)[13:])


def test_cache_elsewhere():
    cache = make(dtype=torch.float32).new_cache(2, 32, device="meta", dtype=torch.bfloat16)
    assert cache.device.type == "meta"
    assert cache.dtype == torch.bfloat16
    assert make(dtype=torch.bfloat16).new_cache(2, 32).dtype == torch.bfloat16


def test_reset_parameters_starts_again():
    layer = make(shaken=False)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter.abs().max() <= 1.5, name
    assert layer.q_proj.weight.std() > 0
    assert layer.branch_gate_proj.bias.tolist() == pytest.approx([-math.log(2)] * 18)
    assert layer.branch_gate_proj.weight.count_nonzero() == 0


@pytest.mark.parametrize("preset", preset_names())
def test_state_dict_survives_safetensors(preset, tmp_path):
    config = NSAConfig.preset(preset, **SIZES)
    layer, other = make(config), make(config)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    hidden = hidden_states()
    torch.testing.assert_close(other(hidden), layer(hidden), rtol=0, atol=0)
    # Nothing that would depend on a longest length.
    assert not list(layer.buffers())


def test_parameter_shapes():
    shapes = {name: tuple(p.shape) for name, p in make(NSAConfig(**SIZES), qkv_bias=True).named_parameters()}
    assert shapes == {
        "q_proj.weight": (48, 12),
        "q_proj.bias": (48,),
        "k_proj.weight": (3 * 16, 12),
        "k_proj.bias": (3 * 16,),
        "v_proj.weight": (3 * 12, 12),
        "v_proj.bias": (3 * 12,),
        "o_proj.weight": (12, 36),
        "branch_gate_proj.weight": (18, 12),
        "branch_gate_proj.bias": (18,),
        "compressor_k.weight": (2, 32, 16),
        "compressor_k.bias": (2, 16),
        "compressor_k.weight_out": (2, 16, 8),
        "compressor_k.bias_out": (2, 8),
        "compressor_k.position_embedding": (4, 8),
        "compressor_v.weight": (2, 24, 12),
        "compressor_v.bias": (2, 12),
        "compressor_v.weight_out": (2, 12, 6),
        "compressor_v.bias_out": (2, 6),
        "compressor_v.position_embedding": (4, 6),
    }


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("preset", preset_names())
def test_bfloat16_module(preset, impl):
    exact = make(NSAConfig.preset(preset, **SIZES), torch.float32, shaken=False, impl=impl)
    layer = copy.deepcopy(exact).to(torch.bfloat16)
    hidden = hidden_states(dtype=torch.bfloat16)
    out = layer(hidden)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(hidden.float()), rtol=0.1, atol=0.05)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("preset", preset_names())
def test_autocast(preset, impl, monkeypatch):
    calls = []

    def watched(*tensors, **options):
        calls.append([t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)])
        assert not torch.is_autocast_enabled("cpu")
        return nsa_attention(*tensors, **options)

    monkeypatch.setattr(attention, "nsa_attention", watched)
    layer = make(NSAConfig.preset(preset, **SIZES), torch.float32, shaken=False, impl=impl)
    hidden = hidden_states(dtype=torch.float32)
    expected = layer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden)
    assert out.dtype == torch.bfloat16
    assert {t.dtype for t in calls[0]} == {torch.float32}
    assert {t.dtype for t in calls[1]} == {torch.bfloat16}
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.05)
    out.float().pow(2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("preset", preset_names())
def test_activation_checkpointing_gives_the_same_gradients(preset, impl):
    layer = make(NSAConfig.preset(preset, **SIZES), impl=impl)
    hidden, layout = hidden_states().requires_grad_(), SequenceLayout.from_lengths(LENGTHS)
    wrt = [hidden, *layer.parameters()]
    expected = torch.autograd.grad(layer(hidden, layout).pow(2).sum(), wrt)
    out = checkpoint(layer, hidden, layout, use_reentrant=False)
    for grad, wanted in zip(torch.autograd.grad(out.pow(2).sum(), wrt), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_defaults_are_the_papers():
    layer = NativeSparseAttention(8, 2, 1, device="meta")
    assert layer.config == NSAConfig()
    assert (layer.head_dim, layer.head_dim_v, layer.rope_theta) == (128, 128, 10000.0)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    # Shapes without values.
    out = layer(torch.empty(2, 40, 8, device="meta"))
    assert (out.shape, out.device.type) == ((2, 40, 8), "meta")


def test_repr_shows_heads_and_config():
    text = repr(make(NSAConfig(**SIZES, gate="per_token")))
    for part in ("num_heads=6, num_kv_heads=2, head_dim=8, head_dim_v=6", "rope_theta=10000.0", "gate='per_token'"):
        assert part in text


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(make(NSAConfig.preset(name, **SIZES)) for name in ("paper", "fsa"))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_records_every_layer():
    model, hidden = Stack(), hidden_states().view(2, 20, 12)
    silent = model(hidden)
    with record_attention(model) as records:
        assert records == {}
        torch.testing.assert_close(model(hidden), silent, rtol=0, atol=0)
    assert set(records) == {"layers.0", "layers.1"}
    assert all(isinstance(record, AttentionRecord) for record in records.values())
    assert [record.gates.shape for record in records.values()] == [(40, 6, 3), (40, 1, 3)]
    for layer, record, x in zip(model.layers, records.values(), (hidden, model.layers[0](hidden)), strict=True):
        assert record.block_indices.shape == (40, 2, 4)
        assert record.block_indices.dtype == torch.int32
        assert record.block_indices[19].tolist() != record.block_indices[0].tolist() == [[0, -1, -1, -1]] * 2
        assert not record.gates.requires_grad
        gates = layer.branch_gate_proj(x.flatten(0, 1) / layer.hidden_size**0.5).sigmoid().view_as(record.gates)
        torch.testing.assert_close(record.gates, gates)


def test_records_hold_the_latest_pass_and_stop():
    layer = make()
    with record_attention(layer) as records:
        layer(hidden_states(10))
        layer(hidden_states(7))
        assert len(records[""].gates) == 7
    layer(hidden_states(5))
    assert len(records[""].gates) == 7


def test_recording_ends_with_an_exception():
    layer = make()
    with pytest.raises(RuntimeError, match="stop"), record_attention(layer) as records:
        raise RuntimeError("stop")
    layer(hidden_states(5))
    assert records == {}
    assert layer._recorders == []


def test_recordings_nest():
    model = Stack()
    with record_attention(model) as outer:
        with record_attention(model.layers[1]) as inner:
            model(hidden_states(9))
        model(hidden_states(4))
    assert len(inner[""].gates) == 9
    assert {len(record.gates) for record in outer.values()} == {4}


def test_nothing_to_record():
    with record_attention(torch.nn.Linear(2, 2)) as records:
        pass
    assert records == {}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 6, 2), {}, "hidden_size must be an integer of at least 1, got 0"),
        ((12, 0, 2), {}, "num_heads must be an integer of at least 1, got 0"),
        ((12, 6, 0), {}, "num_kv_heads must be an integer of at least 1, got 0"),
        ((12, 6, 4), {}, "num_heads must be a multiple of num_kv_heads=4, got 6"),
        ((12, 6, 2), {"head_dim": 7}, "head_dim must be even for rotary embedding, got 7"),
        ((12, 6, 2), {"head_dim": 0}, "head_dim must be an integer of at least 1"),
        ((12, 6, 2), {"head_dim_v": 0}, "head_dim_v must be an integer of at least 1"),
        ((12, 6, 2), {"rope_theta": -1.0}, "rope_theta must be a positive number"),
        ((12, 6, 2), {"rope_theta": "10000"}, "rope_theta must be a positive number"),
    ],
)
def test_refuses_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(*arguments, **options)


def test_odd_heads_are_fine_without_rotary():
    layer = make(head_dim=7, rope_theta=None)
    assert layer(hidden_states()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "paper"}, "config must be an NSAConfig or None, got str: NSAConfig.preset makes one of a name"),
        ({"config": {"block_size": 64}}, "config must be an NSAConfig or None, got dict"),
        ({"impl": "cuda"}, "impl must be one of auto, reference, blockwise, triton, got 'cuda'"),
        ({"loop_order": "kv"}, "loop_order must be one of auto, kv_outer, query_outer, got 'kv'"),
        ({"recompute": "all"}, "recompute must be one of compressed, selected, window, index, got 'all'"),
    ],
)
def test_refuses_options_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(8, 2, 1, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(x[:, :11]), r"hidden_states must be .*\[N, hidden_size=12\], got \[40, 11\]: pack it as"),
        (lambda f, x: f(x[0]), r"hidden_states must be .*, got \[12\]"),
        (lambda f, x: f(x.view(2, 2, 10, 12)), r"hidden_states must be .*, got \[2, 2, 10, 12\]"),
        (lambda f, x: f(x.long()), r"hidden_states must be .*, got int64"),
        (lambda f, x: f(x.tolist()), r"hidden_states must be a tensor .*, got list"),
        (lambda f, x: f(x, torch.tensor([0, 40])), r"cu_seqlens must be int32 \[B \+ 1\], got int64"),
        (lambda f, x: f(x, torch.tensor([0, 39]).int()), r"cu_seqlens must be ending at .*N=40, got 39"),
        (lambda f, x: f(x, SequenceLayout.from_lengths([39])), r"cu_seqlens must be a layout of the N=40 tokens"),
        (lambda f, x: f(x, [0, 40]), r"cu_seqlens must be an int32 tensor .*, got list"),
        (lambda f, x: f(x, SequenceLayout.from_lengths([40], "meta")), r"cu_seqlens must be on the device of hidden"),
        (lambda f, x: f(x.view(2, 20, 12), torch.tensor([0, 40]).int()), r"cu_seqlens must be left out for a batched"),
        (lambda f, x: f(x, None, torch.arange(39)), r"position_ids must be int64/int32 \[N=40\], got \[39\]"),
        (lambda f, x: f(x.view(2, 20, 12), None, torch.arange(20)), r"position_ids .* \[B=2, S=20\], got \[20\]"),
        (lambda f, x: f(x, None, torch.arange(40.0)), r"position_ids must be int64/int32 \[N=40\], got float32"),
        (lambda f, x: f(x, None, torch.arange(40, device="meta")), r"position_ids must be of the same device"),
        (lambda f, x: f(x, cache=f.new_cache(1, 64)), r"cache must be a LayerCache or None, got NSACache: one of"),
    ],
)
def test_refuses_tensors(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(), hidden_states())


def test_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="impl must be one of"):
        make(impl="fastest")(hidden_states())
