"""Recorded selections: what is written comes back, files of something else are refused, statistics by hand."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from flash_sparse_attention import NSAConfig, selections
from flash_sparse_attention.selections import (
    PACKAGED_FILE,
    RecordedSelections,
    load_selections,
    neighbour_overlap,
    recorded_selections,
    save_selections,
    widened,
)

CONFIG = NSAConfig(kernel_size=4, kernel_stride=2, block_size=4, num_selected_blocks=5, num_init_blocks=1)
UNFORCED = CONFIG.replace(num_init_blocks=0, num_local_blocks=0)
SINGLE = NSAConfig(kernel_size=1, kernel_stride=1, block_size=1, num_selected_blocks=3, num_local_blocks=1)


def as_sets(indices, block_size):
    """The eligible blocks that every (token, head) selected, by the definition."""
    return [
        [{j for j in row if 0 <= j <= token // block_size} for row in rows]
        for token, rows in enumerate(indices.tolist())
    ]


@pytest.mark.parametrize("config", [CONFIG, UNFORCED, CONFIG.replace(num_init_blocks=3)])
def test_sets_come_back(tmp_path, config):
    """Of any index tensor: repeated entries, negative ones, blocks of the future; forced blocks there or not."""
    layers = {
        "layers.0": torch.randint(-3, 60, (201, 2, 5), dtype=torch.int32),
        "layers.7": torch.randint(-1, 9, (201, 1, 5), dtype=torch.int32),
    }
    origin = {"step": 3, "model": {"hidden_size": 8}, "name": "Überlänge"}
    save_selections(tmp_path / "folder" / "file", RecordedSelections(config, layers, origin))
    loaded = load_selections(tmp_path / "folder" / "file")
    assert (loaded.config, loaded.origin, loaded.total_tokens) == (config, origin, 201)
    assert list(loaded.layers) == list(layers)
    for name, indices in loaded.layers.items():
        assert indices.dtype == torch.int32
        assert indices.shape == layers[name].shape
        assert as_sets(indices, 4) == as_sets(layers[name], 4)
        for row in indices.flatten(0, 1).tolist():
            used = [j for j in row if j >= 0]
            assert row == sorted(set(used)) + [-1] * (5 - len(used))


@pytest.mark.parametrize(("tokens", "bytes_of_a_gap"), [(1, 1), (255, 1), (256, 2), (70_000, 3)])
def test_distant_blocks_come_back(tmp_path, tokens, bytes_of_a_gap):
    """The last query skips all blocks but its neighbour, in blocks of one token."""
    config = SINGLE.replace(num_init_blocks=0, num_local_blocks=0)
    indices = torch.full((tokens, 1, 3), -1, dtype=torch.int32)
    indices[-1, 0, 0] = tokens - 1
    save_selections(tmp_path / "file", RecordedSelections(config, {"": indices}))
    assert torch.equal(load_selections(tmp_path / "file").layers[""], indices)
    assert len(np.load(tmp_path / "file")["gaps"]) == bytes_of_a_gap


@pytest.mark.parametrize("config", [CONFIG, UNFORCED])
def test_nothing_selected_comes_back(tmp_path, config):
    indices = torch.full((9, 2, 5), -1, dtype=torch.int32)
    save_selections(tmp_path / "file", RecordedSelections(config, {"a": indices}))
    assert torch.equal(load_selections(tmp_path / "file").layers["a"], indices)


def test_the_documented_format(tmp_path):
    """The row of the module's docstring, in block 9, is stored as it says."""
    config = NSAConfig(kernel_size=1, kernel_stride=1, block_size=1, num_selected_blocks=6)
    indices = torch.full((10, 1, 6), -1, dtype=torch.int32)
    indices[-1, 0] = torch.tensor([0, 2, 3, 7, 8, 9])
    save_selections(tmp_path / "file", RecordedSelections(config, {"a": indices}))
    stored = np.load(tmp_path / "file")
    assert sorted(stored.files) == ["gaps", "header"]
    assert stored["gaps"].dtype == np.uint8
    assert stored["gaps"][0, 0, -1].tolist()[:3] == [3, 1, 4]
    assert json.loads(stored["header"].tobytes())["layers"] == [["a", 1]]


