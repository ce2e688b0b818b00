"""`fsa bench report`: the page, the tables and figures of documents, and that nothing is stale."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench_runs import attention_rows, cpu_run, everything, model_rows, operator_rows, row, run, timing
from flash_sparse_attention import cli
from flash_sparse_attention.bench import documents, figures, text
from flash_sparse_attention.bench.report import page
from flash_sparse_attention.bench.results import Timing
from flash_sparse_attention.bench.sources import read

ROOT = Path(__file__).parent.parent
RESULTS = sorted(ROOT.glob("benchmarks/results/*/bench*.json"))
REPEATS = ROOT / "benchmarks" / "results" / "*" / "repeat*.json"
PAGE, PLOTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"


@pytest.fixture
def files(tmp_path):
    """Results of two devices, where they would be in a repository."""
    found = [tmp_path / "results" / device / "bench.json" for device in ("h200", "cpu")]
    for report, file in zip((everything(), cpu_run()), found, strict=True):
        report.save(file)
    return found


def devices(tmp_path, *reports):
    found = []
    for number, report in enumerate(reports):
        found.append(tmp_path / f"bench-{number}.json")
        report.save(found[-1])
    return read(found)


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["bench", "report", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.exception if isinstance(result.exception, ValueError) else result.output


def section(content, heading):
    """What stands under a heading, up to the next one."""
    return content.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (1.2, "1.20"),
        (9.996, "10.0"),
        (59.33, "59.3"),
        (99.96, "100"),
        (1234.0, "1,230"),
        (-2.5, "-2.50"),
        (1.5e-7, "1.50e-07"),
        (None, ""),
        (math.nan, ""),
        (math.inf, ""),
        ("fast", ""),
    ],
)
def test_three_digits(value, shown):
    assert text.digits(value) == shown


def test_units():
    assert [text.duration(ms) for ms in (0.0664, 0.0999, 0.1, 20.66, 999.0, 2658.0, math.nan)] == [
        *("66.4 us", "99.9 us", "0.100 ms", "20.7 ms", "999 ms", "2.66 s", "")
    ]
    # Quartiles have the unit of the median.
    assert text.duration(0.0995, 0.0985, 0.1009) == "99.5 us (98.5 to 101)"
    assert [text.size(count) for count in (12, 2048, 3 * 2**20, 4.9 * 2**30, None)] == [
        *("12.0 B", "2.00 KiB", "3.00 MiB", "4.90 GiB", "")
    ]
    assert (text.share(0.3415), text.share(math.nan)) == ("34.2 %", "")


def test_a_loss_is_never_rounded_away():
    assert [text.ratio(value) for value in (0.9996, 0.99999, 1.0, 1.0004, 0.497, None)] == [
        *("0.999x", "0.999x", "1.00x", "1.00x", "0.497x", "")
    ]


def test_tables_leave_out_what_is_empty_and_cannot_be_broken_by_a_text():
    assert text.table(["a", "b", "c"], [["1", "", "x|y"], ["2", "", "two\nlines <b>"]]) == (
        "| a | c |\n| --- | --- |\n| 1 | x\\|y |\n| 2 | two lines &lt;b> |\n"
    )


def test_shapes_in_words():
    shapes = [row("x", "forward", "triton", 1.0, tokens=tokens, slots=16).shape for tokens in (65536, 8192)]
    same, varying = text.common(shapes)
    assert text.in_words(same) == "32/8 heads of 128, 16 slots, bfloat16"
    assert varying == ["tokens"]
    assert sorted(shapes, key=text.order) == shapes[::-1]
    assert text.labels({"head_dim_v": 64, "head_dim": 128}) == {"head dim": "128/64"}
    assert (
        text.in_words(text.labels({"batch": 16, "new_tokens": 1, "odd_size": 3})) == "batch 16, 1 new token, odd size 3"
    )


def test_page(files, tmp_path):
    content = page(read(files), tmp_path / "docs" / "benchmarks.md")
    assert content.index("## NVIDIA H200\n") < content.index("## AMD EPYC\n")
    for piece in (
        "fsa bench report \\\n    results/cpu/bench.json \\\n    results/h200/bench.json \\\n"
        "    --output docs/benchmarks.md\n",
        "- [NVIDIA H200](#nvidia-h200)\n",
        "| driver | 580.1 |\n",
        "| baselines | flash-attn 2.8.3 |\n",
        "- [bench.json](../results/h200/bench.json), of 2026-11-01T10:00:00: `fsa bench --suite operators`\n",
        "| operators | 1980 | 3201 | 612 | 55 |\n",
        "| bench.json | 4.00 TB/s | bfloat16 800 TFLOP/s |\n",
        "The roofline was not measured.\n",
        "All with 32/8 heads of 128, blocks of 64, 16 slots, bfloat16.\n",
        "| tokens | direction | variant | time | TFLOP/s | TB/s | roofline "
        "| over query_outer | over full attention, cudnn | over full attention, flash | error |\n",
        # 1.7e7 * 65536 FLOP in 8 ms, of 800 TFLOP/s; 2e5 * 65536 bytes moved.
        "| 65,536 | forward | **kv_outer** | 8.00 ms (7.92 to 8.08) | 139 | 1.64 | 17.4 % "
        "| 1.25x | 6.50x | 13.0x | 25.0 % |\n",
        "| 65,536 | forward | query_outer [1] | 10.0 ms (9.90 to 10.1) |",
        "- [1] a note\n",
        "The first call of ours, with what was not compiled before, took 1.50 s.\n",
        "| 65,536 | both | **triton** | 768 MiB | 2.44 GiB | 512 MiB | 4.88 GiB |\n",
        "4 rows checked on the shapes that were timed. All within what is allowed.",
        "| selected attention | kv_outer | backward | 2 | 50.0 % | dq |",
        "| flash-attn | forward | 65,536 tokens, 32/8 heads of 128, bfloat16 | not installed |\n",
        "- L2 is flushed before every run.\n",
    ):
        assert piece in content, piece


def test_where_we_lose(tmp_path):
    losing = page(devices(tmp_path, run(operator_rows())))
    lost = section(losing, "### Where we lose")
    assert "In 2 of 12 comparable pairs the baseline is faster" in lost
    assert (
        "| selected attention | backward | kv_outer "
        "| 8,192 tokens, 32/8 heads of 128, blocks of 64, 16 slots, bfloat16 "
        "| full attention, cudnn | 1.76 ms | 0.880 ms | 0.500x |\n"
    ) in lost
    assert "65,536" not in lost
    # Ours was skipped where full attention ran.
    assert "| selected attention | forward | kv_outer | 1,000,000 tokens" in lost
    assert "| cudnn | out of memory |" in lost


def test_where_we_do_not_lose(tmp_path):
    rows = [row("combine", "forward", variant, ms, ours=ms < 2) for variant, ms in (("triton", 1.0), ("torch", 3.0))]
    assert "Nowhere: in none of 1 comparable pair is the baseline faster." in page(devices(tmp_path, run(rows)))
    assert "Nothing here is comparable" in page(devices(tmp_path, run(rows[:1])))


def test_losses_come_largest_first_and_say_when_they_are_within_the_spread(tmp_path):
    times = {"near": 0.9996, "far": 0.25}
    rows = [row("combine", "forward", "triton", 1.0)]
    rows += [row("combine", "forward", name, ms, ours=False) for name, ms in times.items()]
    lost = section(page(devices(tmp_path, run(rows))), "### Where we lose")
    assert lost.index("0.250x |") < lost.index("0.999x, within the spread |")


def test_failed_checks_are_said_plainly(tmp_path):
    rows = [
        row("combine", "forward", "triton", 1.0, tokens=tokens, check={"out": error, "lse": 0.5})
        for tokens, error in ((1, 0.25), (2, 1.5), (3, math.nan))
    ]
    checks = section(page(devices(tmp_path, run(rows))), "### Checks")
    assert "3 rows checked on the shapes that were timed. **2 rows too far off:**" in checks
    assert (
        "- operators: combine, forward, triton, 2 tokens, 32/8 heads of 128, bfloat16: out 1.50, lse 0.500\n" in checks
    )
    assert "| combine | triton | forward | 3 | no number | out | 3 tokens" in checks


def test_absent_and_broken_numbers(tmp_path):
    """They are left out, or said to be none; nothing raises."""
    rows = [
        row("combine", "forward", "triton", 1.0, flops=math.nan, bytes=None, memory={"peak": 0}, compile_s=math.nan),
        dataclasses.replace(row("compress", "forward", "triton", 1.0), ms=timing(math.nan)),
        dataclasses.replace(row("compress", "forward", "torch", 1.0), ms=timing(0.0)),
        row("compress", "backward", "triton", None),
        row("model", "step", "triton", 1.0, suite="unheard of"),
    ]
    bare = dataclasses.replace(run(rows), environment={})
    (device,) = found = devices(tmp_path, bare)
    content = page(found)
    assert "## unknown device" in content
    assert "its time is no number above 0: nan" in content
    assert "its time is no number above 0: 0.0" in content
    assert "nan |" not in content.replace("above 0: nan |", "")
    assert "Suite unheard of" in content
    assert figures.plots(device) == []
    assert "## NVIDIA H200" in page(devices(tmp_path, run([])))


def test_the_order_of_files_does_not_matter_and_the_later_row_counts(tmp_path):
    full = row("full attention", "forward", "cudnn", 8.0, tokens=64)
    runs = [
        run([row("combine", "forward", "triton", ms, tokens=64), *more], date=f"2026-11-0{day}", commit=f"c{day}")
        for day, ms, more in ((1, 4.0, [full]), (2, 2.0, []))
    ]
    content = page(devices(tmp_path, *runs))
    assert "| 64 | forward" not in content
    assert "2.00 ms (1.98 to 2.02)" in content
    assert "4.00 ms" not in content
    # The baseline is of another run.
    assert "Nothing here is comparable" in content
    assert "| commit | c1 (bench-0.json); c2 (bench-1.json) |" in content
    files = sorted(tmp_path.glob("*.json"))
    assert page(read(files[::-1])) == content
    # The date counts, not the name.
    content = page(devices(tmp_path, *runs[::-1]))
    assert "2.00 ms (1.98 to 2.02)" in content
    assert "4.00 ms" not in content


DOCUMENT = """\
# Name
<!-- bench:attention heads=32 direction="forward|backward" -->
by hand
<!-- /bench -->

