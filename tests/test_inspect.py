"""`fsa inspect`, the numbers behind it (by hand, on a tiny selection), and the pictures."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flash_sparse_attention import NSAConfig, __version__
from flash_sparse_attention.analysis import (
    Category,
    chosen_distances,
    mean_gates,
    selection_map,
    summarize,
)
from flash_sparse_attention.cli import app
from flash_sparse_attention.impl import IMPLEMENTATIONS, OPERATORS
from flash_sparse_attention.nn import AttentionRecord, LanguageModel, LanguageModelConfig, record_attention
from flash_sparse_attention.plots import gates_figure, save_png, selection_figure
from flash_sparse_attention.selections import load_selections
from flash_sparse_attention.training import END_OF_TEXT, load_model
from flash_sparse_attention.training.checkpoint import CheckpointState, save_checkpoint

NSA = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=8,
    num_selected_blocks=4,
    num_init_blocks=1,
    num_local_blocks=1,
    window_size=16,
    compression="mean",
    branch_kv="shared",
)
FORCED = {"block_size": 2, "num_init_blocks": 1, "num_local_blocks": 1}

# Seven tokens in blocks of 2: 0 0 1 1 2 2 3. Two KV heads; the second one has an index tensor such as only others make.
INDICES = torch.tensor(
    [
        [[0, -1, -1], [0, 0, 0]],
        [[0, -1, -1], [3, 2, 1]],
        [[0, 1, -1], [1, -1, 9]],
        [[0, 1, -1], [-7, 1, 0]],
        [[0, 2, -1], [2, 1, 1]],
        [[0, 1, 2], [-1, -1, -1]],
        [[0, 2, 3], [3, 2, 1]],
    ],
    dtype=torch.int32,
)
F, U, I, L, C = (int(Category[name]) for name in ("FUTURE", "UNUSED", "INIT", "LOCAL", "CHOSEN"))
MAPS = [
    [[I, F, F, F], [I, F, F, F], [I, L, F, F], [I, L, F, F], [I, U, L, F], [I, C, L, F], [I, U, C, L]],
    [[I, F, F, F], [U, F, F, F], [U, L, F, F], [I, L, F, F], [U, C, L, F], [U, U, U, F], [U, C, C, L]],
]


def test_selection_map_by_hand():
    codes = selection_map(INDICES, **FORCED)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == MAPS


def test_without_forced_blocks_all_are_chosen():
    codes = selection_map(INDICES[:, :1], block_size=2, num_init_blocks=0, num_local_blocks=0)
    assert not ((codes == I) | (codes == L)).any()
    assert codes[0, 6].tolist() == [C, U, C, C]


def test_distances_by_hand():
    distances = chosen_distances(torch.tensor(MAPS, dtype=torch.uint8), block_size=2)
    # Head 0: block 1 from token 5 (block 2), block 2 from token 6 (block 3). Head 1: 1, 1 and 2 blocks back.
    torch.testing.assert_close(distances.shares, torch.tensor([[0, 1, 0, 0], [0, 2 / 3, 1 / 3, 0]]).double())
    torch.testing.assert_close(distances.mean, torch.tensor([1, 4 / 3]).double())
    torch.testing.assert_close(distances.per_query, torch.tensor([2 / 7, 3 / 7]).double())


def test_summary_by_hand():
    gates = torch.tensor([[[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]]] * 6 + [[[0.7, 0.5, 0.3], [0.3, 0.3, 0.7]]])
    summary = summarize({"a": AttentionRecord(INDICES, gates), "b": AttentionRecord(INDICES[:1], gates[:1])}, **FORCED)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["a"]["gates"][0] == pytest.approx({"compressed": 0.1, "selected": 0.5, "window": 0.9})
    assert summary["a"]["gates"][1] == pytest.approx({"compressed": 0.9, "selected": 0.9, "window": 0.1})
    assert summary["a"]["chosen"][1]["share_by_distance"] == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert summary["a"]["chosen"][1]["mean_distance"] == pytest.approx(4 / 3)
    nothing = {"per_query": 0.0, "mean_distance": None, "share_by_distance": [0.0]}
    assert summary["b"]["chosen"] == [nothing, nothing]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (INDICES.long(), r"block_indices must be int32 \[N, Hk, T\], got int64"),
        (INDICES[0], r"block_indices must be int32 \[N, Hk, T\], got \[2, 3\]"),
    ],
)
def test_selection_map_refuses(indices, message):
    with pytest.raises(ValueError, match=message):
        selection_map(indices, **FORCED)


def test_gates_need_three_branches():
    with pytest.raises(ValueError, match="branches=3"):
        mean_gates(torch.zeros(4, 2, 2))


def panels(figure):
    """Axes that hold an image, by title."""
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.images}


def test_drawn_map_is_the_selection():
    figure = selection_figure({"layers.0.self_attn": INDICES, "layers.1.self_attn": INDICES.flip(1)}, **FORCED)
    drawn = panels(figure)
    assert list(drawn) == [f"layer {layer}, KV head {head}" for layer in (0, 1) for head in (0, 1)]
    for title, codes in (
        ("layer 0, KV head 0", MAPS[0]),
        ("layer 0, KV head 1", MAPS[1]),
        ("layer 1, KV head 0", MAPS[1]),
    ):
        pixels = np.asarray(drawn[title].images[0].get_array())
        assert pixels.shape == (7, 4, 3)
        # A category has one colour, and a colour one category.
        pairs = {(code, tuple(colour)) for code, colour in zip(np.ravel(codes), pixels.reshape(-1, 3), strict=True)}
        assert len(pairs) == len({code for code, _ in pairs}) == len({colour for _, colour in pairs})


def test_many_queries_share_rows():
    """Of 1,024 queries four share a row; one of the four chooses block 1, whose colour weighs sqrt(1/4)."""
    sizes = {"block_size": 8, "num_init_blocks": 1, "num_local_blocks": 1}
    indices = torch.zeros(1024, 1, 2, dtype=torch.int32)
    indices[::4, 0, 1] = 1
    always = indices[::4].repeat_interleave(4, 0)
    pixels, full = (
        np.asarray(panels(selection_figure({"x": x}, **sizes))["x, KV head 0"].images[0].get_array())
        for x in (indices, always)
    )
    assert pixels.shape == (256, 128, 3)
    np.testing.assert_allclose(pixels[-1, 1], (pixels[-1, 2] + full[-1, 1]) / 2)
    np.testing.assert_allclose(pixels[-1, 0], full[-1, 0])


def test_drawn_gates_are_the_means():
    torch.manual_seed(0)
    gates = {f"layers.{i}.self_attn": torch.rand(50, heads, 3) for i, heads in enumerate((4, 1))}
    drawn = panels(gates_figure(gates))
    for branch, name in enumerate(("compressed", "selected", "window")):
        image = np.ma.filled(drawn[name].images[0].get_array(), np.nan)
        np.testing.assert_allclose(image[0], gates["layers.0.self_attn"][..., branch].mean(0), rtol=1e-6)
        np.testing.assert_allclose(
            image[1], [gates["layers.1.self_attn"][..., branch].mean(), *[np.nan] * 3], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("tokens", "layers", "kv_heads", "heads"), [(1, 1, 1, 1), (5, 3, 2, 4), (300, 1, 1, 8), (300, 2, 9, 36)]
)
def test_pictures_of_any_size(tmp_path, tokens, layers, kv_heads, heads):
    torch.manual_seed(0)
    selections = {f"layers.{i}": torch.randint(-1, 20, (tokens, kv_heads, 3), dtype=torch.int32) for i in range(layers)}
    save_png(
        selection_figure(selections, block_size=16, num_init_blocks=1, num_local_blocks=2), tmp_path / "a" / "s.png"
    )
    save_png(gates_figure({name: torch.rand(tokens, heads, 3).bfloat16() for name in selections}), tmp_path / "g.png")
    for path in (tmp_path / "a" / "s.png", tmp_path / "g.png"):
        check_png(path)


def test_a_picture_of_a_long_text_is_as_small(tmp_path):
    """A map has a few hundred rows and columns, whatever the length."""
    tokens = 40_000
    own = torch.arange(tokens) // 64
    indices = torch.stack([own // 2, own], 1)[:, None].int()
    figure = selection_figure({"x": indices}, block_size=64, num_init_blocks=1, num_local_blocks=2)
    pixels = np.asarray(panels(figure)["x, KV head 0"].images[0].get_array())
    assert max(pixels.shape) <= 256
    save_png(figure, tmp_path / "s.png")
    check_png(tmp_path / "s.png")


def test_pictures_need_layers_of_one_length():
    with pytest.raises(ValueError, match="block_indices must be at least one layer, got none"):
        selection_figure({}, **FORCED)
    with pytest.raises(ValueError, match=r"gates must be of one length .*, got \[3, 4\]"):
        gates_figure({"a": torch.zeros(3, 1, 3), "b": torch.zeros(4, 1, 3)})
    with pytest.raises(ValueError, match=r"gates must be of one length of at least 1 token .*, got \[0\]"):
        gates_figure({"a": torch.zeros(0, 1, 3)})
    with pytest.raises(ValueError, match=r"gates must be .* \[N, Hq, branches=3\], got \[5\]"):
        gates_figure({"a": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"block_indices must be int32 \[N, Hk, T\], got \[5\]"):
        selection_figure({"a": torch.zeros(5, dtype=torch.int32)}, **FORCED)


def check_png(path):
    """A PNG that is neither tiny nor huge, with something in it."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 500 < width < 3000
    assert 400 < height < 3000
    assert len(content) > 5000


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of untrained models: `nsa`, `full`, and `other`, which has other tokens."""
    folder = tmp_path_factory.mktemp("runs")
    for name, attention, vocab_size in (("nsa", "nsa", 257), ("full", "full", 257), ("other", "nsa", 99)):
        torch.manual_seed(0)
        config = LanguageModelConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            attention=attention,
            nsa=NSA,
        )
        model = LanguageModel(config)
        state = CheckpointState(7, {}, config.to_dict(), "", 0, 0.0)
        save_checkpoint(folder / name, state, model, torch.optim.AdamW(model.parameters()), keep_last=1)
    return folder


def run(*arguments):
    """Output of `fsa inspect`; what it raises is raised."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_table_of_implementations():
    shown = run("--device", "cpu", "--dtype", "float64")
    for word in (*OPERATORS, "blockwise", "reference", __version__, torch.__version__, "float64", "triton"):
        assert word in shown
    assert set(IMPLEMENTATIONS) >= {"blockwise", "reference"}


