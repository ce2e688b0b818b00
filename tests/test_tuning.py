"""Tuned choices: the file they are kept in, which of them a call takes, and the search, on fakes."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import warnings
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

pytest.importorskip("triton")

from flash_sparse_attention.impl.triton import block_scores, interval, measure, tuning
from flash_sparse_attention.impl.triton.tuning import (
    KvOuterTiles,
    LoopOrders,
    QueryOuterTiles,
    SelectedShape,
    SelectedTiles,
    TunedEntry,
    built_in_tiles,
    choice_of,
    loop_orders_of,
    read_entries,
    reset_tuning,
    store,
    tiles_of,
    tuning_file,
)
from flash_sparse_attention.types import SequenceLayout

SHAPE = SelectedShape(8192, 8, 4, 16, 64, 128, 128, torch.bfloat16)
TILES = SelectedTiles(KvOuterTiles(128, 64, 777, 8, 3, 168), KvOuterTiles(32, 32, 999, 4, 1), QueryOuterTiles(32, 8, 3))
MS = {"kv_outer": {"forward": 1.5, "backward": 2.5}}


def entry(device="GPU", tiles=TILES, loop_order="query_outer", backward=None, **changes) -> TunedEntry:
    orders = LoopOrders(loop_order, backward or loop_order)
    return TunedEntry(device, "3.4.0", SHAPE._replace(**changes), orders, tiles, MS)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A file of tuned choices that does not exist yet."""
    monkeypatch.setenv("FSA_TUNING_CACHE", str(tmp_path / "folder" / "tuning.json"))
    reset_tuning()
    yield tuning_file()
    reset_tuning()


def test_the_file_is_named_by_the_environment(monkeypatch, tmp_path):
    home = str(tmp_path / "home")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("FSA_TUNING_CACHE", "~/mine.json")
    assert str(tuning_file()) == f"{home}/mine.json"
    monkeypatch.delenv("FSA_TUNING_CACHE")
    assert tuning_file() == tmp_path / "caches" / "flash-sparse-attention" / "tuning.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert str(tuning_file()) == f"{home}/.cache/flash-sparse-attention/tuning.json"


def test_round_trip(file):
    assert tiles_of(SHAPE, "GPU") == built_in_tiles(SHAPE)
    assert store(entry()) == file
    assert read_entries(file) == [entry()]
    assert choice_of(SHAPE, "GPU") == (("query_outer", "query_outer"), TILES, entry())
    assert tiles_of(SHAPE, "GPU") == TILES
    assert loop_orders_of(SHAPE, "auto", "GPU") == ("query_outer", "query_outer")
    assert loop_orders_of(SHAPE, "kv_outer", "GPU") == ("kv_outer", "kv_outer")


def test_each_pass_may_have_an_order_of_its_own(file):
    store(entry(backward="kv_outer"))
    assert read_entries(file) == [entry(backward="kv_outer")]
    (found,) = json.loads(file.read_text())["entries"]
    assert found["loop_order"] == {"forward": "query_outer", "backward": "kv_outer"}
    assert loop_orders_of(SHAPE, "auto", "GPU") == ("query_outer", "kv_outer")
    assert loop_orders_of(SHAPE, "query_outer", "GPU") == ("query_outer", "query_outer")


@pytest.mark.parametrize(
    ("group", "capability", "version", "changes", "wanted"),
    [
        (16, 90, "3.6.0", {}, ("kv_outer", "kv_outer")),
        (16, 80, "3.6.0", {}, ("kv_outer", "kv_outer")),
        (32, 90, "3.6.0", {}, ("query_outer", "kv_outer")),
        (32, 80, "3.6.0", {}, ("query_outer", "query_outer")),
        (32, 90, "3.5.1", {}, ("query_outer", "query_outer")),
        (32, 90, "3.6.0", {"dtype": torch.float32}, ("query_outer", "query_outer")),
        (32, 90, "3.6.0", {"block_size": 32}, ("query_outer", "query_outer")),
        (32, 90, "3.6.0", {"block_size": 128}, ("query_outer", "kv_outer")),
    ],
)
def test_built_in_loop_orders(monkeypatch, group, capability, version, changes, wanted):
    """Backward the kernels for Hopper are the faster ones, whatever the group, where there are any."""
    monkeypatch.setattr(tuning.triton, "__version__", version)
    monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(tuning, "device_capability", lambda: capability)
    monkeypatch.setattr(tuning, "has_hopper_kernels", lambda dim_k, dim_v, dtype: dtype != torch.float32)
    assert tuning.built_in_loop_orders(SHAPE._replace(group=group, **changes)) == wanted


