"""What every test runs under."""

from __future__ import annotations

import inspect
import os
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
    """Triton's interpreter looks through all that `triton.language` has at each call of a function of a kernel: a tenth
    of the time of these tests. What there is to be replaced does not change, so its names are kept."""
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    if not (hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr")):
        # A version of Triton that does it in another way.
        return
    names: dict[object, list[str]] = {}

    def patch_builtin(package: Any, *rest: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest, the compilation of kernels, comes first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: "test_triton_compile" not in item.nodeid)


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
