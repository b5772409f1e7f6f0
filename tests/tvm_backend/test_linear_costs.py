"""Each linear of a program is found among the calls, with the bytes of its weight and its time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.programs import random_images

from quantizers.errors import UsageError
from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.bundle import Bundle
from tvm_backend.linear_costs import linears_of, measure_costs, stored_width
from tvm_backend.profile import median_call_seconds, profile
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import TARGETS

pytestmark = pytest.mark.tvm


def linear_names(program: IntegerProgram) -> list[str]:
    return [node.name for node in program.nodes if node.op == "linear"]


def test_every_linear_is_one_call(small_program: IntegerProgram, small_bundle: Bundle) -> None:
    found = linears_of(small_program, small_bundle.schedule)
    assert sorted(found.values()) == sorted(linear_names(small_program))
    nodes = {node.name: node for node in small_program.nodes}
    for position, name in found.items():
        call = small_bundle.schedule.calls[position]
        depth = small_program.constants[nodes[name].inputs[1]].shape[1]
        assert call.macs == math.prod(nodes[name].type.shape) * depth


def test_costs_are_the_calls(small_program: IntegerProgram, small_bundle: Bundle) -> None:
    compiled = CompiledProgram(small_bundle, threads=1)
    x = random_images(small_program, 1, seed=0)
    (cost, again) = measure_costs([(small_program, compiled)] * 2, x, rounds=3)
    assert set(cost.linears) == set(again.linears) == set(linear_names(small_program))
    assert all(linear.milliseconds > 0 for linear in cost.linears.values())
    assert cost.other_milliseconds > 0
    constants = {array.nbytes for array in small_bundle.constants}
    nodes = {node.name: node for node in small_program.nodes}
    for name, linear in cost.linears.items():
        assert linear.weight_bytes in constants
        codes = small_program.constants[nodes[name].inputs[1]]
        assert linear.weight_bytes >= codes.size * 3 // 8
    assert {name: linear.weight_bytes for name, linear in cost.linears.items()} == {
        name: linear.weight_bytes for name, linear in again.linears.items()
    }


@pytest.mark.parametrize(("bits", "width"), [(2, 3), (3, 3), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_stored_widths_are_what_bundles_hold(small_program: IntegerProgram, bits: int, width: int) -> None:
    """Codes of a width in place of a program's: its bundle has that many bits for each, and whole blocks."""
    assert stored_width(bits) == width
    name = linear_names(small_program)[0]
    node = next(node for node in small_program.nodes if node.name == name)
    largest = 2 ** (bits - 1) - 1
    codes = small_program.constants[node.inputs[1]]
    rng = np.random.default_rng(0)
    narrow = rng.integers(-largest, largest + 1, codes.shape).astype(np.int8)
    narrow[0, 0] = -largest
    constants = {**small_program.constants, node.inputs[1]: narrow}
    changed = IntegerProgram(small_program.inputs, constants, small_program.nodes, small_program.outputs)
    bundle = build(changed, next(iter(TARGETS)))
    position = next(at for at, linear in linears_of(changed, bundle.schedule).items() if linear == name)
    weight = bundle.schedule.calls[position].arguments[1]
    stored = bundle.constants[weight.position]
    assert stored.dtype == (np.int8 if width == 8 else np.uint8)
    block = {3: 96, 4: 64, 8: 1}[width]
    assert stored.nbytes % block == 0
    assert stored.nbytes >= codes.size * width / 8


def test_medians_and_the_profile_need_a_round(small_program: IntegerProgram, small_bundle: Bundle) -> None:
    compiled, x = CompiledProgram(small_bundle, threads=1), random_images(small_program, 2, seed=0)
    with pytest.raises(UsageError, match="rounds is 0"):
        median_call_seconds([compiled], x, rounds=0)
    with pytest.raises(UsageError, match="rounds is 0"):
        profile(compiled, x, rounds=0)
    assert sum(entry.calls for entry in profile(compiled, x, rounds=2)) == len(small_bundle.schedule.calls)
