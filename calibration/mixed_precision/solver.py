"""The exact choice of one width for each weight: least error within a budget, by integer programming.

With ``x[i, j] = 1`` where weight ``i`` has its ``j``-th width:

    minimise  sum error[i, j] x[i, j]   subject to   sum_j x[i, j] = 1,   sum cost[i, j] x[i, j] <= budget
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from quantizers.errors import UsageError

Array = npt.NDArray[np.float64]
Choice = tuple[int, ...]

#: The solver stops at an absolute gap of 1e-6: the largest error is scaled to this, so that the gap is none.
_LARGEST_ERROR = 1e6
#: Costs that are no whole numbers are rounded up to such a share of the largest sum.
_RESOLUTION = 1e-6
#: Of a quotient of two float64.
_ROUNDING = 1e-12


def choose_widths(error: Array, cost: Array, budget: float, what: str = "the cost") -> Choice:
    """Return the widths with the least error whose cost is within a budget.

    Args:
        error: float64 (weights, widths), not negative.
        cost: float64 (weights, widths), not negative.
        budget: what the costs may sum to.
        what: what the costs are, for messages.

    Returns:
        The column of each weight.

    Raises:
        UsageError: no choice is within the budget; says what the least is.
    """
    least = float(cost.min(1).sum())
    if least > budget:
        raise UsageError(f"{what} cannot be {budget:g}: the least that these widths reach is {least:g}")
    unit = _unit(cost)
    units = np.ceil(cost / unit * (1 - _ROUNDING))
    # Half a unit more, which no sum of whole units can use: none is within the budget by the solver's tolerance only.
    room = max(np.floor(budget / unit * (1 + _ROUNDING)), units.min(1).sum()) + 0.5
    return _solve(error, units, float(room))


def choose_front(error: Array, cost: Array, points: int, what: str = "the cost") -> tuple[Choice, ...]:
    """Return the best choices for budgets from the least to the largest cost, evenly spaced.

    Args:
        error: as :func:`choose_widths` has it.
        cost: as :func:`choose_widths` has it.
        points: how many budgets, at least 2.
        what: what the costs are, for messages.

    Returns:
        Cheapest first, each with less error than those before it.
    """
    budgets = np.linspace(cost.min(1).sum(), cost.max(1).sum(), points)
    # The ends as sums have them: even spacing rounds.
    budgets[0], budgets[-1] = float(cost.min(1).sum()), float(cost.max(1).sum())
    found: list[Choice] = []
    for budget in budgets:
        chosen = choose_widths(error, cost, float(budget), what)
        if not found or total_of(error, chosen) < total_of(error, found[-1]):
            found.append(chosen)
    return tuple(found)


def total_of(values: Array, chosen: Choice) -> float:
    """Return the sum of one value of each weight."""
    return float(values[np.arange(len(chosen)), list(chosen)].sum())


def _solve(error: Array, cost: Array, limit: float) -> Choice:
    weights, widths = error.shape
    rows = csr_array(np.kron(np.eye(weights), np.ones(widths)))
    scale = _LARGEST_ERROR / (float(error.max()) or 1.0)
    with _stdout_on_stderr():
        result: Any = milp(
            (error * scale).reshape(-1),
            integrality=np.ones(error.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(rows, 1, 1), LinearConstraint(cost.reshape(1, -1), -np.inf, limit)],
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        raise RuntimeError(f"the solver stopped without a choice: {result.message}")
    return tuple(int(column) for column in np.reshape(result.x, (weights, widths)).argmax(1))


def _unit(cost: Array) -> float:
    """Return what all costs are whole multiples of, or nearly."""
    if np.array_equal(cost, np.rint(cost)) and cost.max() > 0:
        return float(np.gcd.reduce(cost.astype(np.int64).reshape(-1)))
    return _RESOLUTION * float(cost.max(1).sum()) or 1.0


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Let what C code prints on stdout go to stderr: HiGHS leaves notes there, and stdout is for results."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
