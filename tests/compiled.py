"""`torch.compile` for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._dynamo.utils import counters


def graphs_of(function: Callable[..., Tensor], calls: Iterable[tuple[Tensor, ...]]) -> int:
    """Graphs that `torch.compile` makes for such calls one after the other, each of which gives what `function` gives.

    Results and the gradients of all arguments of floating point are compared.
    """

    def value_and_gradients(run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in given]
        out = run(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return [out.detach(), *torch.autograd.grad((out * out.detach()).sum(), wanted)]

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for given in calls:
        for got, expected in zip(
            value_and_gradients(compiled, given), value_and_gradients(function, given), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"]
