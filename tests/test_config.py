"""`NSAConfig`: defaults, presets, conversion, and every value that it refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.config import compression_kinds, preset_names


def test_defaults_are_those_of_the_paper():
    config = NSAConfig()
    assert (config.kernel_size, config.kernel_stride, config.block_size) == (32, 16, 64)
    assert (config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks) == (16, 1, 2)
    assert config.window_size == 512
    assert config == NSAConfig.preset("paper")


@pytest.mark.parametrize(
    ("name", "sizes", "learned"),
    [
        ("paper", (32, 16, 64), ("mlp", "kv", "independent", "per_head", "after")),
        ("fsa", (32, 16, 64), ("linear", "k", "shared", "per_token", "after")),
        ("fla", (64, 64, 64), ("mean", "none", "shared", "per_head", "before")),
    ],
)
def test_presets(name: str, sizes: tuple[int, ...], learned: tuple[str, ...]):
    config = NSAConfig.preset(name)
    assert (config.kernel_size, config.kernel_stride, config.block_size) == sizes
    assert (config.compression, config.position_embedding, config.branch_kv, config.gate, config.rope) == learned


def test_names():
    assert preset_names() == ("paper", "fsa", "fla")
    assert compression_kinds() == ("mean", "linear", "mlp", "weighted")


def test_preset_takes_overrides_and_validates_them():
    assert NSAConfig.preset("fsa", window_size=256).window_size == 256
    with pytest.raises(ValueError, match="block_size must be a multiple of kernel_stride=64, got 96"):
        NSAConfig.preset("fla", block_size=96)
    with pytest.raises(ValueError, match=r"preset must be one of paper, fsa, fla, got 'nsa'"):
        NSAConfig.preset("nsa")


def test_conversion_to_dict_and_back_through_json():
    config = NSAConfig.preset("fsa", num_selected_blocks=8)
    assert NSAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(NSAConfig)}


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"NSAConfig has no field 'blocksize', 'topk': known fields are block_size, .*gate"
    ):
        NSAConfig.from_dict({"topk": 16, "blocksize": 64, "window_size": 64})


def test_replace_validates_again():
    assert NSAConfig().replace(window_size=64) == NSAConfig(window_size=64)
    with pytest.raises(ValueError, match="num_selected_blocks must be at least"):
        NSAConfig().replace(num_local_blocks=16)
    with pytest.raises(ValueError, match="no field 'windows'"):
        NSAConfig().replace(windows=3)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window_size = 3  # type: ignore[misc]


def test_every_block_forced_or_none():
    assert NSAConfig(num_selected_blocks=3).num_selected_blocks == 3
    assert NSAConfig(num_selected_blocks=1, num_init_blocks=0, num_local_blocks=0).num_init_blocks == 0


POSITIVE = ("kernel_size", "kernel_stride", "block_size", "num_selected_blocks", "window_size")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({name: 0}, f"{name} must be an integer of at least 1, got 0") for name in POSITIVE),
        ({"num_init_blocks": -1}, "num_init_blocks must be an integer of at least 0, got -1"),
        ({"num_local_blocks": -1}, "num_local_blocks must be an integer of at least 0, got -1"),
        ({"window_size": 512.0}, "window_size must be an integer of at least 1, got 512.0"),
        ({"window_size": True}, "window_size must be an integer of at least 1, got True"),
        ({"kernel_size": 40}, "kernel_size must be a multiple of kernel_stride=16, got 40: windows and blocks"),
        ({"block_size": 72}, "block_size must be a multiple of kernel_stride=16, got 72"),
        (
            {"num_selected_blocks": 2},
            r"num_selected_blocks must be at least num_init_blocks \+ num_local_blocks = 3, got 2: raise it",
        ),
        ({"compression": "max"}, "compression must be one of mean, linear, mlp, weighted, got 'max'"),
        ({"position_embedding": "v"}, "position_embedding must be one of none, k, kv, got 'v'"),
        ({"branch_kv": "both"}, "branch_kv must be one of shared, independent, got 'both'"),
        ({"gate": None}, "gate must be one of per_head, per_token, got None"),
        ({"rope": "never"}, "rope must be one of after, before, got 'never'"),
    ],
)
def test_refuses(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**values)
