"""Turns, rounds and their statistics. Nothing here asserts how long something takes."""

from __future__ import annotations

import os

import pytest
from cpu_comparison.processor_time import others_seconds, processor_seconds, spent
from cpu_comparison.ratios import ratios, round_values, spread
from cpu_comparison.turn import MOST_CALLS, take_turn


def test_a_round_is_the_median_of_its_turn() -> None:
    assert round_values([{"ms": [1.0, 9.0, 2.0]}, {"ms": [4.0]}]) == [2.0, 4.0]


def test_a_load_that_meets_both_engines_of_a_round_leaves_their_ratio_alone() -> None:
    ours = [1.0, 1.0, 5.0, 1.0]
    peer = [2.0, 2.0, 10.0, 2.0]
    assert spread(ratios(peer, ours)).to_dict() == {"median": 2.0, "p10": 2.0, "p90": 2.0}


def test_the_ratio_of_rounds_is_not_the_ratio_of_medians() -> None:
    assert spread(ratios([2.0, 3.0, 10.0], [1.0, 2.0, 9.0])).median == 1.5


def test_rounds_are_never_paired_with_rounds_that_are_missing() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_percentiles() -> None:
    found = spread([float(value) for value in range(11)])
    assert (found.median, found.p10, found.p90) == (5.0, 1.0, 9.0)


def test_the_slowest_engine_takes_one_call_to_warm_up_and_one_that_counts() -> None:
    calls: list[int] = []
    turn = take_turn(lambda: calls.append(1), warm_ms=0, time_ms=0)
    assert len(calls) == 2
    assert len(turn.ms) == 1
    assert turn.ms[0] > 0


def test_the_fastest_engine_stops_at_the_most_calls() -> None:
    assert len(take_turn(lambda: None, warm_ms=0, time_ms=60_000).ms) == MOST_CALLS


def test_processor_time_of_this_process_and_of_none() -> None:
    assert processor_seconds(os.getpid()) > 0
    assert processor_seconds(2**22 + 1) == 0
    assert os.getpid() not in others_seconds(frozenset({os.getpid()}))


def test_what_others_spent_counts_processes_that_are_new_and_not_those_that_are_gone() -> None:
    assert spent({1: 1.0, 2: 7.0}, {1: 1.5, 3: 0.25}) == 0.75