@pytest.fixture
def file(tmp_path):
    """A file of selections, 64 tokens x 2 heads x 5 slots."""
    indices = torch.randint(0, 16, (64, 2, 5), dtype=torch.int32)
    save_selections(tmp_path / "good.npz", RecordedSelections(CONFIG, {"a": indices}))
    return tmp_path / "good.npz"


def test_files_of_something_else_are_refused(file, tmp_path):
    content = file.read_bytes()
    cases = {
        "missing": (None, "No such file"),
        "empty": (b"", "which is damaged"),
        "text": (b"These are words.", "of another format"),
        "cut off": (content[: len(content) // 2], "which is damaged"),
        "flipped": (content.replace(content[300:304], bytes(x ^ 255 for x in content[300:304])), "which is damaged"),
    }
    for name, (damaged, message) in cases.items():
        if damaged is not None:
            (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"path must be .*, got '.*{name}' .*{message}.*: fsa inspect"):
            load_selections(tmp_path / name)
    with pytest.raises(ValueError, match=r"\(Is a directory\)"):
        load_selections(tmp_path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", header=np.array([{}], dtype=object), gaps=np.zeros(3))
    for name in ("other.npz", "array.npy", "objects.npz"):
        with pytest.raises(ValueError, match="of another format"):
            load_selections(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "another"}, "a file of selections, got .* of another format"),
        ({"version": 2}, "a file of selections of version 1, got .* of version 2: another version"),
        ({"tokens": 65}, "contents do not fit together"),
        ({"tokens": "many"}, "contents do not fit together"),
        ({"layers": [["a", 3]]}, "contents do not fit together"),
        ({"layers": []}, "contents do not fit together"),
        ({"config": {}, "origin": None}, "contents do not fit together"),
        ({"config": {"no": 1}}, "contents do not fit together .*no field 'no'"),
        ({"config": {**CONFIG.to_dict(), "num_selected_blocks": 3}}, "a query has more than 3 blocks"),
        ({"config": {**CONFIG.to_dict(), "block_size": 8}}, "a block lies behind its query"),
    ],
)
def test_contents_that_do_not_fit_are_refused(file, changes, message):
    with np.load(file) as stored:
        arrays = dict(stored)
    header = json.loads(arrays.pop("header").tobytes()) | changes
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    with pytest.raises(ValueError, match=message):
        load_selections(file)


