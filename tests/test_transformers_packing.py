"""Batches with padding and packs of sequences: each sequence gets what it gets alone, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

from transformers import DataCollatorWithFlattening, DynamicCache

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.integrations.transformers.inputs import rotations_of
from flash_sparse_attention.integrations.transformers.modeling import _with_last_repeated
from tiny_transformers import SIZES, close, sparse_model, tokens_of

LENGTHS = (21, 1, 40, 3)
TEXTS = [tokens_of(1, length, seed=length)[0] for length in LENGTHS]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 21, 22, 62, 65], dtype=torch.int32)
WAYS: dict[str, dict[str, Any]] = {
    "layout": {"layout": SequenceLayout.from_lengths(LENGTHS)},
    "bounds": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 40, "max_length_k": 40},
    "bounds in int64": {"cu_seq_lens_q": BOUNDS.long()},
    "positions": {"position_ids": POSITIONS},
    "bounds and positions": {"cu_seq_lens_q": BOUNDS, "position_ids": POSITIONS},
}


@pytest.fixture(scope="module", params=[None, [0, 2]], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return sparse_model("qwen3", layers=request.param, num_hidden_layers=3 if request.param else 2)


def loss_and_gradients(model: Any, batches: list[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses of all tokens, and its gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total += loss.detach()
        loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return total, gradients


def alone(text: Tensor) -> dict[str, Tensor]:
    return {"input_ids": text[None], "labels": text[None]}


def packed(texts: list[Tensor] = TEXTS) -> dict[str, Tensor]:
    """One row; the first token of a sequence is not predicted from the one before."""
    labels = torch.cat([torch.cat([torch.tensor([-100]), text[1:]]) for text in texts])
    return {"input_ids": torch.cat(texts)[None], "labels": labels[None]}


def padded(side: str) -> dict[str, Tensor]:
    columns = max(LENGTHS) + 1
    batch = {name: torch.zeros(len(TEXTS), columns, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(TEXTS), columns), -100)
    for row, text in enumerate(TEXTS):
        where = slice(columns - len(text), None) if side == "left" else slice(len(text))
        batch["input_ids"][row, where] = batch["labels"][row, where] = text
        batch["attention_mask"][row, where] = 1
        if side == "left" and len(text):
            # transformers predicts each token from the one before, which is padding here.
            batch["labels"][row, columns - len(text)] = -100
    return batch


@pytest.fixture(scope="module")
def expected(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return loss_and_gradients(model, [alone(text) for text in TEXTS if len(text) > 1])


@pytest.mark.parametrize("way", WAYS)
def test_packs(model: Any, expected: tuple[Tensor, dict[str, Tensor]], way: str):
    loss, gradients = loss_and_gradients(model, [packed() | WAYS[way]])
    close(loss, expected[0])
    for name, gradient in gradients.items():
        close(gradient, expected[1][name])


@pytest.mark.parametrize("way", WAYS)
def test_packs_without_gradients(model: Any, way: str):
    """As in evaluation, where a model keeps a cache by default, but not of packs."""
    with torch.no_grad():
        out = model(input_ids=packed()["input_ids"], **WAYS[way])
        assert out.past_key_values is None
        for text, got in zip(TEXTS, out.logits[0].split(LENGTHS), strict=True):
            close(got, model(text[None], use_cache=False).logits[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, expected: tuple[Tensor, dict[str, Tensor]], side: str):
    loss, gradients = loss_and_gradients(model, [padded(side)])
    close(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-6, atol=1e-6)


def test_padding_comes_out_as_zeros():
    model, batch = sparse_model(), padded("right")
    outs, masks = [], []

    def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        outs.append(out[0])
        masks.append(kwargs["attention_mask"])

    handle = model.model.layers[0].self_attn.register_forward_hook(note, with_kwargs=True)
    model(batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    # There is no mask of all tokens by all tokens.
    assert masks[0].numel() == 1
    padding = batch["attention_mask"] == 0
    assert not outs[0][padding].any()
    assert outs[0][~padding].all(-1).any()


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 20), torch.ones(2, 20, dtype=torch.bool), None], ids=["1", "True", "no"]
)
def test_masks_without_zeros(mask: Tensor | None):
    model, ids = sparse_model(), tokens_of(2, 20)
    close(model(ids, attention_mask=mask).logits, model(ids, use_cache=False).logits)


def test_holes_in_a_mask_close():
    """A token behind a hole is next to the one before it, as for FlashAttention."""
    model, ids = sparse_model(), tokens_of(1, 20)
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, 5:9] = 0
    real = mask[0].bool()
    close(model(ids, attention_mask=mask).logits[:, real], model(ids[:, real]).logits)


def test_rows_of_nothing():
    model, ids = sparse_model(), tokens_of(3, 9)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1] = 0
    for use_cache in (False, True):
        with torch.no_grad():
            got = model(ids, attention_mask=mask, use_cache=use_cache).logits
        assert got.isfinite().all()
        close(got[[0, 2]], model(ids[[0, 2]], use_cache=False).logits)


def test_position_ids_move_tokens():
    """Positions that do not begin at 0 rotate, and scores depend on distances."""
    model, ids = sparse_model(), tokens_of(2, 20)
    straight = model(ids).logits
    moved = model(ids, position_ids=torch.arange(100, 120)[None]).logits
    torch.testing.assert_close(moved, straight, rtol=1e-3, atol=1e-3)
    assert not torch.equal(moved, straight)
    padded_positions = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.arange(20).expand(2, -1)], 1)
    mask = (torch.arange(23) >= 3).long().expand(2, -1)
    longer = torch.cat([tokens_of(2, 3), ids], 1)
    close(model(longer, attention_mask=mask, position_ids=padded_positions).logits[:, 3:], straight)


@pytest.mark.parametrize("flash", [False, True])
def test_the_collator_of_transformers(flash: bool):
    model = sparse_model("llama")
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_position_ids=not flash)
    batch = collator([{"input_ids": text.tolist()} for text in TEXTS])
    with torch.no_grad():
        out = model(**batch)
        for text, got in zip(TEXTS, out.logits[0].split(LENGTHS), strict=True):
            close(got, model(text[None], use_cache=False).logits[0])


def test_compression_of_packs():
    # Windows of independent keys do not reach over a bound either.
    model = sparse_model("llama", NSAConfig.preset("paper", **SIZES))
    with torch.no_grad():
        out = model(input_ids=packed()["input_ids"], layout=WAYS["layout"]["layout"])
        for text, got in zip(TEXTS, out.logits[0].split(LENGTHS), strict=True):
            close(got, model(text[None], use_cache=False).logits[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, r"attention_mask must be \[B=2, 20\], got \[2, 1, 20, 20\]"),
        ({"attention_mask": torch.ones(2, 19)}, r"attention_mask must be \[B=2, 20\], got \[2, 19\]"),
        ({"attention_mask": torch.ones(1, 20)}, r"attention_mask must be \[B=2, 20\], got \[1, 20\]"),
        ({"attention_mask": {"full_attention": None}}, r"attention_mask must be .* got dict"),
        ({"layout": SequenceLayout.uniform(2, 19), "use_cache": False}, "layout must be of the 2 x 20 tokens, got 38"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 39]), "use_cache": False},
            "cu_seqlens must be ending at the number of tokens N=40",
        ),
        (
            {"layout": SequenceLayout.uniform(4, 10), "use_cache": True},
            "layout must be left out with a cache, got packed sequences",
        ),
        (
            {"position_ids": torch.arange(10).repeat(2)[None], "use_cache": True},
            "layout must be left out with a cache, got packed sequences",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 15, 40]), "past_key_values": DynamicCache()},
            "layout must be left out with a cache",
        ),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], message: str):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        sparse_model()(tokens_of(2, 20), **options)


def test_masks_of_four_dimensions_in_a_step():
    model = sparse_model()
    with torch.no_grad():
        cache = model(tokens_of(2, 20)).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask must be \[B=2, 21\], got \[2, 1, 1, 21\]"):
            model(tokens_of(2, 1), attention_mask=torch.ones(2, 1, 1, 21), past_key_values=cache)


class TestSpreadOverDevices:
    """What the layers of one device have from another one comes to them; `meta` stands for a second device."""

    def test_angles_of_a_rotary_embedding_elsewhere(self):
        compute = rotations_of(lambda like, positions: (torch.ones(1, 5, 8), torch.zeros(1, 5, 8)), torch.float32)
        assert {x.device.type for x in compute(torch.empty(5, dtype=torch.int64, device="meta"))} == {"meta"}

    def test_the_last_state_of_a_row_elsewhere(self):
        hidden = torch.empty(2, 5, 8, device="meta")
        (repeated,) = _with_last_repeated((hidden,), torch.tensor([1, 2, 3, 4, 5, 6]))
        assert (repeated.device, repeated.shape) == (hidden.device, hidden.shape)