def test_a_checkpoint(runs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 2)
    shown = run(runs / "nsa", "--text", text, "--output", tmp_path / "out", "--max-tokens", 300, "--device", "cpu")
    assert "layer 1" in shown
    assert "step 7" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gates.png", "selection.png", "summary.json"]
    check_png(tmp_path / "out" / "gates.png")
    check_png(tmp_path / "out" / "selection.png")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["tokens"], summary["step"], summary["dtype"]) == (300, 7, "float32")
    assert NSAConfig.from_dict(summary["nsa"]) == NSA
    assert list(summary["layers"]) == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer in summary["layers"].values():
        assert len(layer["gates"]) == 4
        # The start of `reset_gates`.
        assert [value for head in layer["gates"] for value in head.values()] == pytest.approx([1 / 3] * 12)
        assert len(layer["chosen"]) == 2
        for head in layer["chosen"]:
            # Two of four blocks are forced; the first queries see fewer.
            assert 1.5 < head["per_query"] <= 2
            assert sum(head["share_by_distance"]) == pytest.approx(1)
            assert head["share_by_distance"][0] == 0
            assert 1 <= head["mean_distance"] < 300 / 8


def test_a_prompt(runs, tmp_path):
    run(
        runs / "nsa" / "step-00000007",
        "--prompt",
        "ü" * 20,
        "--output",
        tmp_path,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    # 20 letters of 2 bytes, and the mark of the beginning.
    assert (summary["tokens"], summary["dtype"]) == (41, "bfloat16")
    gate = summary["layers"]["layers.0.self_attn"]["gates"][0]["window"]
    assert gate == torch.tensor(1 / 3).bfloat16().item() != torch.tensor(1 / 3).item()


def test_the_shortest_text(runs, tmp_path):
    """Its last token, the 17th, has block 1 to choose between the first and its own."""
    run(runs / "nsa", "--prompt", "x" * 16, "--output", tmp_path, "--device", "cpu")
    layers = json.loads((tmp_path / "summary.json").read_text())["layers"]
    assert [head["per_query"] for layer in layers.values() for head in layer["chosen"]] == [pytest.approx(1 / 17)] * 4


@pytest.mark.parametrize(("options", "layers"), [([], [0, 1]), (["--dump-layers", "1,0-1"], [0, 1]), (["1"], [1])])
def test_the_dumped_selections_are_those_of_the_model(runs, tmp_path, options, layers):
    text = bytes(range(32, 127)) * 3
    (tmp_path / "text.txt").write_bytes(text + b"cut off")
    options = ["--dump-layers", *options] if options == ["1"] else options
    shown = run(
        *(runs / "nsa", "--text", tmp_path / "text.txt", "--max-tokens", len(text) + 1, "--device", "cpu"),
        *("--output", tmp_path / "out", "--no-pictures", "--dump", tmp_path / "new" / "selections", *options),
    )
    assert f"Selections of {len(layers)} layer" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["summary.json"]
    model, _ = load_model(runs / "nsa")
    with record_attention(model) as records, torch.inference_mode():
        model(torch.tensor([END_OF_TEXT, *text]))
    recorded = load_selections(tmp_path / "new" / "selections")
    assert list(recorded.layers) == [f"layers.{i}.self_attn" for i in layers]
    for name, indices in recorded.layers.items():
        assert torch.equal(indices, records[name].block_indices)
    assert recorded.config == NSA
    assert recorded.origin["model"] == model.config.to_dict()
    assert recorded.origin["step"] == 7
    assert recorded.origin["text_sha256"] == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nsa"], r"text must be one of --text FILE and --prompt TEXT, got neither"),
        (["nsa", "--prompt", "a", "--text", "b"], "got both"),
        (["nsa", "--prompt", ""], "text must be a text of at least 16 bytes, .* got an empty one: the first 1 and"),
        (["nsa", "--prompt", "x" * 15], "at least 16 bytes, .* got 15 bytes"),
        (["nsa", "--prompt", "x" * 99, "--max-tokens", "16"], "max_tokens must be at least 17, .* got 16"),
        (["nsa", "--prompt", "x", "--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (["nsa", "--text", "missing.txt"], r"--text must be a file that can be read, got 'missing.txt' \(No such file"),
        (["nsa", "--prompt", "x", "--dtype", "int8"], "dtype must be one of auto, float32, .* got 'int8'"),
        (["nsa", "--prompt", "x", "--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["nsa/none", "--prompt", "x" * 99], "checkpoint must be the directory of a run .* does not exist"),
        (["nsa", "--prompt", "x" * 99, "--dump-layers", "0"], "--dump-layers must be left out without --dump, got '0'"),
        (["nsa", "--prompt", "x" * 99, "--dump", "a", "--dump-layers", "0-2"], "layers of the model, 0 to 1, got 2"),
        (["nsa", "--prompt", "x" * 99, "--dump", "a", "--dump-layers", "one"], "--dump-layers must be numbers and ran"),
        (["full", "--prompt", "x" * 99], "sparse attention, got .*attention='full': full attention selects no blocks"),
        (["other", "--prompt", "x" * 99], "checkpoint must be one of a model of bytes, .* got one of 99 tokens"),
    ],
)
def test_what_is_refused(runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(runs / arguments[0], *arguments[1:])
    assert not list(tmp_path.iterdir())


def test_a_text_needs_a_checkpoint():
    with pytest.raises(ValueError, match="checkpoint must be given for a text to read, got None"):
        run("--prompt", "x")
    with pytest.raises(ValueError, match="checkpoint must be given for --dump, got None"):
        run("--dump", "x")