def test_what_the_file_holds(file):
    store(entry(dim_v=64))
    content = json.loads(file.read_text())
    assert content["version"] == 1
    (found,) = content["entries"]
    sizes = {"num_kv_heads": 8, "group": 4, "slots": 16, "block_size": 64, "dim_k": 128, "dim_v": 64}
    assert found["shape"] == {**sizes, "dtype": "bfloat16"}
    assert (found["device"], found["total_tokens"], found["ms"]) == ("GPU", 8192, MS)
    assert found["loop_order"] == {"forward": "query_outer", "backward": "query_outer"}
    assert found["tiles"]["kv_outer_forward"]["registers"] == 168


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 4},
        {"group": 8},
        {"slots": 8},
        {"block_size": 32},
        {"dim_k": 64},
        {"dim_v": 64},
        {"dtype": torch.float16},
    ],
)
def test_another_shape_is_not_tuned(changes):
    store(entry())
    other = SHAPE._replace(**changes)
    assert choice_of(other, "GPU") == (("kv_outer", "kv_outer"), built_in_tiles(other), None)


def test_another_device_is_not_tuned(monkeypatch):
    store(entry())
    assert choice_of(SHAPE, "other").entry is None
    monkeypatch.setattr(tuning, "device_name", lambda: "GPU")
    assert tiles_of(SHAPE) == TILES
    assert loop_orders_of(SHAPE, "auto") == ("query_outer", "query_outer")


def test_without_a_device_the_built_in_choice_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store(entry())
    assert tuning.device_name() == ""
    assert choice_of(SHAPE).entry is None


@pytest.mark.parametrize(
    ("tokens", "measured"),
    [
        (1, None),
        (2047, None),
        (2048, 8192),
        (8192, 8192),
        (23170, 8192),
        (23171, 65536),
        (262144, 65536),
        (262145, None),
        (1000000, None),
        (2000000, 8000000),
    ],
)
def test_the_nearest_length_counts(tokens, measured):
    for length in (65536, 8192, 8_000_000):
        store(entry(total_tokens=length))
    found = choice_of(SHAPE._replace(total_tokens=tokens), "GPU").entry
    assert (found and found.shape.total_tokens) == measured


def test_lengths_that_a_compiler_leaves_open():
    """They have no hash, and must not be fixed."""
    environment = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2)
    tensor = torch.empty(8000, 8)
    tokens, heads = FakeTensorMode(shape_env=environment).from_tensor(tensor, symbolic_context=context).shape
    symbolic = SHAPE._replace(total_tokens=tokens, num_kv_heads=heads)
    assert choice_of(symbolic, "GPU").entry is None
    store(entry())
    assert choice_of(symbolic, "GPU").entry == entry()
    assert isinstance(tokens, torch.SymInt)
    assert environment.replace(tokens.node.expr).free_symbols


def test_an_entry_replaces_its_own_kind_only(file):
    others = [entry(device="other"), entry(total_tokens=65536), entry(group=1)]
    for one in [entry(), *others, entry(loop_order="kv_outer", tiles=built_in_tiles(SHAPE))]:
        store(one)
    found = read_entries(file)
    assert len(found) == 4
    assert all(other in found for other in others)
    assert choice_of(SHAPE, "GPU").loop_orders == ("kv_outer", "kv_outer")


