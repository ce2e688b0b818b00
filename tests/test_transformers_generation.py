"""Generation with sparse layers: caches, padding, and all that `generate` can do, against passes without a cache."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

from transformers import DynamicCache, StaticCache

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.integrations.transformers import SparseCacheLayer
from tiny_transformers import ARCHITECTURES, SIZES, base_model, close, sparse_model, tokens_of

# Which layers are sparse: all, or some.
LAYERS = (None, [0, 2])
NEW = 5


@pytest.fixture(scope="module", params=LAYERS, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return sparse_model("llama", layers=request.param, num_hidden_layers=3 if request.param else 2)


def greedy(model: Any, ids: Tensor, new: int = NEW, **options: Any) -> Tensor:
    """The new tokens."""
    out = model.generate(ids, max_new_tokens=new, do_sample=False, **options)
    return out[:, ids.shape[1] :]


def check(model: Any, ids: Tensor, new: Tensor) -> None:
    """Each of the new tokens is the likeliest after those before it, by one forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.cat([ids, new[:, :-1]], 1), use_cache=False).logits
    assert torch.equal(new, logits[:, ids.shape[1] - 1 :].argmax(-1))


def check_rows(model: Any, texts: list[Tensor], new: Tensor) -> None:
    """The same of texts that differ in length."""
    for text, tokens in zip(texts, new, strict=True):
        check(model, text[None], tokens[None])


def padded(texts: list[Tensor], side: str) -> dict[str, Tensor]:
    """A batch of texts with padding on this side, and its mask."""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(longest - len(text), None) if side == "left" else slice(len(text))
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


