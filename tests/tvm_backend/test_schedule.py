"""The arena: no two values that live at once share a byte; and schedules survive JSON."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_backend.schedule import (
    ALIGNMENT,
    ARENA,
    CONSTANT,
    INPUT,
    Argument,
    Call,
    Lifetime,
    Schedule,
    allocate,
    check_places,
    from_json,
    to_json,
)


@st.composite
def lifetimes(draw: st.DrawFn) -> dict[str, Lifetime]:
    """Values of sizes on and beside cache lines, many of them alive at once."""
    found = {}
    for number in range(draw(st.integers(0, 12))):
        size = draw(st.one_of(st.sampled_from([1, 63, 64, 65, 128]), st.integers(1, 1000)))
        first = draw(st.integers(0, 10))
        found[f"v{number}"] = Lifetime(size, first, first + draw(st.integers(0, 6)))
    return found


def alive_together(one: Lifetime, other: Lifetime) -> bool:
    return one.first <= other.last and other.first <= one.last


@given(lifetimes())
def test_values_that_live_at_once_share_no_byte(values: dict[str, Lifetime]) -> None:
    positions, total = allocate(values)
    assert set(positions) == set(values)
    for (a, one), (b, other) in itertools.combinations(values.items(), 2):
        if alive_together(one, other):
            assert positions[a] + one.size <= positions[b] or positions[b] + other.size <= positions[a], (a, b)
    for name, life in values.items():
        assert positions[name] >= 0
        assert positions[name] % ALIGNMENT == 0
        assert positions[name] + life.size <= total


@given(lifetimes())
def test_the_arena_is_between_the_most_that_lives_at_once_and_everything(values: dict[str, Lifetime]) -> None:
    _, total = allocate(values)
    rounded = {name: -(-life.size // ALIGNMENT) * ALIGNMENT for name, life in values.items()}
    most = max(
        (sum(rounded[name] for name, life in values.items() if life.first <= call <= life.last) for call in range(17)),
        default=0,
    )
    assert most <= total <= sum(rounded.values())


@given(lifetimes(), st.randoms(use_true_random=False))
def test_positions_do_not_depend_on_the_order_of_the_values(values: dict[str, Lifetime], random) -> None:
    names = list(values)
    random.shuffle(names)
    assert allocate({name: values[name] for name in names}) == allocate(values)


def test_a_value_takes_the_room_of_one_that_has_ended() -> None:
    """The last call that reads a value may not write over it; the next one may."""
    chain = {"a": Lifetime(64, 0, 1), "b": Lifetime(64, 1, 2), "c": Lifetime(64, 2, 3)}
    positions, total = allocate(chain)
    assert positions == {"a": 0, "b": 64, "c": 0}
    assert total == 128


def test_a_value_fits_between_two_others() -> None:
    """The room that a middle value left is taken before the arena grows."""
    values = {
        "wide": Lifetime(256, 0, 9),
        "ends": Lifetime(192, 0, 1),
        "stays": Lifetime(128, 0, 9),
        "late": Lifetime(64, 2, 3),
    }
    positions, total = allocate(values)
    assert positions["late"] == positions["ends"] == 256
    assert total == 256 + 192 + 128


SCHEDULE = Schedule(
    calls=(
        Call(
            "linear_0", "v1", "linear+requantize", 12,
            (Argument(INPUT, 0, "float32", 1, (3, 4)), Argument(CONSTANT, 1, "int8", 2, (5,)),
             Argument(ARENA, 64, "int8", 3, ())),
        ),
    ),
    outputs=(Argument(ARENA, 64, "int8", 3, ()),),
    checks=((0, Argument(ARENA, 0, "int32", 1, ())),),
    arena_bytes=128,
)  # fmt: skip


def test_json_holds_all_of_a_schedule() -> None:
    assert from_json(json.loads(json.dumps(to_json(SCHEDULE)))) == SCHEDULE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arena_bytes": -1}, r"expected a number that is not negative, got -1"),
        ({"arena_bytes": "128"}, r"expected a number that is not negative, got '128'"),
        ({"calls": [[0, "v1", "linear", 12, []]]}, r"expected a text, got 0"),
    ],
)
def test_values_of_another_form_are_refused(change, message) -> None:
    with pytest.raises(TypeError, match=message):
        from_json(to_json(SCHEDULE) | change)


def test_a_missing_key_is_refused() -> None:
    document = to_json(replace(SCHEDULE, calls=()))
    del document["outputs"]
    with pytest.raises(KeyError, match="outputs"):
        from_json(document)


CONSTANTS = (np.zeros((3, 4), np.int32), np.zeros((2, 5), np.int8))


def test_a_schedule_that_fits_is_accepted() -> None:
    check_places(SCHEDULE, 1, CONSTANTS)


@pytest.mark.parametrize(
    ("inputs", "constants", "message"),
    [
        (1, CONSTANTS[:1], r"linear_0 for v1 takes constant 1, there are 1 that it may take"),
        (1, (), r"linear_0 for v1 takes constant 1, there are 0 that it may take"),
        (1, CONSTANTS[::-1], r"takes constant 1 as int8 of shape \(2, 5\), it is int32 of shape \(3, 4\)"),
        (1, (CONSTANTS[0], CONSTANTS[1].astype(np.uint8)), r"as int8 of shape .*, it is uint8 of shape \(2, 5\)"),
        (1, (CONSTANTS[0], CONSTANTS[1].T), r"as int8 of shape \(2, 5\), it is int8 of shape \(5, 2\)"),
        (0, CONSTANTS, r"linear_0 for v1 takes input 0, there are 0 that it may take"),
    ],
)
def test_inputs_and_constants_that_are_not_there(inputs, constants, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_places(SCHEDULE, inputs, constants)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arena_bytes": 66}, r"linear_0 for v1 reaches byte 67 of the arena, which has 66"),
        ({"outputs": (Argument(ARENA, 120, "int32", 3, ()),)}, r"output 0 reaches byte 132 of the arena"),
        ({"outputs": (Argument(INPUT, 0, "float32", 1, (3, 4)),)}, r"output 0 takes input 0, there are 0"),
        ({"outputs": (Argument("heap", 0, "int8", 1, ()),)}, r"takes 'heap', expected input, constant or arena"),
        ({"checks": ((1, Argument(ARENA, 0, "int32", 1, ())),)}, r"input 1 is checked, there are 1"),
        ({"checks": ((0, Argument(CONSTANT, 1, "int8", 2, (5,))),)}, r"the check of input 0 takes constant 1, there"),
    ],
)
def test_places_outside_of_the_bundle(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_places(replace(SCHEDULE, **changes), 1, CONSTANTS)


def test_an_output_may_be_a_constant() -> None:
    check_places(replace(SCHEDULE, outputs=(Argument(CONSTANT, 1, "int8", 2, (5,)),)), 1, CONSTANTS)