@pytest.mark.parametrize("broken", ["json", "replace"])
def test_a_write_that_fails_leaves_the_file(file, monkeypatch, broken):
    store(entry())
    before = file.read_bytes()

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(*((json, "dumps") if broken == "json" else (os, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        store(entry(group=1))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


BROKEN = {
    "nothing": "",
    "half": '{"version": 1, "entries": [{"dev',
    "a list": "[]",
    "another program's": '{"name": "x"}',
    "a later version": '{"version": 2, "entries": []}',
    "no entries": '{"version": 1, "entries": 3}',
    "entries of another kind": '{"version": 1, "entries": [3]}',
    "binary": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning(file, content):
    file.parent.mkdir()
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"folder/tuning.json") as caught:
        assert choice_of(SHAPE, "GPU").entry is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice_of(SHAPE._replace(group=2), "GPU").entry is None
    # What may be somebody else's is not overwritten.
    with pytest.raises(ValueError, match=r"the tuning file must be one that `fsa tune` wrote, got .*: delete it"):
        store(entry())
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shape", "dtype"), "bfloat17"),
        (("shape", "dtype"), "nn"),
        (("shape", "group"), 0),
        (("shape", "extra"), 1),
        (("total_tokens",), "many"),
        (("loop_order", "backward"), "sideways"),
        (("loop_order",), {"forward": "sideways", "backward": "sideways"}),
        (("tiles", "kv_outer_forward", "rows"), 48),
        (("tiles", "kv_outer_backward", "keys"), 8),
        (("tiles", "kv_outer_backward", "segment_pairs"), 0),
        (("tiles", "query_outer", "warps"), 3),
        (("tiles", "query_outer", "stages"), None),
        (("tiles", "query_outer", "rows"), 16),
        (("ms",), {"kv_outer": {"forward": "fast"}}),
    ],
)
def test_an_entry_that_no_kernel_can_follow_is_ignored(file, path, value):
    store(entry())
    content = json.loads(file.read_text())
    place = content["entries"][0]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    reset_tuning()
    with pytest.warns(UserWarning, match="tuned kernels are not used"):
        assert choice_of(SHAPE, "GPU").entry is None


def test_a_file_that_cannot_be_read_is_ignored(file):
    file.mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"tuning\.json"):
        assert choice_of(SHAPE, "GPU").entry is None


def test_the_file_is_read_once(file, monkeypatch):
    store(entry())
    reads = []
    monkeypatch.setattr(tuning, "read_entries", lambda path: reads.append(path) or [entry()])
    for tokens in range(8000, 8010):
        assert tiles_of(SHAPE._replace(total_tokens=tokens), "GPU") == TILES
    assert reads == [file]


def shapes():
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (64, 128, 192, 256):
            for block_size in (16, 48, 64, 128):
                for group in (1, 5, 16, 5000):
                    yield SHAPE._replace(dtype=dtype, dim_k=dim, dim_v=dim, block_size=block_size, group=group)


