"""What holds for every implementation, exactly: causality, bounds, ties, empty things, and any index tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import (
    AttentionOutput,
    Interval,
    NSAConfig,
    SequenceLayout,
    combine,
    compress,
    compressed_attention,
    geometry,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

LENGTHS = [70, 0, 1, 41]
LAYOUT = SequenceLayout.from_lengths(LENGTHS)
TOKENS = sum(LENGTHS)
CONFIG = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    num_selected_blocks=4,
    num_init_blocks=1,
    num_local_blocks=1,
    window_size=10,
)
WINDOWS = {"kernel_size": 8, "kernel_stride": 4}
SELECTION = {**WINDOWS, "block_size": 8, "num_selected_blocks": 4, "num_init_blocks": 1, "num_local_blocks": 1}


@pytest.fixture(params=["reference", "blockwise"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def pack(tokens: int = TOKENS) -> dict[str, Tensor]:
    return {"q": draw(tokens, 4, 16), "k": draw(tokens, 2, 16), "v": draw(tokens, 2, 8), "gates": draw(tokens, 4, 3)}


def random_indices(tokens: int, heads: int = 2, slots: int = 4) -> Tensor:
    """Unused, valid, future and absurd entries, in any order and repeated."""
    values = torch.tensor([-1, 0, 0, 1, 2, 3, 4, 5, 8, 9, -7, 2**31 - 1, -(2**31), 2**28, 2**29])
    return values[torch.randint(len(values), (tokens, heads, slots))].int()


def attend(impl: str, x: dict[str, Tensor], layout: SequenceLayout = LAYOUT) -> dict[str, Tensor]:
    """Every operator, by name."""
    common: dict[str, Any] = {"cu_seqlens": layout, "impl": impl}
    compressed = compressed_attention(
        x["q"], compress(x["k"], **WINDOWS, **common), compress(x["v"], **WINDOWS, **common), **WINDOWS, **common
    )
    indices = (torch.arange(x["q"].shape[0] * 8).reshape(-1, 2, 4) % 11).int()
    selected = selected_attention(x["q"], x["k"], x["v"], indices, block_size=8, **common)
    window = sliding_window_attention(x["q"], x["k"], x["v"], window_size=10, **common)
    whole = nsa_attention(**x, config=CONFIG, **common)
    return {
        "compressed": compressed.out,
        "compressed lse": compressed.lse,
        "selected": selected.out,
        "selected lse": selected.lse,
        "window": window.out,
        "window lse": window.lse,
        "whole": whole.out,
        "block_indices": whole.block_indices,
    }


@pytest.mark.parametrize("name", ["q", "k", "v", "gates"])
def test_nothing_flows_backwards_or_into_another_sequence(impl: str, name: str):
    x = pack()
    before = attend(impl, x)
    x[name] = x[name].clone()
    x[name][40:70] = 50 * draw(30, *x[name].shape[1:])
    after = attend(impl, x)
    for what in before:
        assert torch.equal(before[what][:40], after[what][:40]), what
        assert torch.equal(before[what][70:], after[what][70:]), what
    assert not torch.equal(before["whole"][40:70], after["whole"][40:70])


def test_no_gradient_flows_forwards_or_from_another_sequence(impl: str):
    x = {name: value.requires_grad_() for name, value in pack().items()}
    for what, result in attend(impl, x).items():
        if not result.is_floating_point():
            continue
        early, late = result[:40], result[40:70]
        for part, nothing in ((early, slice(40, None)), (late, slice(70, None))):
            seen = part[part > -math.inf].sum()
            grads = torch.autograd.grad(seen, list(x.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(x, grads, strict=True):
                assert grad is None or not grad[nothing].any(), (what, name)
                assert what != "whole" or (grad is not None and grad.any()), name


def test_packed_sequences_are_separate_calls(impl: str):
    x = pack()
    packed = attend(impl, x)
    offset = 0
    for length in LENGTHS:
        part = {name: value[offset : offset + length] for name, value in x.items()}
        layout = SequenceLayout.from_lengths([length])
        windows, q, k = layout.compressed(8, 4).total_tokens, part["q"], part["k"]
        if length:
            alone = nsa_attention(**part, config=CONFIG, impl=impl)
            torch.testing.assert_close(packed["whole"][offset : offset + length], alone.out)
            assert torch.equal(packed["block_indices"][offset : offset + length], alone.block_indices)
        assert compress(k, **WINDOWS, impl=impl).shape == (windows, 2, 16)
        assert sliding_window_attention(q, k, part["v"], impl=impl).out.shape == (length, 4, 8)
        offset += length


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1, 0], [1, 1, 1], [7]])
def test_sequences_shorter_than_a_window(impl: str, lengths: list[int]):
    layout, tokens = SequenceLayout.from_lengths(lengths), sum(lengths)
    x = {name: value.requires_grad_() for name, value in pack(tokens).items()}
    out, block_indices = nsa_attention(**x, config=CONFIG, cu_seqlens=layout, impl=impl)
    assert out.shape == (tokens, 4, 8)
    assert block_indices.tolist() == [[[0, -1, -1, -1]] * 2] * tokens
    # Nothing is compressed, so what remains are the selected block and the window, both of which hold everything.
    causal = interval_attention(x["q"], x["k"], x["v"], Interval(), cu_seqlens=layout, impl=impl).out
    torch.testing.assert_close(out, x["gates"][..., 1:].sigmoid().sum(-1, keepdim=True) * causal)
    for grad in torch.autograd.grad(out.sum(), list(x.values())):
        assert grad.isfinite().all()
    for name in ("k", "v"):
        assert compress(x[name], **WINDOWS, cu_seqlens=layout, impl=impl).shape == (0, 2, x[name].shape[2])


def assert_blind(result: AttentionOutput, blind: Tensor, *inputs: Tensor) -> None:
    """Where `blind`, the output is 0, lse is -inf and no gradient flows, not even one that is asked of lse."""
    out, lse = result
    assert not out[blind].any()
    assert (lse[blind] == -math.inf).all()
    assert (lse[~blind] > -math.inf).all()
    grads = torch.autograd.grad([out[blind], lse[blind]], inputs, [draw(*out[blind].shape), draw(*lse[blind].shape)])
    for grad in grads:
        assert not grad.any()


def test_queries_that_see_no_key(impl: str):
    x = pack()
    q, k, v = (x[name].requires_grad_() for name in ("q", "k", "v"))
    k_compressed = compress(k, **WINDOWS, cu_seqlens=LAYOUT, impl=impl)
    v_compressed = compress(v, **WINDOWS, cu_seqlens=LAYOUT, impl=impl)
    result = compressed_attention(q, k_compressed, v_compressed, **WINDOWS, cu_seqlens=LAYOUT, impl=impl)
    assert_blind(result, LAYOUT.positions() < 7, q, k, v)

    unused = torch.full((TOKENS, 2, 3), -1, dtype=torch.int32)
    unused[::2, :, 1] = 0
    result = selected_attention(q, k, v, unused, block_size=8, cu_seqlens=LAYOUT, impl=impl)
    assert_blind(result, torch.arange(TOKENS) % 2 == 1, q, k, v)
    # Nobody sees any.
    result = selected_attention(q, k, v, torch.full_like(unused, -1), block_size=8, cu_seqlens=LAYOUT, impl=impl)
    assert_blind(result, torch.ones(TOKENS, dtype=torch.bool), q, k, v)
    result = selected_attention(q, k, v, torch.full_like(unused, 2**31 - 1), block_size=8, cu_seqlens=LAYOUT, impl=impl)
    assert_blind(result, torch.ones(TOKENS, dtype=torch.bool), q, k, v)


@pytest.mark.parametrize("block_size", [8, 16, 5])
def test_any_index_tensor_means_the_set_of_its_valid_blocks(impl: str, block_size: int):
    x, indices = pack(), random_indices(TOKENS)
    newest = geometry.block_of(LAYOUT.positions(), block_size)
    sets = [
        [sorted({j for j in head if 0 <= j <= last}) for head in token]
        for token, last in zip(indices.tolist(), newest.tolist(), strict=True)
    ]
    clean = torch.tensor([[[*head, *[-1] * (4 - len(head))] for head in token] for token in sets], dtype=torch.int32)
    results = []
    for which in (clean, indices, indices.flip(-1), torch.cat([indices, indices], -1)):
        q, k, v = (x[name].clone().requires_grad_() for name in ("q", "k", "v"))
        out, lse = selected_attention(q, k, v, which, block_size=block_size, cu_seqlens=LAYOUT, impl=impl)
        results.append((out, lse, *torch.autograd.grad(out.sum(), (q, k, v))))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def integer_importance(pattern: Tensor, position: int, num_blocks: int, sizes: dict[str, int]) -> list[int]:
    """Chunks that the visible windows of probability 1 share with each block."""
    windows, stride = (
        range(Interval(sizes["kernel_size"], sizes["kernel_stride"]).end(position)),
        sizes["kernel_stride"],
    )

    def chunks(first: int, tokens: int) -> set[int]:
        return {token // stride for token in range(first, first + tokens)}

    return [
        sum(
            len(chunks(i * stride, sizes["kernel_size"]) & chunks(j * sizes["block_size"], sizes["block_size"]))
            for i in windows
            if pattern[i]
        )
        for j in range(num_blocks)
    ]


@pytest.mark.parametrize("sizes", [(8, 4, 8), (4, 4, 4), (8, 8, 8), (8, 2, 8), (16, 4, 4)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lower_block(impl: str, dtype: torch.dtype, sizes: tuple[int, int, int], share: float):
    # A score of 0 or -inf (in effect) against a log-sum-exp of 0 is a probability of exactly 1 or 0.
    numbers = dict(zip(("kernel_size", "kernel_stride", "block_size"), sizes, strict=True))
    length, num_init, num_local, slots = 100, 1, 1, 5
    keys = SequenceLayout.from_lengths([length]).compressed(*sizes[:2]).total_tokens
    pattern = torch.rand(keys) < share
    q = torch.ones(length, 2, 4, dtype=dtype)
    k = torch.where(pattern, 0.0, -1e4)[:, None, None].expand(-1, 1, 4).to(dtype)
    got = select_blocks(
        q,
        k,
        torch.zeros(length, 2),
        **numbers,
        num_selected_blocks=slots,
        num_init_blocks=num_init,
        num_local_blocks=num_local,
        impl=impl,
    )
    for position in range(length):
        eligible = position // sizes[2] + 1
        importance = integer_importance(pattern, position, eligible, numbers)
        forced = {*range(min(num_init, eligible)), *range(max(0, eligible - num_local), eligible)}
        rest = sorted(set(range(eligible)) - forced, key=lambda j: (-importance[j], j))
        kept = sorted([*forced, *rest[: slots - len(forced)]])
        assert got[position, 0].tolist() == kept + [-1] * (slots - len(kept)), position


def test_more_slots_than_blocks_is_causal_attention(impl: str):
    x = pack()
    q, k, v = x["q"], x["k"], x["v"]
    k_compressed = compress(k, **WINDOWS, cu_seqlens=LAYOUT, impl=impl)
    lse = compressed_attention(q, k_compressed, k_compressed, **WINDOWS, cu_seqlens=LAYOUT, impl=impl).lse
    numbers = {**SELECTION, "num_selected_blocks": 30}
    indices = select_blocks(q, k_compressed, lse, **numbers, cu_seqlens=LAYOUT, impl=impl)
    for token, position in enumerate(LAYOUT.positions().tolist()):
        eligible = position // 8 + 1
        assert indices[token].tolist() == [[*range(eligible), *[-1] * (30 - eligible)]] * 2
    selected = selected_attention(q, k, v, indices, block_size=8, cu_seqlens=LAYOUT, impl=impl)
    causal = interval_attention(q, k, v, Interval(), cu_seqlens=LAYOUT, impl=impl)
    window = sliding_window_attention(q, k, v, window_size=1000, cu_seqlens=LAYOUT, impl=impl)
    # Windows of one token are the tokens.
    least = compressed_attention(
        q,
        compress(k, kernel_size=1, kernel_stride=1, cu_seqlens=LAYOUT, impl=impl),
        compress(v, kernel_size=1, kernel_stride=1, cu_seqlens=LAYOUT, impl=impl),
        kernel_size=1,
        kernel_stride=1,
        cu_seqlens=LAYOUT,
        impl=impl,
    )
    for other in (selected, window, least):
        torch.testing.assert_close(other.out, causal.out)
        torch.testing.assert_close(other.lse, causal.lse)


def test_forced_blocks_alone(impl: str):
    x = pack()
    k_compressed = compress(x["k"], **WINDOWS, cu_seqlens=LAYOUT, impl=impl)
    lse = draw(TOKENS, 4)
    numbers = {**SELECTION, "num_selected_blocks": 3, "num_init_blocks": 2}
    indices = select_blocks(x["q"], k_compressed, lse, **numbers, cu_seqlens=LAYOUT, impl=impl)
    for token, position in enumerate(LAYOUT.positions().tolist()):
        kept = sorted({0, min(1, position // 8), position // 8})
        assert indices[token].tolist() == [[*kept, *[-1] * (3 - len(kept))]] * 2


def test_partial_attentions_merge_by_lse(impl: str):
    x = pack()
    q, k, v = x["q"].double(), x["k"].double(), x["v"].double()
    both = torch.tensor([0, 3, 5, 1], dtype=torch.int32).expand(TOKENS, 2, 4)
    parts = [
        selected_attention(q, k, v, which.contiguous(), block_size=8, cu_seqlens=LAYOUT, impl=impl)
        for which in (both, both[..., :2], both[..., 2:])
    ]
    whole, *others = parts
    lse = torch.logaddexp(others[0].lse, others[1].lse)
    torch.testing.assert_close(whole.lse, lse)
    merged = sum((part.lse - lse).exp().unsqueeze(-1) * part.out for part in others)
    torch.testing.assert_close(whole.out, merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_results(impl: str, dtype: torch.dtype):
    x = {name: value.to(dtype) for name, value in pack().items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for what, result in attend(impl, x).items():
        expected = torch.int32 if what == "block_indices" else wide if what.endswith("lse") else dtype
        assert result.dtype == expected, what
    assert combine(*(draw(3, 2, 4, dtype=dtype) for _ in range(3)), draw(3, 2, 3), impl=impl).dtype == dtype


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_loud_logits(impl: str, logit: float):
    # One key in four has the logit, the rest its opposite: the loud ones share all the probability.
    tokens, every = 130, 4
    k = torch.full((tokens, 1, 1), -logit)
    k[::every] = logit
    q, v = torch.ones(tokens, 1, 1), draw(tokens, 1, 3)
    loud = (torch.arange(tokens) % every == 0) == (logit > 0)
    # With the logit negative, the first query sees none of the loud keys.
    loud[0] = True
    seen = loud & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if logit < 0:
        seen[1:, 0] = False
    expected = (seen.float() / seen.sum(1, keepdim=True)) @ v[:, 0]
    top = torch.full((tokens,), 1e4)
    top[0] = logit
    lse = top + seen.sum(1).log()
    every_block = torch.arange(5, dtype=torch.int32).expand(tokens, 1, 5)
    for result in (
        interval_attention(q, k, v, Interval(), impl=impl),
        selected_attention(q, k, v, every_block, block_size=32, impl=impl),
    ):
        torch.testing.assert_close(result.out[:, 0], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result.lse[:, 0], lse, rtol=1e-6, atol=0)
    for x in (q, k, v):
        x.requires_grad_()
    for result in (
        interval_attention(q, k, v, Interval(), impl=impl),
        selected_attention(q, k, v, every_block, block_size=32, impl=impl),
    ):
        for grad in torch.autograd.grad(result.out.sum() + result.lse.sum(), (q, k, v)):
            assert grad.isfinite().all()


def test_shared_heads_are_repeated_heads(impl: str):
    x = pack()
    indices = random_indices(TOKENS)
    repeated = [x[name].repeat_interleave(2, 1) for name in ("k", "v")]
    for shared, own in (
        (
            selected_attention(x["q"], x["k"], x["v"], indices, block_size=8, cu_seqlens=LAYOUT, impl=impl),
            selected_attention(
                x["q"], *repeated, indices.repeat_interleave(2, 1), block_size=8, cu_seqlens=LAYOUT, impl=impl
            ),
        ),
        (
            interval_attention(x["q"], x["k"], x["v"], Interval(), cu_seqlens=LAYOUT, impl=impl),
            interval_attention(x["q"], *repeated, Interval(), cu_seqlens=LAYOUT, impl=impl),
        ),
    ):
        torch.testing.assert_close(shared.out, own.out)
        torch.testing.assert_close(shared.lse, own.lse)


def test_a_group_selects_together(impl: str):
    # The importance of a block is that of all heads of the group, not of the first: one of two heads cares for block 3.
    k = torch.zeros(64, 1, 2)
    k[24:32] = torch.tensor([0.0, 50.0])
    for head in (0, 1):
        q = torch.zeros(64, 2, 2)
        q[:, head, 1] = 1.0
        sizes = {"kernel_size": 8, "kernel_stride": 8}
        k_compressed = compress(k, **sizes, impl=impl)
        lse = compressed_attention(q, k_compressed, k_compressed, **sizes, impl=impl).lse
        numbers = {**SELECTION, **sizes, "num_selected_blocks": 3}
        assert select_blocks(q, k_compressed, lse, **numbers, impl=impl)[63, 0].tolist() == [0, 3, 7]


def test_strides_do_not_matter(impl: str):
    x = pack()
    expected = attend(impl, x)

    def strided(value: Tensor) -> Tensor:
        """The same values, with no two neighbours in memory."""
        wide = torch.full((*value.shape, 2), math.nan).permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
        wide[..., 0] = value
        return wide[..., 0]

    assert not strided(x["q"]).is_contiguous()
    for what, result in attend(impl, {name: strided(value) for name, value in x.items()}).items():
        torch.testing.assert_close(result, expected[what], msg=what)


def test_inputs_are_left_alone(impl: str):
    x = {name: value.requires_grad_() for name, value in pack().items()}
    copies = {name: value.detach().clone() for name, value in x.items()}
    indices = random_indices(TOKENS)
    kept = indices.clone()
    result = selected_attention(x["q"], x["k"], x["v"], indices, block_size=8, cu_seqlens=LAYOUT, impl=impl)
    (attend(impl, x)["whole"].sum() + result.out.sum()).backward()
    assert torch.equal(indices, kept)
    for name, copy in copies.items():
        assert torch.equal(x[name], copy), name


def test_autocast_does_not_round_inside(impl: str):
    x = pack()
    expected = attend(impl, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = attend(impl, x)
    for what, result in results.items():
        assert torch.equal(result, expected[what]), what


def test_selection_carries_no_gradient(impl: str):
    x = {name: value.requires_grad_() for name, value in pack().items()}
    assert not nsa_attention(**x, config=CONFIG, cu_seqlens=LAYOUT, impl=impl).block_indices.requires_grad
