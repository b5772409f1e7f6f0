"""Turns of engines whose clock is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpu_comparison.rounds import MOST_RUNS, SAMPLES, take_rounds


def clock(ms: float, log: list[str], name: str, ends_after: int | None = None) -> Callable[[int], float]:
    def time(count: int) -> float:
        log.append(f"{name} {count}")
        if ends_after is not None and sum(line.startswith(f"{name} ") for line in log) > ends_after:
            raise RuntimeError("out of memory\nand more")
        return ms

    return time


def test_every_engine_takes_a_turn_in_each_round_in_another_order() -> None:
    log: list[str] = []
    engines = {name: clock(30.0, log, name) for name in "abc"}
    found = take_rounds(engines, frozenset(), rounds=3, turn_ms=30)
    names = [line[0] for line in log]
    # Once to see how long it takes, then its samples.
    assert names[:3] == list("abc")
    assert names[3::SAMPLES] == list("abcbcacab")
    assert found.turns["b"] == [{"ms": [30.0] * SAMPLES, "runs": 1}] * 3
    assert not found.problems


@pytest.mark.parametrize(("ms", "runs"), [(1000.0, 1), (2.0, 5), (0.001, MOST_RUNS), (0.0, MOST_RUNS)])
def test_a_fast_engine_runs_more_often_in_a_turn(ms: float, runs: int) -> None:
    log: list[str] = []
    take_rounds({"a": clock(ms, log, "a")}, frozenset(), rounds=1, turn_ms=10 * SAMPLES)
    assert log == ["a 1"] + [f"a {runs}"] * SAMPLES


@pytest.mark.parametrize("ends_after", [0, 1, 1 + SAMPLES])
def test_a_peer_that_breaks_has_no_turns_and_the_others_go_on(ends_after: int) -> None:
    log: list[str] = []
    engines = {"a": clock(30.0, log, "a"), "b": clock(30.0, log, "b", ends_after)}
    found = take_rounds(engines, frozenset({"b"}), rounds=3, turn_ms=30)
    assert found.problems == {"b": "RuntimeError: out of memory"}
    assert list(found.turns) == ["a"]
    assert len(found.turns["a"]) == 3
    assert sum(line.startswith("b ") for line in log) == ends_after + 1


def test_ours_has_no_excuse() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        take_rounds({"a": clock(1.0, [], "a", 0)}, frozenset({"b"}), rounds=1, turn_ms=30)