def test_candidates():
    for shape in shapes():
        tried, base = measure.candidates(shape), built_in_tiles(shape)
        assert tried._fields == measure.KERNELS
        for name, tiles in tried._asdict().items():
            assert tiles[0] == getattr(base, name)
            assert len(set(tiles)) == len(tiles) > 4
            others = [one for one in tiles if name == "kv_outer_backward" and one.keys == 128 and not one.specialized]
            assert all((one.rows, one.warps) == (32, 8) for one in others)
            for one in tiles:
                keys = tuning._hopper_keys(shape, name == "kv_outer_backward")
                tuning._check_tiles(one, keys, name == "kv_outer_forward" and shape.block_size <= 64)
        near = {False, True} if shape.block_size <= 64 else {False}
        assert {tiles.dense_near for tiles in tried.kv_outer_forward} == near
        if base.kv_outer_forward.keys == 128 and base.kv_outer_forward.specialized:
            pairs = base.kv_outer_forward.segment_pairs
            others = {one.segment_pairs for one in tried.kv_outer_forward if not one.specialized}
            assert others >= {max(1, pairs // 4), pairs}
        # Both passes share what the keys of the backward pass decide.
        assert {tiles.keys for tiles in tried.kv_outer_backward} == {base.kv_outer_backward.keys}
    assert 9 <= min(map(len, measure.candidates(SHAPE))) <= max(map(len, measure.candidates(SHAPE))) <= 13


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, True, True),
        ({"dim_k": 64, "dim_v": 64, "group": 5}, True, True),
        ({"dtype": torch.float16}, True, True),
        ({"block_size": 128}, True, True),
        ({"block_size": 192}, False, True),
        ({"block_size": 32}, False, False),
        ({"dim_k": 192}, False, False),
        ({"dim_k": 80, "dim_v": 80}, False, False),
        ({"dtype": torch.float32}, False, False),
    ],
    ids=str,
)
def test_specialized_kernels_are_asked_for_where_they_are(monkeypatch, changes, forward, backward):
    shape = SHAPE._replace(**changes)
    tiles = built_in_tiles(shape)
    assert (tiles.kv_outer_forward.specialized, tiles.kv_outer_backward.specialized) == (forward, backward)
    stored = entry(tiles=tiles, **changes)
    assert TunedEntry.from_dict(stored.to_dict()) == stored
    monkeypatch.setattr(tuning, "device_capability", lambda: 80)
    elsewhere = built_in_tiles(shape)
    assert elsewhere.kv_outer_backward.keys <= 64
    assert not elsewhere.kv_outer_forward.specialized
    assert not elsewhere.kv_outer_backward.specialized


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, 64),
        ({"block_size": 128}, 128),
        ({"block_size": 256, "dtype": torch.float16}, 128),
        ({"block_size": 192}, 64),
        ({"block_size": 128, "dim_k": 64, "dim_v": 64}, 64),
        ({"block_size": 128, "dtype": torch.float32}, 32),
    ],
    ids=str,
)
def test_keys_that_the_backward_pass_holds(monkeypatch, changes, keys):
    tiles = built_in_tiles(SHAPE._replace(**changes))
    assert tiles.kv_outer_backward.keys == keys
    stored = entry(tiles=tiles, **changes)
    assert TunedEntry.from_dict(stored.to_dict()) == stored
    if keys == 128:
        values = entry(tiles=tiles, **{**changes, "block_size": 192}).to_dict()
        with pytest.raises(ValueError, match="specialized"):
            TunedEntry.from_dict(values)
        # Another Triton, whose Gluon may be another one.
        monkeypatch.setattr(tuning, "GLUON_VERSIONS", ((9, 0), (9, 1)))
        others = built_in_tiles(SHAPE._replace(**changes))
        assert others.kv_outer_backward.keys == 64
        if changes["block_size"] == 128:
            assert tiles.kv_outer_forward.specialized
            assert not others.kv_outer_forward.specialized
            group = SHAPE.group
            assert (tiles.kv_outer_forward.segment_pairs, others.kv_outer_forward.segment_pairs) == (
                8192 // group,
                2048 // group,
            )


@pytest.mark.parametrize(
    ("block_size", "dim", "keys"), [(256, 128, 128), (256, 128, 64), (192, 128, 64), (128, 128, 64), (128, 64, 128)]
)
def test_forward_kernels_that_are_not_there(block_size, dim, keys):
    changes = {"block_size": block_size, "dim_k": dim, "dim_v": dim}
    tiles = built_in_tiles(SHAPE._replace(**changes))
    broken = replace(tiles, kv_outer_forward=replace(tiles.kv_outer_forward, rows=64, keys=keys, specialized=True))
    with pytest.raises(ValueError, match="specialized must be"):
        TunedEntry.from_dict(entry(tiles=broken, **changes).to_dict())


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, True),
        ({"dim_k": 64, "dim_v": 64, "slots": 8}, True),
        ({"slots": 7}, False),
        ({"block_size": 32}, False),
        ({"block_size": 128}, False),
        ({"dim_k": 192}, False),
        ({"dim_k": 80, "dim_v": 80}, False),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_where_near_blocks_have_a_kernel_of_their_own(monkeypatch, changes, dense):
    tiles = built_in_tiles(SHAPE._replace(**changes))
    assert tiles.kv_outer_forward.dense_near == dense
    assert not tiles.kv_outer_backward.dense_near
    stored = entry(tiles=tiles, **changes)
    assert TunedEntry.from_dict(stored.to_dict()) == stored
    monkeypatch.setattr(tuning, "device_capability", lambda: 100)
    assert not built_in_tiles(SHAPE._replace(**changes)).kv_outer_forward.dense_near


