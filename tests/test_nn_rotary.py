"""Rotary embedding: the convention, the arithmetic, and what is refused."""

import math

import pytest
import torch

from flash_sparse_attention.nn.rotary import Rotation, apply_rotary, rotate, rotation


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_channel_c_turns_with_channel_c_plus_half():
    # D = 4, theta = 100: the pairs (0, 2) and (1, 3) turn by 1 and by 1/10 a position.
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)
    (first, second) = apply_rotary(x, torch.tensor([3]), theta=100.0)[0].tolist()
    fast, slow = 3.0, 0.3
    assert first == pytest.approx(
        [
            math.cos(fast) * 1 - math.sin(fast) * 3,
            math.cos(slow) * 2 - math.sin(slow) * 4,
            math.cos(fast) * 3 + math.sin(fast) * 1,
            math.cos(slow) * 4 + math.sin(slow) * 2,
        ]
    )
    assert second == pytest.approx([0, math.cos(slow), 0, math.sin(slow)])


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(query_position, key_position):
        rotated = [apply_rotary(x, torch.tensor([p])) for x, p in ((q, query_position), (k, key_position))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(7, 2), score(1007, 1002))
    torch.testing.assert_close(score(7, 2), score(0, -5))
    assert not torch.isclose(score(7, 2), score(2, 7))


def test_keeps_the_length_of_every_head():
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(apply_rotary(x, torch.arange(5)).norm(dim=-1), x.norm(dim=-1))


def test_theta_sets_the_slowest_frequency():
    by = rotation(torch.tensor([1]), head_dim=8, theta=500.0, dtype=torch.float64)
    assert by.sin[0, 3].item() == pytest.approx(math.sin(500.0**-0.75))


def test_any_position_without_a_table():
    positions = torch.tensor([-3, 0, 1 << 20, 1 << 40])
    by = rotation(positions, head_dim=2, dtype=torch.float64)
    assert by.cos.flatten().tolist() == pytest.approx([math.cos(p) for p in positions.tolist()])
    torch.testing.assert_close(rotation(positions[:3].int(), 2), rotation(positions[:3], 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    x, positions = torch.randn(4, 2, 8, dtype=dtype), torch.tensor([0, 257, 4097, 100_001])
    result = apply_rotary(x, positions)
    assert result.dtype == dtype
    torch.testing.assert_close(result, apply_rotary(x.float(), positions).to(dtype), rtol=0, atol=0)
    assert rotation(positions, 8, dtype=dtype).cos.dtype == torch.float32


def test_float64_stays_float64():
    x, positions = torch.randn(1, 1, 8, dtype=torch.float64), torch.tensor([1_000_001])
    assert apply_rotary(x, positions).dtype == torch.float64
    angle = 1_000_001 * 10000.0**-0.25
    assert rotation(positions, 8, dtype=torch.float64).sin[0, 1].item() == pytest.approx(math.sin(angle), abs=1e-9)


def test_gradient_turns_back():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([1, 5, 9])
    grad = torch.randn_like(x)
    (back,) = torch.autograd.grad(apply_rotary(x, positions), x, grad)
    torch.testing.assert_close(back, apply_rotary(grad, -positions))


def test_rotation_at_tokens():
    by = rotation(torch.arange(10), head_dim=4)
    assert isinstance(by.at(torch.tensor([2, 7])), Rotation)
    torch.testing.assert_close(by.at(torch.tensor([2, 7])), rotation(torch.tensor([2, 7]), head_dim=4))


def test_no_tokens():
    assert apply_rotary(torch.randn(0, 2, 4), torch.arange(0)).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_rotary(torch.randn(2, 1, 5), torch.arange(2)), r"head_dim must be even .*, got 5"),
        (lambda: apply_rotary(torch.randn(2, 4), torch.arange(2)), r"x must be .*\[N, H, D\], got \[2, 4\]"),
        (lambda: apply_rotary(torch.randn(2, 1, 4), torch.arange(3)), r"x must be .*\[N=3, H, D=4\], got \[2, 1, 4\]"),
        (
            lambda: apply_rotary(torch.randn(2, 1, 4), torch.rand(2)),
            r"positions must be int64/int32 \[N\], got float32",
        ),
        (lambda: rotation(torch.arange(2), 4, theta=0.0), r"rope_theta must be a positive number"),
        (lambda: rotation(torch.arange(2), 4, theta=float("nan")), r"rope_theta must be a positive number"),
        (lambda: rotate(torch.randn(2, 1, 6), rotation(torch.arange(2), 4)), r"D=4\], got \[2, 1, 6\]"),
        (lambda: rotate(torch.randn(2, 1, 4, device="meta"), rotation(torch.arange(2), 4)), r"of the same device as x"),
        (lambda: rotate(torch.ones(2, 1, 4).int(), rotation(torch.arange(2), 4)), r"got int32"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
