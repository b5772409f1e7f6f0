"""Unsigned activations: another program with the same results, where every linear that can reads uint8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.programs import random_block, random_images

from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from quantizers.integer.verify import verify
from tvm_backend.unsigned import unsigned_activations

pytestmark = pytest.mark.tvm


def left_types(program: IntegerProgram) -> list[str]:
    types = program.types()
    return [types[node.inputs[0]].dtype for node in program.nodes if node.op == "linear"]


@pytest.mark.parametrize("seed", range(4))
def test_results_are_the_same(seed):
    program = random_block(seed, tokens=6, heads=2, head_dim=9)
    rewritten = unsigned_activations(program)
    verify(rewritten)
    images = torch.from_numpy(random_images(program, 3, seed))
    for one, other in zip(interpret(program, images), interpret(rewritten, images), strict=True):
        assert torch.equal(one, other)
    # The first layer reads patches of the image, whose codes come from the door.
    assert left_types(rewritten) == ["int8", *["uint8"] * (len(left_types(program)) - 1)]


def test_a_value_that_is_also_a_result_stays():
    program = random_block(0)
    read = next(node.inputs[0] for node in reversed(program.nodes) if node.op == "linear")
    shown = replace(program, outputs=(*program.outputs, ("codes", read)))
    rewritten = unsigned_activations(shown)
    assert rewritten.types()[read] == program.types()[read]


def test_a_bias_that_would_overflow_stays():
    program = random_block(0)
    linear = [node for node in program.nodes if node.op == "linear"][1]
    bias = program.constants[linear.inputs[2]]
    largest = np.full_like(bias, 2**31 - 1 - 128 * 128 * program.constants[linear.inputs[1]].shape[1])
    heavy = replace(program, constants={**program.constants, linear.inputs[2]: largest})
    verify(heavy)
    rewritten = unsigned_activations(heavy)
    verify(rewritten)
    assert rewritten.types()[linear.inputs[0]].dtype == "int8"