def test_an_entry_that_does_not_know_of_near_blocks(file):
    values = entry(tiles=built_in_tiles(SHAPE)).to_dict()
    for name in ("kv_outer_forward", "kv_outer_backward"):
        del values["tiles"][name]["dense_near"]
    assert not TunedEntry.from_dict(values).tiles.kv_outer_forward.dense_near
    for kernel, value in (("kv_outer_forward", 1), ("kv_outer_forward", None), ("kv_outer_backward", True)):
        values["tiles"][kernel]["dense_near"] = value
        with pytest.raises(ValueError, match="dense_near must be true only for the forward pass"):
            TunedEntry.from_dict(values)
        values["tiles"][kernel]["dense_near"] = False
    values["tiles"]["kv_outer_forward"] |= {"dense_near": True, "specialized": False}
    values["tiles"]["kv_outer_backward"]["specialized"] = False
    values["shape"]["block_size"] = 96
    with pytest.raises(ValueError, match="of blocks of up to 64"):
        TunedEntry.from_dict(values)


@pytest.mark.parametrize("tile", [{"rows": 128}, {"keys": 32}, {"specialized": "yes"}, {"specialized": 1}], ids=str)
def test_a_stored_choice_of_kernels_that_are_not_there(tile):
    tiles = built_in_tiles(SHAPE)
    broken = replace(tiles, kv_outer_backward=replace(tiles.kv_outer_backward, **tile))
    with pytest.raises(ValueError, match="specialized must be"):
        TunedEntry.from_dict(entry(tiles=broken).to_dict())
    with pytest.raises(ValueError, match="specialized must be"):
        TunedEntry.from_dict(entry(tiles=tiles, block_size=48).to_dict())


@pytest.mark.parametrize(
    ("version", "arch", "interpreted", "runs"),
    [
        ("3.6.0", 90, False, True),
        ("3.7.1", 90, False, True),
        ("3.5.1", 90, False, False),
        ("3.8.0", 90, False, False),
        ("4.0", 90, False, False),
        ("3.7.1", 80, False, False),
        ("3.7.1", 100, False, False),
        ("3.7.1", "gfx90a", False, False),
        ("3.7.1", 90, True, False),
    ],
)
def test_gluon_runs_where_it_was_tried(monkeypatch, version, arch, interpreted, runs):
    target = types.SimpleNamespace(arch=arch)
    active = types.SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(tuning.triton, "__version__", version)
    monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", interpreted)
    monkeypatch.setattr(tuning.triton.runtime, "driver", types.SimpleNamespace(active=active))
    assert tuning.runs_gluon() is runs


class FakeProblem:
    """Launches that take as long as `cost` says, and whose output is `value`, unless `broken` says otherwise."""

    def __init__(self, cost, broken=None):
        self.cost, self.broken, self.last = cost, broken or {}, 0.0

    def kv_outer_forward(self, tiles):
        return self.run("kv_outer_forward", tiles)

    def kv_outer_backward(self, tiles):
        return self.run("kv_outer_backward", tiles)

    def query_outer(self, tiles):
        return self.run("query_outer", tiles)

    def forward(self, loop_order, tiles):
        self.last = self.cost("forward", loop_order, tiles)

    def backward(self, loop_orders, tiles):
        self.last = self.cost("backward", loop_orders, tiles)

    def run(self, kernel, tiles):
        found = self.broken.get((kernel, tiles), 1.0)
        if isinstance(found, Exception):
            raise found
        self.last = self.cost("search", kernel, tiles)
        return torch.tensor([found, 2.0]), torch.tensor([0.0])


@pytest.fixture
def fake(monkeypatch):
    """Runs `tune` with launches and times that are fakes; returns the entry and its steps."""

    def run(cost, broken=None, seconds=60.0, clock=lambda: 0.0):
        problem = FakeProblem(cost, broken)
        monkeypatch.setattr(measure.Problem, "random", lambda *arguments: problem)
        monkeypatch.setattr(measure, "time_ms", lambda launch: (launch(), problem.last)[1])
        monkeypatch.setattr(measure.time, "monotonic", clock)
        steps = []
        return measure.tune(SHAPE, device="cpu", seconds=seconds, progress=steps.append), steps

    return run


def constant(direction, kernel, tiles):
    return 1.0


def wanting(wanted, saves=0.5):
    """Costs 1 ms, less for these tiles."""
    return lambda direction, kernel, tiles: saves if tiles in wanted else 1.0


