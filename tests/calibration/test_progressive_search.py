"""Laws of the progressive searches: the best of all that was ever seen, incumbents and grid among it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.search.progressive import progressive_search, progressive_search_groups

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None, max_examples=100)
ENTRIES = st.lists(st.tuples(st.floats(1e-3, 10.0), st.sampled_from("abc")), max_size=12)
#: A hash of the scale's bits is as far from smooth as a score can be; few values make ties frequent.
ROUGHNESS = st.sampled_from([3, 1000])


def rough(scale: float, other: object, seed: int, values: int) -> float:
    return hash((scale, str(other) == "a", str(other) == "b", seed)) % values / values


@UNTIMED
@given(ENTRIES.filter(bool), ENTRIES, st.integers(0, 5), ROUGHNESS, st.floats(0, 3), st.integers(1, 4))
def test_nothing_that_was_scored_is_better(
    grid: list[tuple[float, str]],
    incumbents: list[tuple[float, str]],
    seed: int,
    values: int,
    gap: float,
    steps: int,
) -> None:
    """Whatever the score, the result is the first of the best that the search has ever scored."""
    seen: list[tuple[float, float, str]] = []

    def score(scale: float, other: str) -> float:
        assert scale > 0
        seen.append((rough(scale, other, seed, values), scale, other))
        return seen[-1][0]

    settings_ = {"gap": gap, "incumbents": incumbents, "width": 3, "candidates": 9, "steps": steps}
    scale, other = progressive_search(grid, score, **settings_)
    lowest = min(entry[0] for entry in seen)
    assert rough(scale, other, seed, values) == lowest
    assert next(entry[1:] for entry in seen if entry[0] == lowest) == (scale, other)
    assert {entry[1:] for entry in seen} >= {*grid, *incumbents}
    assert [entry[1:] for entry in seen[: len(incumbents)]] == incumbents
    assert progressive_search(grid, score, **settings_) == (scale, other)


def test_of_equals_the_first_wins() -> None:
    """Incumbents are before the grid, and the grid is before what lies between."""
    grid = [(1.0, "a"), (2.0, "b")]
    assert progressive_search(grid, lambda *_: 1.0, gap=1.0) == (1.0, "a")
    assert progressive_search(grid, lambda *_: 1.0, gap=1.0, incumbents=[(7.0, "z"), (8.0, "y")]) == (7.0, "z")


@pytest.mark.parametrize("optimum", [0.11, 0.37, 0.5, 0.893])
def test_published_settings_find_the_optimum_of_a_smooth_function(optimum: float) -> None:
    """To one percent of the scale, from a grid that is twenty times coarser than that at the lowest optimum."""
    grid = [(i / 16, None) for i in range(1, 17)]
    found, _ = progressive_search(grid, lambda scale, _: (math.log(scale) - math.log(optimum)) ** 2, gap=1 / 16)
    assert found == pytest.approx(optimum, rel=0.01)


def test_what_goes_with_a_scale_is_kept() -> None:
    """Each survivor is refined with its own zero point or codebook."""
    best = {"a": 0.3, "b": 0.81}
    grid = [(i / 8, other) for i in range(1, 9) for other in best]
    found, other = progressive_search(grid, lambda s, o: (s - best[o]) ** 2 + (0.01 if o == "a" else 0.0), gap=1 / 8)
    assert other == "b"
    assert found == pytest.approx(0.81, rel=0.01)


# Groups -----------------------------------------------------------------------------------------------

GROUPS = 3


def rough_groups(scales: Tensor, seed: int, values: int) -> Tensor:
    return torch.tensor([rough(float(s), i, seed, values) for i, s in enumerate(scales)], dtype=torch.float64)


@UNTIMED
@given(
    st.lists(st.lists(st.floats(1e-3, 10.0), min_size=GROUPS, max_size=GROUPS), max_size=3),
    st.lists(st.tuples(st.floats(1e-3, 1.0), st.floats(0.0, 3.0)), min_size=GROUPS, max_size=GROUPS),
    st.integers(2, 6),
    st.integers(0, 5),
    ROUGHNESS,
    st.integers(1, 4),
)
def test_nothing_that_was_scored_is_better_in_any_group(
    known: list[list[float]],
    ranges: list[tuple[float, float]],
    count: int,
    seed: int,
    values: int,
    steps: int,
) -> None:
    """In each group for itself, the first of the best that was ever scored."""
    grid = torch.tensor([[low + width * i / (count - 1) for low, width in ranges] for i in range(count)]).double()
    incumbents = [torch.tensor(entry, dtype=torch.float64) for entry in known]
    seen: list[tuple[Tensor, Tensor]] = []

    def score(scales: Tensor) -> Tensor:
        assert bool((scales > 0).all())
        seen.append((scales.clone(), rough_groups(scales, seed, values)))
        return seen[-1][1]

    found = progressive_search_groups(grid, score, incumbents=incumbents, steps=steps)
    errors = torch.stack([entry[1] for entry in seen])
    for group in range(GROUPS):
        first = int(errors[:, group].argmin())
        assert float(errors[first, group]) == float(errors[:, group].min())
        first = next(i for i, entry in enumerate(seen) if entry[1][group] == errors[:, group].min())
        assert float(found[group]) == float(seen[first][0][group])
    scored = torch.stack([entry[0] for entry in seen])
    assert torch.equal(scored[: len(known) + count], torch.stack([*incumbents, *grid]))
    assert torch.equal(progressive_search_groups(grid, score, incumbents=incumbents, steps=steps), found)


def test_groups_find_their_own_optimum() -> None:
    """To one percent, each group its own."""
    optimum = torch.tensor([0.21, 0.5, 0.93], dtype=torch.float64)
    grid = torch.linspace(0.1, 1.0, 17, dtype=torch.float64)[:, None].expand(17, 3)
    found = progressive_search_groups(grid, lambda scales: (scales - optimum).square(), steps=4)
    torch.testing.assert_close(found, optimum, rtol=0.01, atol=0)


def test_a_group_is_searched_as_if_alone() -> None:
    """What the other groups are changes nothing."""
    grid = torch.stack([torch.linspace(0.1, high, 9, dtype=torch.float64) for high in (1.0, 2.0, 5.0)], 1)
    optimum = torch.tensor([0.33, 1.9, 0.2], dtype=torch.float64)
    together = progressive_search_groups(grid, lambda scales: (scales - optimum).abs())
    for group in range(3):
        part = slice(group, group + 1)
        alone = progressive_search_groups(grid[:, part], lambda scales, part=part: (scales - optimum[part]).abs())
        assert torch.equal(alone, together[part])


def test_no_finite_score_is_no_crash() -> None:
    """Where every error is infinite, something of the grid comes back."""
    grid = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert float(progressive_search_groups(grid, lambda scales: torch.full_like(scales, float("inf")))) in (1.0, 2.0)
    assert progressive_search([(1.0, "a")], lambda *_: float("inf"), gap=1.0) == (1.0, "a")
