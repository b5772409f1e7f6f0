"""Laws of the choice of widths: it is the best there is, and a larger budget never makes it worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.mixed_precision.solver import Array, choose_front, choose_widths, total_of
from quantizers.errors import UsageError

UNTIMED = settings(deadline=None, max_examples=60)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array]:
    """Errors that span many magnitudes, as those of weights do, and costs in bytes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    error = 10.0 ** rng.uniform(-12, 0, shape)
    unit = draw(st.sampled_from([1, 4096]))
    return error, unit * rng.integers(1, 200, shape).astype(np.float64)


def best_by_trying(error: Array, cost: Array, budget: float) -> float:
    choices = itertools.product(range(error.shape[1]), repeat=error.shape[0])
    return min(total_of(error, chosen) for chosen in choices if total_of(cost, chosen) <= budget)


@UNTIMED
@given(problems(), st.floats(0, 1))
def test_no_other_choice_is_better(problem: tuple[Array, Array], share: float) -> None:
    error, cost = problem
    least, most = cost.min(1).sum(), cost.max(1).sum()
    budget = float(np.floor(least + share * (most - least)))
    chosen = choose_widths(error, cost, budget)
    assert total_of(cost, chosen) <= budget
    # Beside the largest error; below that the solver's arithmetic sees nothing.
    assert total_of(error, chosen) <= best_by_trying(error, cost, budget) + 1e-10 * float(error.max())


@UNTIMED
@given(problems())
def test_a_larger_budget_is_never_worse(problem: tuple[Array, Array]) -> None:
    error, cost = problem
    found = [
        total_of(error, choose_widths(error, cost, float(budget)))
        for budget in np.linspace(cost.min(1).sum(), cost.max(1).sum(), 6).round()
    ]
    assert all(after <= before + 1e-10 * float(error.max()) for before, after in itertools.pairwise(found))


@UNTIMED
@given(problems())
def test_a_front_falls_from_the_cheapest_choice_to_the_best(problem: tuple[Array, Array]) -> None:
    error, cost = problem
    found = choose_front(error, cost, 7)
    costs, errors = ([total_of(values, chosen) for chosen in found] for values in (cost, error))
    assert costs[0] == cost.min(1).sum()
    assert errors[-1] == pytest.approx(error.min(1).sum(), abs=1e-10 * float(error.max()))
    assert all(a < b for a, b in itertools.pairwise(costs))
    assert all(a > b for a, b in itertools.pairwise(errors))


def test_an_impossible_budget_says_what_is_possible() -> None:
    cost = np.array([[3.0, 4.0], [30.0, 40.0]])
    with pytest.raises(UsageError, match="the size cannot be 32: the least that these widths reach is 33"):
        choose_widths(np.ones((2, 2)), cost, 32, "the size")
    assert choose_widths(np.ones((2, 2)), cost, 33) == (0, 0)


def test_without_errors_or_costs_there_is_a_choice() -> None:
    assert len(choose_widths(np.zeros((2, 2)), np.ones((2, 2)), 2)) == 2
    assert choose_widths(np.array([[1.0, 0.0]]), np.zeros((1, 2)), 0) == (1,)
    assert choose_front(np.ones((2, 1)), np.ones((2, 1)), 5) == ((0, 0),)


def test_stdout_is_left_to_results(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS leaves a note on stdout for about one instance of two hundred, as for this one."""
    rng = np.random.default_rng(47)
    bits = np.array([3.0, 4.0, 8.0])
    error = 10.0 ** rng.uniform(-9, -1, (40, 1)) * 4.0**-bits * rng.uniform(0.5, 2, (40, 3))
    cost = rng.choice([4, 12, 16], (40, 1)) * bits
    assert len(choose_front(error, cost, 9)) > 2
    assert capfd.readouterr().out == ""