def test_the_fastest_tiles_are_found(fake):
    tried = measure.candidates(SHAPE)
    wanted = SelectedTiles(tried.kv_outer_forward[3], tried.kv_outer_backward[-1], tried.query_outer[0])
    found, steps = fake(wanting([wanted.kv_outer_forward, wanted.kv_outer_backward]))
    assert found.tiles == wanted
    assert (found.device, found.shape) == ("cpu", SHAPE)
    assert [step.kernel for step in steps] == [name for name in measure.KERNELS for _ in getattr(tried, name)]
    assert [step.number for step in steps if step.kernel == "query_outer"] == [
        i + 1 for i in range(len(tried.query_outer))
    ]
    store(found)
    assert tiles_of(SHAPE, "cpu") == wanted


def test_noise_does_not_choose(fake):
    tried = measure.candidates(SHAPE)
    found, _ = fake(wanting([tried.kv_outer_forward[2]], saves=0.99))
    assert found.tiles == built_in_tiles(SHAPE)


@pytest.mark.parametrize(
    ("forward", "backward", "index", "wanted"),
    [
        (2, -3, 1, ("query_outer", "kv_outer")),
        (2, -3, 3, ("kv_outer", "kv_outer")),
        (3, 2, 1, ("query_outer", "query_outer")),
        (-3, 2, 1, ("kv_outer", "query_outer")),
        (0, 0, 0, ("kv_outer", "kv_outer")),
        # Not for less than two in a hundred.
        (0.3, -3, 0, ("kv_outer", "kv_outer")),
        (0.5, -3, 0, ("query_outer", "kv_outer")),
    ],
)
def test_loop_orders_are_those_of_the_least_time_in_all(fake, forward, backward, index, wanted):
    """The query-outer order saves so much in each pass; behind it, the backward pass builds its index."""

    def cost(direction, loop_order, tiles):
        if direction == "search":
            return 10.0
        if direction == "forward":
            return 10.0 - forward * (loop_order == "query_outer")
        return 10.0 - backward * (loop_order.backward == "query_outer") + index * (loop_order.forward == "query_outer")

    found, _ = fake(cost)
    assert found.loop_orders == wanted
    assert found.ms["query_outer"] == {"forward": 10.0 - forward, "backward": 10.0 - backward + index}
    assert found.ms["query_outer forward, kv_outer backward"] == {"forward": 10.0 - forward, "backward": 10.0 + index}
    assert found.ms["kv_outer"] == found.ms["built_in"] == {"forward": 10.0, "backward": 10.0}


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (RuntimeError("out of resource: shared memory\nmore"), "RuntimeError: out of resource: shared memory"),
        (1.1, "differs from the built-in tiles by 5.0e-02 of the largest value"),
        (float("nan"), "differs from the built-in tiles by nan of the largest value"),
        (float("inf"), "differs from the built-in tiles by inf of the largest value"),
    ],
)
def test_a_bad_candidate_is_left_out(fake, outcome, problem):
    tried = measure.candidates(SHAPE).kv_outer_backward
    found, steps = fake(wanting([tried[1]]), {("kv_outer_backward", tried[1]): outcome})
    assert found.tiles == built_in_tiles(SHAPE)
    assert [step for step in steps if step.ms is None] == [
        measure.Step("kv_outer_backward", 2, len(tried), tried[1], None, problem)
    ]


def test_rounding_is_allowed(fake):
    tried = measure.candidates(SHAPE).query_outer
    found, _ = fake(wanting([tried[1]]), {("query_outer", tried[1]): 1.01})
    assert found.tiles.query_outer == tried[1]


def test_the_time_is_shared_among_the_kernels(fake):
    """A clock that moves by a second with every look: of 12 seconds each kernel has four."""
    ticks = iter(range(1000))
    _, steps = fake(constant, seconds=12.0, clock=lambda: float(next(ticks)))
    tried = {name: max(step.number for step in steps if step.kernel == name) for name in measure.KERNELS}
    assert tried == {"kv_outer_forward": 4, "kv_outer_backward": 4, "query_outer": 4}


def test_without_time_the_built_in_tiles_are_compared(fake):
    found, steps = fake(constant, seconds=0.0, clock=lambda: 1.0)
    assert found.tiles == built_in_tiles(SHAPE)
    assert len(steps) == 3
    mixed = {"kv_outer forward, query_outer backward", "query_outer forward, kv_outer backward"}
    assert found.ms.keys() == {"kv_outer", "query_outer", "built_in", *mixed}


