"""What every test runs under."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import re
from collections.abc import Iterator
from typing import Any

# cuBLAS is deterministic with a workspace of fixed size only; it reads this when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Workers of xdist share the cores between them."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    # See below; on a GPU some operators have no deterministic variant.
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic implementation:UserWarning")

    if os.environ.get("TRITON_INTERPRET") == "1":
        hasten_the_interpreter()


def hasten_the_interpreter() -> None:
    """Leaves out of Triton's interpreter what it does again and again to no end: half of the time of these tests.

    What it computes, and what of it fails, stays as it is. Other versions of Triton, which do it in another way, are
    left alone.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        look_through_modules_once(interpreter)
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch(interpreter)
    if hasattr(interpreter, "_get_np_dtype"):
        know_dtypes_of_numpy(interpreter)
    # Each sum, difference and product of integers is computed again in 64 bits for an assertion, which is then not made
    # unless kernels are debugged.
    options = getattr(interpreter.interpreter_builder, "options", None)
    if getattr(options, "debug", None) is False and hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def look_through_modules_once(interpreter: Any) -> None:
    """It looks through all that `triton.language` has at each call of a function of a kernel. What there is to be
    replaced does not change, so its names are kept."""
    from triton.language import core

    names: dict[object, list[str]] = {}

    def patch_builtin(package: Any, *rest: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def patch_once_a_launch(interpreter: Any) -> None:
    """It replaces functions of `triton.language` for a launch, and again at each call of a function in it, which adds
    nothing after the first call from a module: only the launch puts them back."""
    patch_lang, done = interpreter._patch_lang, set()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            done.clear()

    def patch(fn: Any) -> Any:
        # The interpreter adds to the globals of a module when it first calls a function of it.
        module = id(fn.__globals__), len(fn.__globals__)
        if module in done:
            return Scope()
        scope = patch_lang(fn)
        done.add(module)
        return scope

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch


def know_dtypes_of_numpy(interpreter: Any) -> None:
    """It makes a table of all dtypes each time that it looks one up."""
    np_dtype, known = interpreter._get_np_dtype, {}

    def look_up(dtype: Any) -> Any:
        # Of blocks their elements'; dtypes are equal where their names are.
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    interpreter._get_np_dtype = look_up


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no worker is left with it at the end: the compilation of kernels, and of
    other tests those that run an operator again and again, for its contract."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        return "test_triton_compile" not in item.nodeid, not re.search("contract|opcheck", item.name)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through it, a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (the largest integer of an integer dtype), so that what is read before it is
    written shows. That is a part of deterministic mode; what else this mode does hardly matters on the CPU."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
