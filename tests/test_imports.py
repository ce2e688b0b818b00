"""What importing the package brings along, and which way its imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flash_sparse_attention

ROOT = Path(flash_sparse_attention.__file__).parent
PACKAGE = "flash_sparse_attention"

# What each part may import, besides itself. `impl` stands for its table, `impl.x` for an implementation.
BASE = {"config", "geometry", "precision", "types", "validation"}
ALLOWED = {
    "config": set(),
    "geometry": set(),
    "precision": set(),
    "validation": set(),
    "types": {"geometry", "validation"},
    "impl": {*BASE, "impl.reference", "impl.blockwise", "impl.triton"},
    "impl.reference": BASE,
    "impl.blockwise": BASE,
    "impl.triton": BASE,
    "functional": {*BASE, "impl"},
    # How exactness is judged needs the importances, which are no public operator.
    "accuracy": {*BASE, "impl", "impl.reference", "functional"},
    "nn": {*BASE, "impl", "functional", "cache"},
    "cache": {*BASE, "impl", "functional"},
    "analysis": {*BASE, "nn"},
    "plots": {*BASE, "analysis", "nn"},
    "selections": BASE,
    # Conversion, when it is asked for.
    "training": {*BASE, "impl", "functional", "nn", "integrations", ""},
    "integrations": {*BASE, "impl", "functional", "nn", "cache"},
    "bench": {
        *BASE,
        # The inverted index, inside a function.
        "impl.triton",
        "selections",
        "impl",
        "functional",
        "nn",
        "cache",
        "accuracy",
        "integrations",
        "training",
        "plots",
        "",
    },
    # The kernels' tuning, inside functions.
    "cli": {
        *BASE,
        "impl",
        "impl.triton",
        "functional",
        "nn",
        "accuracy",
        "analysis",
        "plots",
        "selections",
        "training",
        "integrations",
        "bench",
        "",
    },
    # `__init__.py`, which others import for the version.
    "": {"cache", "config", "functional", "geometry", "types"},
}
# Libraries that only these parts may import.
EXCLUSIVE = {
    "triton": {"impl.triton"},
    "transformers": {"integrations", "training"},
    "datasets": {"training"},
    "pyarrow": {"training"},
    "tensorboard": {"training"},
    "typer": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"plots", "training", "bench"},
}


def part_of(module: str) -> str:
    """The part that a module `a.b.c` inside the package belongs to: `impl.reference`, or its first name."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "impl" and len(names) > 1 else names[0]


def imports_of(file: Path) -> tuple[str, list[str]]:
    """The part of a source file, and all that it imports anywhere, absolute names throughout."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    package = parts[:-1]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module or "")
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE, *package[: len(package) - (node.level - 1)], *(node.module or "").split(".")]
            path = [name for name in base if name]
            for alias in node.names:
                # `from . import x` names a module; `from .x import y` names something in one.
                inner = ROOT.joinpath(*path[1:], alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.append(".".join([*path, alias.name] if is_module else path))
    return part_of(".".join(parts)), found


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path):
    part, imported = imports_of(file)
    assert part in ALLOWED, f"say in this test what {part} may import"
    for name in imported:
        library, _, inner = name.partition(".")
        assert part in EXCLUSIVE.get(library, {part}), f"{part} must not import {library}"
        if library == PACKAGE:
            target = part_of(inner)
            assert target == part or target in ALLOWED[part], f"{part} must not import {target}"


def test_the_table_of_imports_has_no_circle():
    order: list[str] = []
    waiting = {part: set(others) for part, others in ALLOWED.items()}
    while waiting:
        ready = [part for part, others in waiting.items() if others <= set(order)]
        assert ready, f"a circle among {sorted(waiting)}"
        order += ready
        for part in ready:
            del waiting[part]


def test_the_checker_sees_what_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "impl").mkdir()
    (tmp_path / "impl" / "reference.py").touch()
    file = tmp_path / "impl" / "blockwise.py"
    file.write_text(
        "from . import reference\nfrom .reference import f\nfrom ..functional import g\nimport triton.language\n"
    )
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    part, imported = imports_of(file)
    assert part == "impl.blockwise"
    assert imported == [f"{PACKAGE}.impl.reference"] * 2 + [f"{PACKAGE}.functional", "triton.language"]


def new_modules(code: str) -> set[str]:
    """Top-level modules that `code` imports beyond what torch does."""
    script = f"""
import sys, torch
before = set(sys.modules)
{code}
print(*{{name.split(".")[0] for name in set(sys.modules) - before}})
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split()) - set(sys.stdlib_module_names)


def test_the_package_imports_nothing_but_torch_and_asks_nothing_of_a_device():
    code = f"""
import {PACKAGE}
assert not torch.cuda.is_initialized()
assert not any(name.startswith("{PACKAGE}.impl.") for name in sys.modules), "implementations come when they are used"
"""
    assert new_modules(code) == {PACKAGE}


def test_the_layers_need_no_command_line():
    assert new_modules(f"import {PACKAGE}.nn, {PACKAGE}.accuracy, {PACKAGE}.selections") == {PACKAGE}