It is <!-- bench:value of=gain suite=attention direction=forward tokens=65536 heads=32 -->9x<!-- /bench --> here,
and `<!-- bench:x -->`.

<!--bench:cpu-->
<!--/bench-->
```html
<!-- bench:nothing -->
```
"""


def test_documents(files, tmp_path):
    document = tmp_path / "docs" / "page.md"
    document.parent.mkdir()
    document.write_text(DOCUMENT)
    found = read(files)
    content = documents.filled(document, found)
    assert (
        '<!-- bench:attention heads=32 direction="forward|backward" -->\n\n'
        "| tokens | forward | gain | backward | gain | peak memory |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 8,192 | 2.50 ms | 0.312x | 4.38 ms | 0.312x | 625 MiB |\n"
    ) in content
    assert (
        "| 65,536 | 20.0 ms | 2.50x | 35.0 ms | 2.50x | 4.88 GiB |\n\n"
        "NVIDIA H200 (torch 2.11.0, triton 3.6.0, commit abc1234): 32/8 heads of 128, window of 512, bfloat16. "
        "Times are medians. A gain is over full attention (cudnn) in the same run. Numbers: "
        "[bench.json](../results/h200/bench.json).\n\n<!-- /bench -->\n"
    ) in content
    assert "heads=32 -->2.50x<!-- /bench --> here,\nand `<!-- bench:x -->`.\n" in content
    assert "| 8,192 | 1.64 s | 1.25x |\n" in content
    assert content.endswith("```html\n<!-- bench:nothing -->\n```\n")
    document.write_text(content)
    assert documents.filled(document, found) == content


@pytest.mark.parametrize(
    ("marker", "pieces"),
    [
        ("selected", ["| 65,536 | 8.00 ms | 6.50x | 16.0 ms | 6.50x |", "blocks of 64, 16 slots"]),
        ("selected over=query_outer tokens=65536", ["| 8.00 ms | 1.25x | 16.0 ms | 1.25x |", "is over query_outer in"]),
        (
            "selected over=fastest",
            ["| 65,536 | 8.00 ms | 1.25x", "cudnn and query_outer", "the fastest of them for each row"],
        ),
        ("selected over=flash", ["| 65,536 | 8.00 ms | 13.0x |", "full attention (flash)"]),
        (
            "selected over=flash|query_outer mean=yes",
            [
                "| tokens | forward | gain over flash | gain over query_outer | backward |",
                "| 65,536 | 8.00 ms | 13.0x | 1.25x | 16.0 ms |",
                "| mean |  | 7.00x | 1.25x |  |",
                "Gains are over these in the same run.",
            ],
        ),
        (
            "decode",
            [
                "| tokens | decode attention | gain | decode step | gain |",
                "| 8,192 | 66.0 us | 2.02x | 81.0 us | 1.64x |",
            ],
        ),
        (
            "model device=h200",
            ["| tokens | training step | gain | prefill | gain |", "| 65,536 | 197 ms | 4.00x | 65.5 ms | 4.00x |"],
        ),
        ("attention tokens=65536", ["| heads | forward |", "| 64/4 | 44.8 ms | 2.57x | 67.2 ms | 2.57x |"]),
        ("cpu", ["| tokens | both | gain |", "AMD EPYC (torch 2.13.0, commit abc1234)"]),
    ],
)
def test_tables(marker, pieces, files, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"<!-- bench:{marker} -->\n<!-- /bench -->\n")
    content = documents.filled(document, read(files))
    for piece in pieces:
        assert piece in content, content


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ('operator="selected attention" direction=forward tokens=65536', "8.00 ms"),
        ('operator="selected attention" direction=forward tokens=65536 of=gain over=flash', "13.0x"),
        ('operator="selected attention" direction=forward tokens=65536 of=tflop_per_s', "139 TFLOP/s"),
        ('operator="selected attention" direction=forward tokens=65536 of=tb_per_s', "1.64 TB/s"),
        ('operator="selected attention" direction=forward tokens=65536 of=roofline', "17.4 %"),
        ('operator="selected attention" direction=forward tokens=65536 of=error', "25.0 %"),
        ('operator="selected attention" direction=forward tokens=65536 of=spread', "2.00 %"),
        ("suite=operators variant=flash direction=forward tokens=8192", "0.880 ms"),
        ('operator="whole attention" tokens=65536 heads=32 of=peak', "4.88 GiB"),
        ("device=epyc tokens=8192", "1.64 s"),
    ],
)
def test_values(options, shown, files, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"a <!-- bench:value {options} --><!-- /bench --> b\n")
    assert f"-->{shown}<!--" in documents.filled(document, read(files))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "<!-- bench:atention -->\n<!-- /bench -->",
            "line 1, bench:atention: there is no such table; there are attention,",
        ),
        ("\n<!-- bench:cpu -->\n", "bench:cpu, the last one, has no end"),
        ("<!-- bench:cpu -->\n<!-- bench:model -->\n<!-- /bench -->", "line 2: bench:cpu before this has no end"),
        ("<!-- /bench -->", "line 1: <!-- /bench --> ends what has no beginning"),
        ("<!-- bench:cpu tokens -->\n<!-- /bench -->", "options are name=value"),
        ("<!-- bench:cpu tokens='1 -->\n<!-- /bench -->", "No closing quotation"),
        ("<!-- bench:cpu tokens=1 -->\n<!-- /bench -->", "no row has tokens=1; .* it is 4096 and 8192"),
        ("<!-- bench:cpu colour=red -->\n<!-- /bench -->", "no row has colour=red; .* none has it"),
        ("<!-- bench:model device=B300 -->\n<!-- /bench -->", "no device 'B300'; there are NVIDIA H200"),
        ("<!-- bench:selected over=cuddn -->\n<!-- /bench -->", "no baseline 'cuddn'; these rows have .*cudnn"),
        ("<!-- bench:selected over=flash|cuddn -->\n<!-- /bench -->", "no baseline 'cuddn'; these rows have .*cudnn"),
        ("<!-- bench:selected mean=no|yes -->\n<!-- /bench -->", "mean is yes or no, got 'no[|]yes'"),
        ("<!-- bench:model device=epyc -->\n<!-- /bench -->", "no device 'epyc'; there are NVIDIA H200"),
        (
            "a <!-- bench:value suite=attention tokens=65536 heads=32 -->x<!-- /bench -->",
            r"3 rows fit, .* direction \(for",
        ),
        ("a <!-- bench:value device=epyc tokens=8192 of=joules -->x<!-- /bench -->", "no such row has 'joules'"),
        ("a <!-- bench:value device=epyc tokens=8192 of=gain over=x -->x<!-- /bench -->", "has 'gain' over 'x'"),
        (" <!-- bench:value device=epyc tokens=8192 -->x<!-- /bench -->", "must not be the first on its line"),
    ],
)
def test_errors_leave_all_files_alone(content, message, files, tmp_path):
    broken, good, output = (tmp_path / name for name in ("broken.md", "good.md", "page.md"))
    broken.write_text(content)
    good.write_text("<!-- bench:cpu -->\n<!-- /bench -->")
    error = invoke(*files, "--readme", good, "--readme", broken, "--output", output, code=1)
    with pytest.raises(ValueError, match=message):
        raise error
    assert broken.read_text() == content
    assert good.read_text() == "<!-- bench:cpu -->\n<!-- /bench -->"
    assert not output.exists()


def test_a_table_of_two_devices_or_variants_must_say_which(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- bench:model -->\n<!-- /bench -->")
    two = devices(tmp_path, run(model_rows()), run(model_rows(), device="NVIDIA B300"))
    with pytest.raises(ValueError, match="there are rows of NVIDIA B300 and NVIDIA H200: choose with device="):
        documents.filled(document, two)
    recomputed = [dataclasses.replace(row, variant="recompute") for row in model_rows() if row.ours]
    with pytest.raises(ValueError, match="rows of triton and recompute: choose with variant="):
        documents.filled(document, devices(tmp_path, run([*model_rows(), *recomputed])))


def test_the_command_line_says_what_is_wrong_as_it_stands(files, tmp_path, monkeypatch, capsys):
    """In one line, with exit code 2; `:x:` is no picture."""
    (tmp_path / "README.md").write_text("<!-- bench:x -->\n<!-- /bench -->")
    arguments = ["fsa", "bench", "report", *map(str, files), "--readme", str(tmp_path / "README.md")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "line 1, bench:x: there is no such table" in capsys.readouterr().err


def test_line_ends_stay(files, tmp_path):
    document = tmp_path / "README.md"
    document.write_bytes(b"a\r\n<!-- bench:cpu -->\r\n<!-- /bench -->\r\n")
    invoke(*files, "--readme", document)
    content = document.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 6
    assert "unchanged" in invoke(*files, "--readme", document)


def test_command(files, tmp_path):
    readme, output = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    readme.write_text(DOCUMENT)
    arguments = [*files, "--output", output, "--readme", readme]
    assert f"{output}: missing" in invoke(*arguments, "--check", code=1)
    assert readme.read_text() == DOCUMENT
    shown = invoke(*arguments)
    assert f"{output}: written" in shown
    assert f"{readme}: written" in shown
    assert invoke(*arguments).count("unchanged") == 2
    assert "All is as the results have it." in invoke(*arguments, "--check")
    readme.write_text(readme.read_text().replace("2.50x<", "2.51x<"))
    assert f"{readme}: not what the results give" in invoke(*arguments, "--check", code=1)
    assert "2.51x<" in readme.read_text()
    assert invoke(*files).startswith("# Benchmarks\n")


def test_options_that_make_no_sense(files, tmp_path):
    with pytest.raises(ValueError, match="--svg must be with --plots"):
        raise invoke(*files, "--svg", code=1)
    with pytest.raises(ValueError, match="--check must be with"):
        raise invoke(*files, "--check", code=1)
    (tmp_path / "a.md").touch()
    with pytest.raises(ValueError, match="--readme must be another file"):
        raise invoke(*files, "--readme", tmp_path / "a.md", "--output", tmp_path / "a.md", code=1)
    with pytest.raises(ValueError, match="at least one result"):
        read([])


def test_pictures(tmp_path):
    everything().save(tmp_path / "bench.json")
    folder, names = tmp_path / "pictures", ["length", "groups", "roofline", "memory", "decode", "models"]
    (device,) = read([tmp_path / "bench.json"])
    plots = figures.plots(device)
    assert [plot.name for plot in plots] == [f"nvidia-h200-{name}" for name in names]
    output = tmp_path / "page.md"
    invoke(tmp_path / "bench.json", "--output", output, "--plots", folder)
    assert {path.name for path in folder.iterdir()} == {f"{plot.name}.png" for plot in plots}
    for plot in plots:
        assert f"![{plot.caption}](pictures/{plot.name}.png)" in output.read_text()
    arguments = [tmp_path / "bench.json", "--output", output, "--plots", folder, "--check"]
    invoke(*arguments)
    (folder / "nvidia-h200-length.png").unlink()
    assert "nvidia-h200-length.png: missing" in invoke(*arguments, code=1)


def test_equal_results_are_equal_pictures(tmp_path):
    (device,) = devices(tmp_path, run([*operator_rows(), *attention_rows()]))
    for plot in figures.plots(device)[1:3]:
        first = [path.read_bytes() for path in figures.save(plot, tmp_path / "first", svg=True)]
        assert first == [path.read_bytes() for path in figures.save(plot, tmp_path / "second", svg=True)]
        assert first[0].startswith(b"\x89PNG")
        assert b"<svg" in first[1]
        for trace in (b"Matplotlib", b"Software", b"<dc:date>", b"<dc:title>Matplotlib"):
            assert trace not in first[0]
        assert b"<dc:date>" not in first[1]


@pytest.mark.parametrize("kept", ["whole attention", "selected attention", "decode attention"])
def test_pictures_that_there_are_no_rows_for_are_left_out(kept, tmp_path):
    rows = [row for row in everything().rows if row.operator in (kept, "full attention")]
    (device,) = devices(tmp_path, run(rows))
    names = [plot.name.removeprefix("nvidia-h200-") for plot in figures.plots(device)]
    assert (
        names
        == {
            "whole attention": ["length", "groups", "memory"],
            "selected attention": ["roofline"],
            "decode attention": ["decode"],
        }[kept]
    )


def test_this_repository_says_what_its_results_give():
    """Results, page and pictures, and what stands between comments in all documents; nothing while there are none."""
    if not RESULTS:
        return
    found = read(RESULTS, ROOT.glob("benchmarks/results/*/repeat*.json"))
    plots = {device.name: figures.plots(device) for device in found}
    assert PAGE.read_text(encoding="utf-8") == page(found, PAGE, plots, PLOTS, repeats=REPEATS)
    for plot in [plot for each in plots.values() for plot in each]:
        assert (PLOTS / f"{plot.name}.png").exists()
    for document in {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {PAGE}:
        assert documents.filled(document, found) == document.read_text(encoding="utf-8"), document.name


@pytest.fixture
def second(files, tmp_path):
    """A second run of the first device, a month later: full attention by cudnn takes 4 % longer, one row 2 %."""
    change = {"cudnn": 1.04, "query_outer": 1.02}
    rows = [
        row if row.ms is None else dataclasses.replace(row, ms=timing(row.ms.median * change.get(row.variant, 1.0)))
        for row in operator_rows()
    ]
    report = run(rows, commit="def5678")
    path = tmp_path / "results" / "h200" / "repeat_operators.json"
    dataclasses.replace(report, roofline=dataclasses.replace(report.roofline, copy_tb_per_s=1.0)).save(path)
    return path


def test_second_runs_are_held_against_the_first(files, second, tmp_path):
    readme, output = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    readme.write_text(
        "of two runs <!-- bench:repeats total=yes -->x<!-- /bench --> agree\n\n"
        "<!-- bench:repeats -->\n<!-- /bench -->\n"
    )
    pattern = tmp_path / "results" / "*" / "repeat*.json"
    invoke(*files, "--repeats", pattern, "--readme", readme, "--output", output)
    # Both loop orders and flash agree at both lengths and in both directions; the five of cudnn do not.
    line = "| run | other run | commit | products | within 3 % | most | of |"
    row = "| abc1234 and def5678 | +0.0 % | 12 of 17 | 4.0 % | operators: full attention, forward, cudnn, 8,192 tokens"
    assert section(output.read_text(), "### Two runs").count("repeat_operators.json") == 2
    for piece in (line, row, "[repeat_operators.json](../results/h200/repeat_operators.json)"):
        assert piece in output.read_text(), piece
    assert "--repeats 'results/*/repeat*.json' \\\n    --output docs/page.md" in output.read_text()
    # In words, only what ran at the same commit.
    assert "of two runs <!-- bench:repeats total=yes -->0 of 0<!-- /bench --> agree" in readme.read_text()
    assert row in readme.read_text()
    invoke(*files, "--repeats", second, "--readme", readme, "--check")
    # It gives no time to the page, but for these.
    assert "def5678" not in section(output.read_text(), "### Environment")


def test_second_runs_of_nothing(files, second, tmp_path):
    error = invoke(*files, "--repeats", tmp_path / "no*.json", code=1)
    assert "--repeats must be the name of a file, or a pattern that files have" in str(error)
    other = tmp_path / "other.json"
    run([row("compress", "forward", "triton", 3.0)]).save(other)
    error = invoke(*files, "--repeats", other, code=1)
    assert "--repeats must be second runs of what is in the results" in str(error)
    assert "other.json" in str(error)
    error = invoke(*files, second, "--repeats", second, code=1)
    assert "--repeats must be other files than FILE" in str(error)
    assert "Two runs" not in page(read(files))
    short = tmp_path / "short.json"
    run([row("combine", "forward", "triton", 0.06, tokens=65536, bytes=1.5e8)]).save(short)
    assert "No row of two runs is long enough." in page(read(files, [short]))


def test_second_runs_of_one_commit_files_that_share_rows_and_what_was_lost(tmp_path):
    """Each row counts once, with the file that has the newest; one that had a time and is skipped does not agree."""
    names = ("kv_outer", "query_outer", "cudnn")
    old = [row("combine", "forward", name, 1.0, tokens=64) for name in names]
    new = [row("combine", "forward", "kv_outer", 2.0, tokens=64)]
    found = [tmp_path / name for name in ("bench_old.json", "bench_new.json", "repeat.json", "[of] elsewhere.json")]
    run(old, date="2026-11-01").save(found[0])
    run(new, date="2026-11-02").save(found[1])
    again = [row("combine", "forward", "kv_outer", 2.02, tokens=64), *old[1:]]
    run(again, date="2026-11-03").save(found[2])
    run([row("compress", "forward", "triton", 1.0)], date="2026-11-03").save(found[3])
    document = tmp_path / "README.md"
    document.write_text("ran: <!-- bench:repeats total=yes -->x<!-- /bench -->")
    devices = read(found[:2], found[2:])
    assert ">3 of 3<" in documents.filled(document, devices)
    shown = section(page(devices), "### Two runs")
    for name, rows, most in (("bench_new", 1, "1.0"), ("bench_old", 2, "0.0")):
        files = f"[{name}.json]({name}.json) | [repeat.json](repeat.json)"
        assert f"{files} | abc1234 | +0.0 % | {rows} of {rows} | {most} % |" in shown
    assert "elsewhere" not in shown
    lost = dataclasses.replace(again[0], ms=None, skipped="too large")
    run([lost, *old[1:]], date="2026-11-03").save(found[2])
    assert ">2 of 3<" in documents.filled(document, read(found[:2], [found[2]]))
    invoke(found[0], "--repeats", found[2], "--readme", document)
    assert ">2 of 3<" in document.read_text()
    assert "2 of 3, 1 skipped" in page(read(found[:1], [found[2]]))
    shutil.copy(found[0], found[3])
    invoke(found[0], "--repeats", found[3], "--readme", document)
    assert ">3 of 3<" in document.read_text()


def test_means_are_of_what_all_lines_have(files, tmp_path):
    document = tmp_path / "README.md"
    document.write_text("<!-- bench:selected over=flash|cudnn mean=yes tokens=65536 -->\n<!-- /bench -->\n")
    assert "mean" not in documents.filled(document, read(files)).split("-->", 1)[1]
    rows = [one for one in operator_rows() if (one.variant, one.shape["tokens"]) != ("flash", 8192)]
    document.write_text("<!-- bench:selected over=flash|cudnn mean=yes -->\n<!-- /bench -->\n")
    filled = documents.filled(document, devices(tmp_path, run(rows)))
    # 0.5x and 6.5x over cudnn; flash has one time alone.
    assert "| mean |  |  | 3.50x |  |  | 3.50x |" in filled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a <!-- bench:repeats total=1 -->x<!-- /bench -->", "total is yes or no"),
        ("a <!-- bench:repeats tokens=1 -->x<!-- /bench -->", "takes device= and total= alone, got tokens"),
        ("a <!-- bench:repeats device=epyc -->x<!-- /bench -->", "no second run"),
        ("<!-- bench:repeats total=yes -->x<!-- /bench -->", "must not be the first on its line"),
    ],
)
def test_errors_of_second_runs(content, message, files, second, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(content)
    with pytest.raises(ValueError, match=message):
        documents.filled(document, read(files, [second]))


def test_rows_that_vary_within_a_run_are_counted(tmp_path):
    def varying(name, ms, spread):
        times = Timing(ms, ms * (1 - spread / 2), ms * (1 + spread / 2), 5)
        return dataclasses.replace(row("combine", "forward", name, ms, tokens=64), ms=times)

    rows = [varying("steady", 1.0, 0.01), varying("short", 0.1, 0.5), varying("shaky", 2.0, 0.08)]
    found = page(devices(tmp_path, run(rows)))
    assert (
        "Of 2 rows above 0.2 ms, 1 have quartiles that lie more than 3.00 % of the median apart, at most 8.00 %"
        in found
    )
    assert "(combine, shaky, forward, 64 tokens" in found
    assert "quartiles that lie" not in page(devices(tmp_path / "b", run(rows[:2])))
