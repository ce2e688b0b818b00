"""How exactness is judged: by budgets against float64, with plain PyTorch as the measure.

Every tensor is computed three times from the same inputs, which are rounded to the dtype of the case:

    exact   impl "reference" on float64 copies of the inputs
    plain   impl "reference" on the inputs, with the rounding points of a kernel: scores and softmax in float32, P
            rounded before it meets V, and a backward pass that starts from the output as it was stored
    got     the implementation in question

and `got` may be at most twice as far from `exact` as `plain` is, in the largest error and in the mean error alike, for
outputs, lse and every gradient (under random upstream gradients, lse included). Where a query sees no key, lse must be
-inf, and output and gradient must be 0, exactly. A NaN never passes. Selections are compared by the importance of what
they keep, as blocks that nearly tie may go either way; what is forced and the form of the selection must be exact.

`judge` does this for a `Case`, over every operator; `QUICK` and `FULL` are grids of cases. `fsa verify` and the tests
run them, and benchmarks judge the shapes that they time.

The budget is that of the tests of flash-attn. A tolerance would be too loose somewhere, and an RMS ratio is blind to a
few wrong rows.
"""

from .budgets import Errors, compare, compare_selection
from .cases import FLAVOURS, FULL, QUICK, Case
from .verdicts import Row, implementations, judge

__all__ = [
    "FLAVOURS",
    "FULL",
    "QUICK",
    "Case",
    "Errors",
    "Row",
    "compare",
    "compare_selection",
    "implementations",
    "judge",
]
