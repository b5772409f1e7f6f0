"""The walk along the front, on drops that are made up; and what a measured drop says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq.mixed_precision.accuracy import Drop, Judge
from ptq.mixed_precision.front import Point
from ptq.mixed_precision.goal import Goal
from ptq.mixed_precision.walk import smallest_within
from quantizers.errors import DataError, UsageError


def points(count: int) -> tuple[Point, ...]:
    return tuple(Point({"weight": index}, 1 / (1 + index), index, index, 1.0, 1.0) for index in range(count))


def lost(count: int) -> Drop:
    return Drop(images=1000, float_right=900, lost=count, won=0)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(0, 5))
def test_the_smallest_point_that_is_enough_is_found(drops: list[int], gain: int) -> None:
    """Where accuracy falls with size, and a new calibration makes up for some of the loss or none."""
    falling = sorted(drops, reverse=True)
    start = next((index for index, count in enumerate(falling) if not lost(count).beyond(2.0)), len(falling) - 1)
    enough = [index for index in range(start, len(falling)) if lost(max(0, falling[index] - gain)).within(2.0)]
    measured: list[int] = []

    def measure(point: Point) -> Drop:
        measured.append(point.bundle_bytes)
        return lost(falling[point.bundle_bytes])

    def rerun(point: Point) -> tuple[int, Drop]:
        return point.bundle_bytes, lost(max(0, falling[point.bundle_bytes] - gain))

    if not enough:
        with pytest.raises(UsageError, match="cannot be kept"):
            smallest_within(2.0, points(len(falling)), measure, rerun)
        return
    point, network, front = smallest_within(2.0, points(len(falling)), measure, rerun)
    assert network == point.bundle_bytes == enough[0]
    assert len(measured) == len(set(measured)) <= math.ceil(math.log2(len(falling) + 1))
    assert {index for index, entry in enumerate(front) if entry.drop is not None} == set(measured)
    assert front[network].final == point.final


def test_a_recipe_that_misses_gives_way_to_the_next_larger_one() -> None:
    again = {1: lost(60), 2: lost(50), 3: lost(5)}
    point, network, front = smallest_within(
        2.0,
        points(5),
        lambda point: lost(100 if point.bundle_bytes == 0 else 0),
        lambda point: (point.bundle_bytes, again[point.bundle_bytes]),
    )
    assert (network, point.bundle_bytes) == (3, 3)
    assert [entry.final is not None for entry in front] == [False, True, True, True, False]


def test_one_unlucky_measurement_rules_nothing_out() -> None:
    """A drop beyond the goal by less than its standard error."""
    unlucky = Drop(images=1000, float_right=900, lost=35, won=13)
    assert unlucky.points == pytest.approx(2.2)
    assert not unlucky.within(2.0)
    assert not unlucky.beyond(2.0)
    point, _, _ = smallest_within(2.0, points(5), lambda _: unlucky, lambda point: (point, lost(0)))
    assert point.bundle_bytes == 0


def test_only_answers_that_differ_are_uncertain() -> None:
    drop = Drop(images=400, float_right=300, lost=10, won=6)
    assert drop.points == pytest.approx(1.0)
    assert drop.standard_error == pytest.approx(1.0)
    assert drop.float_top1 == pytest.approx(75.0)
    assert drop.top1 == pytest.approx(74.0)
    assert drop.within(2.0)
    assert not drop.within(1.99)


def test_a_judge_counts_what_is_lost_and_won() -> None:
    answers, labels = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 0])
    data = [(answers[:4, None], labels[:4]), (answers[4:, None], labels[4:])]
    judge = Judge(lambda x: torch.nn.functional.one_hot(x[:, 0], 3), data, lambda logits: logits.argmax(-1), 3)
    assert judge.images == 6
    # Of the three that float has right one is lost, of the others two are won.
    flipped = {0: 1, 1: 1, 2: 2}
    drop = judge.measure(lambda x: torch.nn.functional.one_hot(torch.tensor([flipped[int(v)] for v in x]), 3), "it")
    assert drop == Drop(6, 3, lost=1, won=1)
    with pytest.raises(UsageError, match="have no labels: use a folder"):
        Judge(lambda x: x, [(answers[:, None], None)], lambda x: x[:, 0], 3)
    with pytest.raises(DataError, match="labels are 0 to 2, expected 0 to 1"):
        Judge(lambda x: x, data, lambda x: x[:, 0], 2)
    with pytest.raises(DataError, match="at least one image"):
        Judge(lambda x: x, [], lambda x: x[:, 0], 2)


@pytest.mark.parametrize(
    ("given_goal", "message"),
    [
        ({}, "exactly one goal: .* found none of them"),
        ({"max_drop": 1.0, "size_budget": 0.5}, "found --max-drop and --size-budget"),
        ({"max_drop": -1.0}, "--max-drop is -1"),
        ({"max_drop": math.nan}, "--max-drop is nan"),
        ({"size_budget": 1.0}, "--size-budget is 1, expected a share"),
        ({"latency_budget": 0.0}, "--latency-budget is 0, expected milliseconds"),
    ],
)
def test_a_goal_is_one_that_makes_sense(given_goal: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Goal(**given_goal)