def test_the_layout_must_fit():
    with pytest.raises(ValueError, match="layout must be of the N=8192 tokens of the shape, got 100"):
        measure.tune(SHAPE, SequenceLayout.uniform(1, 100), "cpu")


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_random_selections_are_eligible(slots):
    shape = SHAPE._replace(total_tokens=300, slots=slots, block_size=16)
    layout = SequenceLayout.from_lengths([33, 0, 267])
    selection = measure.random_selection(shape, layout, torch.Generator().manual_seed(0))
    assert (selection.shape, selection.dtype) == ((300, 8, slots), torch.int32)
    own = (layout.positions() // 16)[:, None]
    assert (selection <= own[..., None]).all()
    assert (selection[..., 0] == 0).all()
    for slot in range(1, min(slots, 3)):
        assert (selection[..., slot] == own - (slot - 1)).all()
    if slots > 3:
        assert selection[..., 3:].min() == 0
        assert selection[..., 3:].max() > 8


def test_tiles_are_hashable_and_frozen():
    assert len({TILES, dataclasses.replace(TILES)}) == 1


class Recorder:
    """A kernel that only notes that it was launched."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(self.name)


@pytest.mark.parametrize(
    ("window", "group", "tokens", "kernel"),
    [
        (512, 4, 700, "hopper"),
        (512, 2, 700, "hopper"),
        (512, 1, 700, "other"),
        (0, 4, interval.LEAST_HOPPER_KEYS, "hopper"),
        (0, 1, interval.LEAST_HOPPER_KEYS, "hopper"),
        (0, 4, interval.LEAST_HOPPER_KEYS - 1, "other"),
    ],
)
def test_which_intervals_take_the_forward_kernel_for_hopper(monkeypatch, window, group, tokens, kernel):
    launched = []
    hopper = types.SimpleNamespace(
        FORWARD_ROWS=192,
        FORWARD_OPTIONS={},
        key_descriptors=lambda k, v: (None, None),
        _interval_fwd_hopper_kernel=Recorder("hopper", launched),
    )
    monkeypatch.setattr(interval, "_specialized_kernels", lambda tiles, *tensors: hopper)
    monkeypatch.setattr(interval, "_interval_fwd_kernel", Recorder("other", launched))
    q, k = (torch.empty(tokens, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (group, 1))
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    tiles = tuning.interval_schedule(64, 64, q.dtype, window > 0, 90).forward
    assert tiles.specialized
    interval.launch_interval_fwd(q, k, k, bounds, bounds, interval.IntervalSizes(1, 1, window, 0.1), tiles)
    assert launched == [kernel]


def test_shares_of_a_window_for_hopper():
    # 8,192 tokens of 8 heads in tiles of 128 keys: sums of two shares would take longer than they save.
    assert interval._shares(65 * 8, 1 << 24, True, specialized=True) == 1
    assert interval._shares(65 * 8, 1 << 24, True) == 2


def test_which_groups_and_windows_take_block_scores_for_hopper():
    from flash_sparse_attention.impl.triton.block_scores_hopper import pack_of, serves, stages_of

    def groups(dim: int, *windows: int) -> list[int]:
        return [group for group in range(1, 50) if serves(group, dim, *windows)]

    assert groups(128, 32, 16, 64) == [5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert [pack_of(group, 128, 4) for group in (5, 8, 9, 12, 16, 20, 32, 36)] == [1, 1, 0, 2, 2, 4, 4, 0]
    assert groups(64, 32, 16, 64) == [*range(5, 23), *range(24, 43, 2), 44, 48]
    assert groups(128, 32, 32, 64) == [5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert groups(128, 64, 64, 64) == [5, 6, 7, 8, 10, 12, 14, 16]
    # What a window reaches into is one block at most, and nothing where blocks have one window.
    served = [(64, 64, 64), (64, 16, 64), (80, 16, 64), (16, 8, 64), (32, 8, 32)]
    others = [(128, 64, 64), (96, 16, 64), (8, 4, 64), (48, 24, 72), (48, 16, 48)]
    assert [serves(5, 128, *windows) for windows in (*served, *others)] == [True] * 5 + [False] * 5
    assert [stages_of(group, 64, 4) for group in (5, 18, 20, 22)] == [4, 3, 2, 1]
    assert [serves(5, dim, 64, 64, 64) for dim in (64, 128)] == [False, True]


@pytest.mark.parametrize(
    ("tokens", "sequences", "length", "group", "kernel"),
    [
        (8192, 1, 8192, 5, "hopper"),
        (4096, 1, 8192, 5, "hopper"),
        (4095, 1, 8192, 5, "other"),
        (8192, 1, 8191, 5, "other"),
        (8192, 1, 8192, 4, "other"),
        (12288, 3, 8192, 5, "hopper"),
        (12288, 4, 8192, 5, "other"),
    ],
)
def test_block_scores_for_hopper_are_for_long_sequences(monkeypatch, tokens, sequences, length, group, kernel):
    from flash_sparse_attention.impl.triton import block_scores_hopper

    launched = []
    monkeypatch.setattr(block_scores, "takes_hopper_kernels", lambda tiles, *tensors: tiles.specialized)
    monkeypatch.setattr(block_scores_hopper, "_block_scores_hopper_kernel", Recorder("hopper", launched))
    monkeypatch.setattr(block_scores, "_block_scores_kernel", Recorder("other", launched))
    monkeypatch.setattr(block_scores, "_pick_blocks_kernel", Recorder("pick", launched))
    q = torch.empty(tokens, group, 128, dtype=torch.bfloat16, device="meta")
    k, lse = torch.empty(length // 16, 1, 128, dtype=q.dtype, device="meta"), torch.empty(tokens, group, device="meta")
    bounds = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    tiles = tuning.score_tiles(128, q.dtype, 90)
    block_scores.launch_select_blocks(q, k, lse, bounds, bounds, length, 32, 16, 64, 16, 1, 2, 0.1, tiles)
    assert launched == [kernel, "pick"]


@pytest.mark.parametrize(
    ("dim", "dtype", "capability", "asked"),
    [
        (128, torch.bfloat16, 90, True),
        (64, torch.float16, 90, True),
        (96, torch.bfloat16, 90, False),
        (128, torch.float32, 90, False),
        (128, torch.bfloat16, 80, False),
        (128, torch.bfloat16, 100, False),
    ],
    ids=str,
)
def test_which_heads_and_devices_ask_for_block_scores_for_hopper(dim, dtype, capability, asked):
    assert tuning.score_tiles(dim, dtype, capability).specialized == asked


@pytest.mark.parametrize(("stride", "served"), [(5 * 128, True), (7 * 128, True), (5 * 128 + 8, False)])
def test_block_scores_for_hopper_take_strides_that_a_descriptor_has(monkeypatch, stride, served):
    monkeypatch.setattr(block_scores, "takes_hopper_kernels", lambda tiles, *tensors: tiles.specialized)
    q = torch.empty_strided((8192, 5, 128), (stride, 128, 1), dtype=torch.bfloat16, device="meta")
    k = torch.empty(512, 1, 128, dtype=q.dtype, device="meta")
    taken = block_scores._specialized_kernels(tuning.score_tiles(128, q.dtype, 90), q, k, 32, 16, 64)
    assert (taken is not None) == served


def test_block_scores_of_sequences_without_windows(monkeypatch):
    """The copy engine has no descriptor of nothing."""
    launched = []
    monkeypatch.setattr(block_scores, "takes_hopper_kernels", lambda tiles, *tensors: tiles.specialized)
    monkeypatch.setattr(block_scores, "_block_scores_kernel", Recorder("other", launched))
    monkeypatch.setattr(block_scores, "_pick_blocks_kernel", Recorder("pick", launched))
    q = torch.empty(8192, 5, 128, dtype=torch.bfloat16, device="meta")
    k, lse = torch.empty(0, 1, 128, dtype=q.dtype, device="meta"), torch.empty(8192, 5, device="meta")
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    tiles = tuning.score_tiles(128, q.dtype, 90)
    block_scores.launch_select_blocks(q, k, lse, bounds, bounds, 8192, 16384, 8192, 16384, 16, 1, 2, 0.1, tiles)
    assert launched == ["other", "pick"]