TEXTS = [tokens_of(1, length, seed=length)[0] for length in (33, 6, 20, 1)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_changes_nothing(architecture: str):
    model, ids = sparse_model(architecture, num_hidden_layers=2), tokens_of(2, 30)
    new = greedy(model, ids, 8)
    assert len(new.unique()) > 3
    check(model, ids, new)
    assert torch.equal(greedy(model, ids, 8, use_cache=False), new)


@pytest.mark.parametrize("preset", ["paper", "fsa", "fla"])
def test_presets(preset: str):
    sizes = SIZES | ({"kernel_size": 4, "kernel_stride": 4} if preset == "fla" else {})
    model, ids = sparse_model("qwen3", NSAConfig.preset(preset, **sizes)), tokens_of(2, 30)
    check(model, ids, greedy(model, ids))


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_full_layers_with_windows_beside(architecture: str):
    options = {"sliding_window": 8}
    if architecture == "qwen2":
        options |= {"use_sliding_window": True, "max_window_layers": 1}
    model, ids = sparse_model(architecture, layers=[0], **options), tokens_of(2, 30)
    check(model, ids, greedy(model, ids))
    check(model, ids, greedy(model, ids, cache_implementation="static", disable_compile=True))
    batch = padded(TEXTS, "left")
    got = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    check_rows(model, TEXTS, got)


def test_steps_and_pieces(model: Any):
    ids = tokens_of(2, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache, outs = DynamicCache(config=model.config), []
        for piece in ids.split([17, 1, 1, 5, 1, 15], dim=1):
            out = model(piece, past_key_values=cache)
            assert out.past_key_values is cache
            outs.append(out.logits)
    close(torch.cat(outs, 1), expected)
    assert cache.get_seq_length() == cache.get_seq_length(1) == 40
    sparse = [isinstance(layer, SparseCacheLayer) for layer in cache.layers]
    assert sparse == [number in model.config.sparse_layers for number in range(len(sparse))]


@pytest.mark.parametrize("kind", ["default", "static", "own", "own static", "own without a config"])
def test_kinds_of_caches(model: Any, kind: str):
    ids = tokens_of(2, 30)
    options: dict[str, Any] = {
        "default": {},
        # Full layers alone could be compiled, which would take long.
        "static": {"cache_implementation": "static", "disable_compile": True},
        "own": {"past_key_values": DynamicCache(config=model.config)},
        "own static": {"past_key_values": StaticCache(config=model.config, max_cache_len=64)},
        "own without a config": {"past_key_values": DynamicCache()},
    }[kind]
    check(model, ids, greedy(model, ids, **options))


def test_a_static_cache_is_used_again():
    model = sparse_model()
    for rows, columns in ((2, 30), (2, 12), (3, 20), (1, 40)):
        ids = tokens_of(rows, columns, seed=rows)
        got = greedy(model, ids, cache_implementation="static")
        check(model, ids, got)


def test_a_static_cache_that_is_too_small():
    model = sparse_model()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(tokens_of(1, 10), past_key_values=cache)
        assert cache.get_max_length() == 16
        with pytest.raises(ValueError, match="past_key_values must be of at least 17 tokens, got 16"):
            model(tokens_of(1, 7), past_key_values=cache)
        # Nothing has changed.
        assert cache.get_seq_length() == 10
        model(tokens_of(1, 6), past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding(model: Any, side: str, kind: str):
    batch = padded(TEXTS, side)
    options = {"cache_implementation": "static", "disable_compile": True} if kind == "static" else {}
    got = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    check_rows(model, TEXTS, got)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_between_turns(model: Any, side: str):
    """Rows whose turns differ in length: every token sees all tokens of its row before it, and no padding."""
    turns = [
        [tokens_of(1, length, seed=10 * turn + length)[0] for length in lengths]
        for turn, lengths in enumerate([(20, 7, 1), (3, 9, 8), (1, 1, 1), (5, 0, 2)])
    ]
    cache, masks = DynamicCache(), []
    rows = [torch.empty(0, dtype=torch.int64) for _ in range(3)]
    for texts in turns:
        batch = padded(texts, side)
        masks.append(batch["attention_mask"])
        with torch.no_grad():
            got = model(batch["input_ids"], attention_mask=torch.cat(masks, 1), past_key_values=cache).logits
        for row, text in enumerate(texts):
            rows[row] = torch.cat([rows[row], text])
            if len(text):
                with torch.no_grad():
                    expected = model(rows[row][None], use_cache=False).logits[0, -len(text) :]
                close(got[row][masks[-1][row].bool()], expected)


@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_prefill_in_chunks(model: Any, chunk: int):
    # Padding on the right is not for this: transformers takes what comes next from the last chunk.
    batch = padded(TEXTS[1:], "left")
    got = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"], prefill_chunk_size=chunk)
    check_rows(model, TEXTS[1:], got)


def test_beams(model: Any):
    batch = padded(TEXTS[:3], "left")
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "num_return_sequences": 2}
    expected = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert torch.equal(
        model.generate(**batch, **options, cache_implementation="static", disable_compile=True), expected
    )
    greedy_rows = greedy(model, batch["input_ids"], 6, attention_mask=batch["attention_mask"])
    assert not torch.equal(expected[::2, -6:], greedy_rows)


def test_sampling(model: Any):
    batch = padded(TEXTS[:3], "left")
    options = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3, "top_k": 20}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        drawn.append(model.generate(**batch, **options, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique(dim=0)) == 9


@pytest.mark.parametrize("own_cache", [False, True])
def test_assisted_by_a_model(model: Any, own_cache: bool):
    assistant, ids = base_model("llama"), tokens_of(1, 30)
    options = {"past_key_values": DynamicCache(config=model.config)} if own_cache else {}
    check(model, ids, greedy(model, ids, 12, assistant_model=assistant, **options))


def test_assists_another_model():
    ids, model = tokens_of(1, 30), base_model("llama")
    check(model, ids, greedy(model, ids, 12, assistant_model=sparse_model()))


def test_assisted_by_the_prompt(model: Any):
    ids = tokens_of(1, 10).repeat(1, 3)
    check(model, ids, greedy(model, ids, 12, prompt_lookup_num_tokens=4))


def test_many_wrong_proposals():
    # More than the tail of a cache holds by default.
    model, ids = sparse_model(), tokens_of(1, 30)
    cache = DynamicCache()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
        for wrong in (64, 64, 3):
            model(tokens_of(1, wrong, seed=wrong), past_key_values=cache)
            cache.crop(-wrong)
            assert cache.get_seq_length() == 20
        close(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])


def test_going_on_with_a_cache(model: Any):
    """A conversation: the text so far and new tokens, with the cache of the last turn."""
    ids, cache = tokens_of(2, 20), DynamicCache(config=model.config)
    for turn in range(3):
        out = model.generate(
            ids, max_new_tokens=NEW, do_sample=False, past_key_values=cache, return_dict_in_generate=True
        )
        assert out.past_key_values is cache
        check(model, ids, out.sequences[:, -NEW:])
        ids = torch.cat([out.sequences, tokens_of(2, 4, seed=turn)], 1)


def test_cache_that_generate_returns(model: Any):
    ids = tokens_of(2, 20)
    first = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens_of(2, 3)], 1)
    check(model, longer, greedy(model, longer, past_key_values=first.past_key_values))


