"""Compressors: how each kind starts, and that its parameters are what `functional.compress` uses."""

import pytest
import torch

from flash_sparse_attention import SequenceLayout, compress
from flash_sparse_attention.config import compression_kinds
from flash_sparse_attention.nn import Compressor

KINDS = compression_kinds()
PARAMETERS = {
    "mean": {},
    "linear": {"weight": (3, 32, 8)},
    "mlp": {"weight": (3, 32, 16), "bias": (3, 16), "weight_out": (3, 16, 8), "bias_out": (3, 8)},
    "weighted": {"logits": (3, 4)},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(kind, position_embedding=False, **options):
    return Compressor(kind, 3, 8, 4, 2, position_embedding, impl="reference", **options)


def shake(module, by=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))


@pytest.mark.parametrize("position_embedding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_owns_the_parameters_of_its_kind(kind, position_embedding):
    shapes = {name: tuple(p.shape) for name, p in make(kind, position_embedding).named_parameters()}
    assert shapes == PARAMETERS[kind] | ({"position_embedding": (4, 8)} if position_embedding else {})


@pytest.mark.parametrize("kind", ["mean", "weighted"])
def test_starts_as_the_mean(kind):
    x = torch.randn(20, 3, 8)
    torch.testing.assert_close(make(kind)(x), compress(x, kernel_size=4, kernel_stride=2, impl="reference"))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_starts_near_the_mean_with_its_scale(kind):
    x = torch.randn(2000, 2, 32)
    mean = compress(x, kernel_size=16, kernel_stride=16, impl="reference")
    out = Compressor(kind, 2, 32, 16, 16, impl="reference")(x)
    noise = (out - mean).std() / mean.std()
    # The documented 0.1, of independent tokens; none at all would leave the heads alike.
    assert 0.08 < noise < 0.12
    assert 0.97 < out.std() / mean.std() < 1.05
    assert abs(out.mean()) < 0.02


def test_mlp_passes_the_mean_of_loud_tokens():
    # The two mirrored halves give back z itself for any z, also where GELU is far from linear.
    x = 20.0 * torch.randn(200, 2, 32)
    compressor = Compressor("mlp", 2, 32, 4, 4, impl="reference")
    mean = compress(x, kernel_size=4, kernel_stride=4, impl="reference")
    assert (compressor(x) - mean).std() < 0.2 * mean.std()


def test_heads_and_mirrored_units_start_apart():
    weight, weight_out = make("mlp").weight, make("mlp").weight_out
    assert not torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[:, :, :8], -weight[:, :, 8:])
    assert not torch.equal(weight_out[:, :8], -weight_out[:, 8:])


def test_position_embedding_starts_small():
    embedding = Compressor("mean", 1, 128, 32, 16, True).position_embedding
    assert 0.018 < embedding.std() < 0.022


@pytest.mark.parametrize("kind", KINDS)
def test_reset_starts_again(kind):
    compressor = make(kind, True)
    for parameter in compressor.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    compressor.reset_parameters()
    x = torch.randn(400, 3, 8)
    mean = compress(x, kernel_size=4, kernel_stride=2, impl="reference")
    assert (compressor(x) - mean).std() < 0.2 * mean.std()


@pytest.mark.parametrize("position_embedding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_the_operator_does_with_its_weights(kind, position_embedding):
    compressor = make(kind, position_embedding)
    shake(compressor)
    named = dict(compressor.named_parameters())
    if "logits" in named:
        named["weight"] = named.pop("logits").softmax(-1)
    x, layout = torch.randn(20, 3, 8), SequenceLayout.from_lengths([3, 0, 11, 6])
    expected = compress(x, kind=kind, **named, kernel_size=4, kernel_stride=2, cu_seqlens=layout, impl="reference")
    assert expected.shape[0] == 4 + 2
    torch.testing.assert_close(compressor(x, layout), expected)
    torch.testing.assert_close(compressor(x, layout.cu_seqlens), expected)
    batch = compressor(x.unflatten(0, (2, 10)))
    torch.testing.assert_close(batch[1], compressor(x[10:]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    compressor = make(kind, True)
    compressor(torch.randn(40, 3, 8)).pow(3).sum().backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() == parameter.numel(), name


def test_weights_of_a_window_sum_to_one():
    compressor = make("weighted")
    shake(compressor, 2.0)
    torch.testing.assert_close(compressor.compression().weight.sum(-1), torch.ones(3))
    assert (compressor.compression().weight > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_follow_the_dtype_of_the_input(kind, dtype):
    compressor = make(kind, True)
    assert all(w.dtype == dtype for w in compressor.compression(dtype) if isinstance(w, torch.Tensor))
    x = torch.randn(20, 3, 8)
    out = compressor(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), compressor(x), rtol=0.05, atol=0.05)


def test_factory_arguments():
    assert {p.dtype for p in make("mlp", True, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {p.device.type for p in make("mlp", True, device="meta").parameters()} == {"meta"}


def test_repr_shows_the_arguments():
    assert repr(make("linear", True)) == (
        "Compressor(linear, num_kv_heads=3, head_dim=8, kernel_size=4, kernel_stride=2, position_embedding=True)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("max", 1, 8, 4, 2), "kind must be one of mean, linear, mlp, weighted, got 'max'"),
        (("mean", 0, 8, 4, 2), "num_kv_heads must be an integer of at least 1, got 0"),
        (("mean", 1, 0, 4, 2), "head_dim must be an integer of at least 1"),
        (("mean", 1, 8, 0, 2), "kernel_size must be an integer of at least 1"),
        (("mean", 1, 8, 4, 0), "kernel_stride must be an integer of at least 1"),
        (("mean", 1, 8, 5, 2), "kernel_size must be a multiple of kernel_stride=2, got 5"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Compressor(*arguments)


@pytest.mark.parametrize("shape", [(20, 2, 8), (20, 3, 7)])
def test_refuses_tensors_of_other_heads(shape):
    with pytest.raises(ValueError, match=r"x must be \[..., Hk=3, D=8\], got"):
        make("mean")(torch.randn(shape))


def test_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="impl"):
        Compressor("mean", 3, 8, impl="fastest")(torch.randn(40, 3, 8))
