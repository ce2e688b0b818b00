"""`NSACache` on a GPU: decoding in pieces, in CUDA graphs, without waiting for the device: pytest -m gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.cache import NSACache
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig, NativeSparseAttention
from flash_sparse_attention.training.sampling import cached, generate_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"num_selected_blocks": 6, "window_size": 100}
PRESETS = ["paper", "fsa", "fla"]
HIDDEN = 128


def layer_of(preset: str, **options: object) -> NativeSparseAttention:
    torch.manual_seed(0)
    config = NSAConfig.preset(preset, **SIZES)
    layer = NativeSparseAttention(HIDDEN, 8, 2, config, head_dim=64, device="cuda", dtype=torch.bfloat16, **options)
    torch.nn.init.normal_(layer.branch_gate_proj.weight)
    return layer


def close(got: Tensor, expected: Tensor) -> None:
    """As close as two ways of summing in bfloat16 are; a block that nearly ties may be selected by one of them only."""
    error = (got.float() - expected.float()).abs()
    scale = expected.float().abs().max()
    assert torch.isfinite(got).all()
    assert error.mean() < 5e-3 * scale
    assert (error > 3e-2 * scale).float().mean() < 5e-3


def append(layer: NativeSparseAttention, cache: NSACache, piece: Tensor) -> Tensor:
    with cache.extend(SequenceLayout.uniform(*piece.shape[:2], device="cuda")):
        return layer(piece, cache=cache.layers[0])


@pytest.mark.parametrize("options", [{}, {"page_size": 128, "num_pages": 40}], ids=["dense", "paged"])
@pytest.mark.parametrize("preset", PRESETS)
def test_pieces(preset: str, options: dict[str, int]):
    layer = layer_of(preset)
    x = torch.randn(3, 1000, HIDDEN, device="cuda", dtype=torch.bfloat16)
    cache = layer.new_cache(3, 1024, **options)
    if options:
        cache.set_pages(torch.randperm(40)[:24].view(3, 8).to(torch.int32))
    pieces = (300, 1, 1, 7, 16, 200, 1, 17, 457)
    got = torch.cat([append(layer, cache, piece) for piece in x.split(pieces, 1)], 1)
    with torch.no_grad():
        close(got, layer(x))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_captured_in_a_graph(preset: str, tokens: int):
    layer = layer_of(preset)
    lengths, steps = (700, 1, 333, 64), 40
    x = torch.randn(4, 700 + steps * tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
    cache = layer.new_cache(4, 700 + steps * tokens)
    layout = SequenceLayout.from_lengths(lengths, "cuda")
    with cache.extend(layout):
        layer(torch.cat([own[:length] for own, length in zip(x, lengths, strict=True)]), layout, cache=cache.layers[0])
    # Kernels are compiled by a step that is taken back.
    new = torch.zeros(4, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    append(layer, cache, new)
    cache.crop(list(lengths))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = append(layer, cache, new)
    assert cache.lengths == lengths
    at = torch.tensor(lengths, device="cuda")[:, None] + torch.arange(tokens, device="cuda")
    rows = torch.arange(4, device="cuda")[:, None]
    got, wanted = [], []
    for step in range(steps):
        new.copy_(x[rows, at + step * tokens])
        cache.replayed(tokens)
        graph.replay()
        got.append(out.clone())
        wanted.append(expected[rows, at + step * tokens])
    close(torch.stack(got), torch.stack(wanted))
    assert cache.seq_lens.tolist() == list(cache.lengths)
    with pytest.raises(ValueError, match="sequence 0 must be of at most capacity="):
        cache.replayed(tokens)


# Setting the mode warns that it may change.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("preset", PRESETS)
def test_never_waits_for_the_device(preset: str):
    layer = layer_of(preset)
    cache = layer.new_cache(2, 512)
    layout, x = SequenceLayout.uniform(2, 100, "cuda"), torch.randn(200, HIDDEN, device="cuda", dtype=torch.bfloat16)
    one, y = SequenceLayout.uniform(2, 1, "cuda"), x[:2]

    def run() -> None:
        # A prompt in two pieces, of which the second has a past, and tokens one by one.
        for _ in range(2):
            with cache.extend(layout):
                layer(x, layout, cache=cache.layers[0])
        for _ in range(20):
            with cache.extend(one):
                layer(y, one, cache=cache.layers[0])

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.crop(0)
        run()
        cache.reorder([1, 0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_text_is_the_same_with_and_without_a_graph():
    torch.manual_seed(0)
    config = LanguageModelConfig(257, 128, 256, 2, num_heads=4, num_kv_heads=1, head_dim=32, nsa=NSAConfig(**SIZES))
    model = LanguageModel(config, device="cuda")
    prompts = [[256, *b"def read(path):"], [256]]
    texts = [
        list(generate_tokens(cached(model, 2, 120, capture=capture), prompts, max_new_tokens=100))
        for capture in (True, False)
    ]
    assert texts[0] == texts[1]