def goes_on(model: Any, cache: DynamicCache, rows: list[Tensor], columns: int) -> None:
    """The cache holds these rows, padded on the left to so many columns."""
    assert cache.get_seq_length() == columns
    ids = tokens_of(len(rows), 3, seed=9)
    mask = torch.zeros(len(rows), columns + 3, dtype=torch.int64)
    for row, text in enumerate(rows):
        mask[row, columns - len(text) :] = 1
    with torch.no_grad():
        got = model(ids, attention_mask=mask, past_key_values=cache).logits
        for row, text in enumerate(rows):
            whole = torch.cat([text, ids[row]])[None]
            close(got[row], model(whole, use_cache=False).logits[0, -3:])


@pytest.fixture
def padded_cache(model: Any) -> tuple[DynamicCache, list[Tensor]]:
    """A cache of texts padded on the left, and the texts."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**padded(TEXTS[:3], "left"), past_key_values=cache)
    return cache, TEXTS[:3]


def test_cache_goes_on(model: Any, padded_cache: tuple[DynamicCache, list[Tensor]]):
    goes_on(model, *padded_cache, 33)


def test_cache_rows_are_selected(model: Any, padded_cache: tuple[DynamicCache, list[Tensor]]):
    cache, texts = padded_cache
    cache.batch_select_indices(torch.tensor([2, 0]))
    goes_on(model, cache, [texts[2], texts[0]], 33)
    cache.batch_select_indices(torch.tensor([False, True]))
    cache.crop(-3)
    goes_on(model, cache, [texts[0]], 33)


def test_cache_rows_are_repeated(model: Any, padded_cache: tuple[DynamicCache, list[Tensor]]):
    cache, texts = padded_cache
    cache.batch_repeat_interleave(2)
    goes_on(model, cache, [text for text in texts for _ in range(2)], 33)


def test_cache_rows_are_reordered(model: Any, padded_cache: tuple[DynamicCache, list[Tensor]]):
    cache, texts = padded_cache
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    goes_on(model, cache, [texts[1], texts[1], texts[0]], 33)


def test_cache_is_cropped(model: Any, padded_cache: tuple[DynamicCache, list[Tensor]]):
    cache, texts = padded_cache
    cache.crop(-4)
    goes_on(model, cache, [text[:-4] for text in texts], 29)
    cache.crop(0)
    assert cache.get_seq_length() == 32


def test_cache_is_reset(model: Any):
    cache = StaticCache(config=model.config, max_cache_len=32)
    for seed in (0, 1):
        ids = tokens_of(2, 20, seed)
        with torch.no_grad():
            close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_cache_is_reset_for_another_batch():
    model, cache = sparse_model(), DynamicCache()
    for rows in (3, 2, 3):
        ids = tokens_of(rows, 10)
        with torch.no_grad():
            close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
        cache.reset()


def test_the_first_layer_may_be_full():
    model, batch = sparse_model(layers=[1]), padded(TEXTS, "left")
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        got = greedy(model, batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        check_rows(model, TEXTS, got)
    cache, ids = StaticCache(config=model.config, max_cache_len=64), tokens_of(2, 20)
    check(model, ids, greedy(model, ids, past_key_values=cache))
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**batch, **beams), model.generate(**batch, **beams, use_cache=False))


def test_crop_in_the_old_way():
    model, ids, cache = sparse_model(), tokens_of(1, 20), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(15)
        assert cache.get_seq_length() == 15
        cache.crop(50)
        assert cache.get_seq_length() == 15
        model(ids[:, 15:18], past_key_values=cache)
        cache.crop(torch.tensor(-3))
        close(model(ids[:, 15:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 15:])


def test_inputs_embeds(model: Any):
    ids = tokens_of(2, 20)
    embeds = model.get_input_embeddings()(ids).detach()
    got = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    check(model, ids, got[:, -NEW:])
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids must be given, or else inputs_embeds"):
            model(**wrong)


def test_rows_that_end_early():
    model, batch = sparse_model(), padded(TEXTS, "left")
    free = greedy(model, batch["input_ids"], 8, attention_mask=batch["attention_mask"]).tolist()
    end = free[0][2]
    got = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=end)[:, 33:].tolist()
    assert len({row.index(end) for row in free if end in row}) > 1 or any(end not in row for row in free)
    for row, tokens in zip(got, free, strict=True):
        length = tokens.index(end) + 1 if end in tokens else 8
        assert row[:length] == tokens[:length]
        assert set(row[length:]) <= {0}


def test_logits_to_keep_and_outputs():
    model, batch = sparse_model(), padded(TEXTS[:2], "right")
    with torch.no_grad():
        whole = model(**batch)
        last = model(**batch, logits_to_keep=1)
        close(last.logits[:, 0], whole.logits[:, -1])
        states = model(**batch, output_hidden_states=True, return_dict=False)
        assert isinstance(states, tuple)
        close(states[0], whole.logits)
        by_tuple = model.model(**batch, return_dict=False)
        close(by_tuple[0], model.model(**batch).last_hidden_state)
    # The last column of a padded row goes on behind its last token.
    for row, text in enumerate(TEXTS[:2]):
        close(whole.logits[row, -1], whole.logits[row, len(text) - 1])


def test_caches_of_other_kinds():
    model, ids = sparse_model(), tokens_of(1, 10)
    with torch.no_grad(), pytest.raises(ValueError, match="past_key_values must be of 3 layers, got 2"):
        model(ids, past_key_values=StaticCache(config=base_model(num_hidden_layers=2).config, max_cache_len=32))
    full = DynamicCache(config=model.config)
    with torch.no_grad():
        base_model()(ids, past_key_values=full)
        with pytest.raises(ValueError, match="past_key_values must be empty before the first tokens, got 10 tokens"):
            model(ids, past_key_values=full)
        sparse = model(ids).past_key_values
        with pytest.raises(ValueError, match="past_key_values must be one whose layer 0 has full attention"):
            base_model()(ids, past_key_values=sparse)
        with pytest.raises(ValueError, match="past_key_values must be of 2 sequences, got 1"):
            model(tokens_of(2, 3), past_key_values=sparse)
        with pytest.raises(ValueError, match=r"past_key_values must be a DynamicCache or a StaticCache .* got list"):
            model(ids, past_key_values=[])


def test_a_failed_step_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    model, ids, cache = sparse_model(), tokens_of(1, 30), DynamicCache()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :20], past_key_values=cache)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[2].mlp, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 20:], past_key_values=cache)
        assert cache.get_seq_length() == 20
        close(model(ids[:, 20:], past_key_values=cache).logits, expected[:, 20:])


def test_memory_is_free_when_a_cache_is_dropped():
    model, cache = sparse_model(), DynamicCache()
    with torch.no_grad():
        model(tokens_of(2, 20), past_key_values=cache)
    [caches] = {layer.caches for layer in cache.layers}
    kept = [weakref.ref(x) for layer in range(len(cache.layers)) for x in caches.of_layer(layer).pools()]
    gc.disable()
    try:
        del cache, caches
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
