"""`fsa generate`: text from a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from flash_sparse_attention.cli import app
from flash_sparse_attention.nn import LanguageModel
from flash_sparse_attention.training import END_OF_TEXT, train
from training_runs import tiny_config, write_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = tiny_config(write_texts(folder / "texts"), steps=2).replace(model={"attention": "nsa"})
    train(config, folder / "run")
    return folder / "run"


def fsa(*arguments: str):
    return CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)


@pytest.fixture
def speaking(monkeypatch):
    """Makes every model continue any text with these tokens."""

    def install(tokens: list[int], seen: list[list[int]]):
        def forward(self, new, cu_seqlens=None, cache=None, *, last_logits=False):
            seen.append(new.tolist())
            following = tokens[(len(seen) - 1) % len(tokens)]
            return 100 * torch.nn.functional.one_hot(torch.tensor([following]), 257).float()

        monkeypatch.setattr(LanguageModel, "forward", forward)

    return install


def test_continues_a_prompt(run):
    result = fsa(str(run), "--prompt", "red ", "--max-new-tokens", "5", "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout.startswith("red ")
    assert result.stdout.endswith("\n")
    assert "tokens/s" in result.stderr


def test_several_prompts(run):
    result = fsa(str(run), "--prompt", "red ", "--prompt", "a longer one ", "--max-new-tokens", "5", "--greedy")
    first, second = result.stdout.removeprefix("--- 1 of 2\n").split("--- 2 of 2\n")
    for prompt, text in (("red ", first), ("a longer one ", second)):
        assert text == fsa(str(run), "--prompt", prompt, "--max-new-tokens", "5", "--greedy").stdout
    assert "of the prompts), then" in result.stderr


def test_full_attention_has_no_cache(tmp_path):
    config = tiny_config(write_texts(tmp_path / "texts"), steps=1).replace(model={"attention": "full"})
    train(config, tmp_path / "run")
    assert fsa(str(tmp_path / "run"), "--prompt", "red ", "--max-new-tokens", "3").stdout.startswith("red ")


def test_greedy_and_seeds_repeat(run):
    def text(*arguments):
        return fsa(str(run), "--prompt", "blue", "--max-new-tokens", "12", *arguments).stdout_bytes

    assert text("--greedy") == text("--greedy", "--seed", "5") == text("--temperature", "0")
    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")


def test_streams_characters_of_several_bytes(run, speaking, tmp_path):
    seen: list[list[int]] = []
    speaking(list("é€🙂".encode()), seen)
    # The prompt ends within a character, which the model completes.
    (tmp_path / "prompt").write_bytes(b"x" + "é".encode()[:1])
    speaking(["é".encode()[1], *"€🙂".encode()], seen)
    result = fsa(str(run), "--prompt-file", str(tmp_path / "prompt"), "--max-new-tokens", "8")
    assert result.stdout_bytes.decode() == "xé€🙂\n"
    assert seen[0] == [END_OF_TEXT, ord("x"), "é".encode()[0]]
    assert len(seen) == 8


def test_what_is_no_utf8_is_replaced(run, speaking):
    speaking([0xFF, 97], [])
    assert fsa(str(run), "--max-new-tokens", "2").stdout_bytes.decode() == "\ufffda\n"


def test_without_a_prompt_a_document_begins_and_its_end_stops(run, speaking):
    seen: list[list[int]] = []
    speaking([97, END_OF_TEXT, 98], seen)
    result = fsa(str(run))
    assert seen == [[END_OF_TEXT], [97]]
    assert result.stdout == "a\n"
    assert "2 tokens, the end of the text, at" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "0"], "top_p must be"),
        (["--top-p", "1.5"], "top_p must be"),
        (["--greedy", "--temperature", "0.5"], "--temperature must be left out with --greedy"),
        (["--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt-file must be left out with --prompt"),
        (["--prompt-file", "/no/file"], "--prompt-file must be a file that can be read"),
        (["--device", "tpu"], "device must be one of"),
    ],
)
def test_bad_arguments(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        fsa(str(run), *arguments)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="checkpoint must be the directory of a run"):
        fsa(str(tmp_path))


def test_as_a_process_in_a_locale_without_unicode(run):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flash_sparse_attention.cli", "generate", str(run)]
    done = subprocess.run(
        [*command, "--prompt", "ä", "--max-new-tokens", "3"], capture_output=True, env={**os.environ, **plain}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("ä")
    assert done.stderr.count(b"\n") == 1