def test_what_is_no_record_is_refused():
    good = torch.zeros(3, 1, 5, dtype=torch.int32)
    for layers, message in (
        ({}, "layers must be at least one layer, got none"),
        ({"a": good[:0]}, "layers must be of at least one token, got none"),
        ({"a": good.long()}, r"layers\['a'\] must be int32 \[N, Hk, T=5\], got int64"),
        ({"a": good, "b": good[:2]}, r"layers\['b'\] must be int32 \[N=3, Hk, T=5\], got \[2, 1, 5\]"),
        ({"a": good[..., :4]}, r"got \[3, 1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            RecordedSelections(CONFIG, layers)


def test_widened_by_hand():
    """Three recorded heads: head h of layer l says 10 l + h, token t adds 100 t."""
    layers = {
        "a": torch.tensor([[[0], [1]], [[100], [101]], [[200], [201]]], dtype=torch.int32),
        "b": torch.tensor([[[10]], [[110]], [[210]]], dtype=torch.int32),
    }
    wide = widened(layers, num_kv_heads=5, total_tokens=2)
    assert wide[..., 0].tolist() == [[0, 1, 10, 0, 1], [100, 101, 110, 100, 101]]
    assert wide.dtype == torch.int32
    assert wide.is_contiguous()
    assert widened(layers, num_kv_heads=1, total_tokens=3)[..., 0].tolist() == [[0], [100], [200]]


def test_widened_refuses():
    layers = {"a": torch.zeros(3, 1, 5, dtype=torch.int32)}
    with pytest.raises(ValueError, match="total_tokens must be at most the 3 tokens that were recorded, got 4"):
        widened(layers, num_kv_heads=1, total_tokens=4)
    for sizes in ({"num_kv_heads": 0, "total_tokens": 1}, {"num_kv_heads": 1, "total_tokens": 0}):
        with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
            widened(layers, **sizes)
    with pytest.raises(ValueError, match="at least one layer"):
        widened({}, num_kv_heads=1, total_tokens=1)


def test_overlap_by_hand():
    """Blocks of 2, the first and the newest forced; tokens 6 to 9 lie in the blocks 3 3 4 4."""
    indices = torch.full((10, 1, 4), -1, dtype=torch.int32)
    indices[6, 0] = torch.tensor([0, 1, 2, 3])
    indices[7, 0] = torch.tensor([0, 2, 3, -1])
    indices[8, 0] = torch.tensor([0, 2, 3, 4])
    indices[9, 0] = torch.tensor([4, 1, 1, 5])
    sizes = {"block_size": 2, "num_init_blocks": 1, "num_local_blocks": 1}
    # Chosen: {1, 2}, {2}, {2, 3}, {1}, and nothing before: 0 of 2, 1 of 1, 1 of 2, 0 of 1.
    assert neighbour_overlap(indices, **sizes) == (0 + 1 + 1 / 2 + 0) / 4
    assert math.isnan(neighbour_overlap(indices[:6], **sizes))
    assert math.isnan(neighbour_overlap(indices[:0], **sizes))


def test_overlap_counts_like_sets(monkeypatch):
    """Over several shares of the tokens, hostile entries and heads."""
    monkeypatch.setattr(selections, "_TOKENS_AT_ONCE", 7)
    indices = torch.randint(-2, 20, (60, 3, 6), dtype=torch.int32)
    shares = []
    sets = as_sets(indices, 4)
    chosen = [[{j for j in row if 2 <= j <= token // 4 - 2} for row in rows] for token, rows in enumerate(sets)]
    for before, after in itertools.pairwise(chosen):
        shares += [len(a & b) / len(b) for a, b in zip(before, after, strict=True) if b]
    found = neighbour_overlap(indices, block_size=4, num_init_blocks=2, num_local_blocks=2)
    assert found == pytest.approx(sum(shares) / len(shares), rel=1e-12)
    assert 0 < found < 1


def test_overlap_of_the_same_choice_is_whole():
    indices = torch.tensor([0, 3, 5, 9], dtype=torch.int32).expand(200, 2, 4)
    # From token 160 on nothing changes: all blocks lie before the newest.
    sizes = {"block_size": 8, "num_init_blocks": 1, "num_local_blocks": 2}
    assert neighbour_overlap(indices, **sizes) > 0.97
    with pytest.raises(ValueError, match=r"block_indices must be int32 \[N, Hk, T\], got int64"):
        neighbour_overlap(indices.long(), **sizes)


def test_the_packaged_selections():
    """The paper's sizes, several layers, and neighbours that choose alike."""
    recorded = recorded_selections()
    assert PACKAGED_FILE.stat().st_size < 1_500_000
    assert recorded.config == NSAConfig()
    assert recorded.total_tokens >= 16_384
    assert sum(indices.shape[1] for indices in recorded.layers.values()) >= 6
    assert {"model", "step", "text_sha256", "device", "dtype", "versions"} <= recorded.origin.keys()
    indices = widened(recorded.layers, num_kv_heads=8, total_tokens=16_384)
    # Every query has as many blocks as it can: all it sees, or one in each slot; the newest is its own.
    own = torch.arange(len(indices))[:, None] // 64
    assert torch.equal((indices >= 0).sum(2), (own + 1).clamp(max=16).expand(-1, 8))
    assert torch.equal(indices.amax(2), own.int().expand(-1, 8))
    # Random choices: of the blocks that are not forced the share that is chosen.
    free = (own[own > 2] - 2).double()
    by_chance = (free.clamp(max=13) / free).mean().item()
    assert 1.5 * by_chance < neighbour_overlap(indices, block_size=64, num_init_blocks=1, num_local_blocks=2) < 1
