"""A scale for each head through the whole stack: images, calibration, integers, native code."""

from __future__ import annotations

import numpy as np
import pytest
from support.heads import head_recipe
from support.models import calibrated, images

from calibration.integerize import integerize
from quantizers.integer.serialize import program_from_bytes, program_to_bytes
from tvm_backend.build import build
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import TARGETS, cpu_features

pytestmark = pytest.mark.tvm

RUNNABLE = [t.name for t in TARGETS.values() if t.arch == "x86_64" and cpu_features().issuperset(t.features)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["ours", "swin", "transformers"])
def test_native_code_equals_interpreter(name, symmetric, check):
    program = integerize(calibrated(name, head_recipe(symmetric=symmetric)))
    again = program_from_bytes(*program_to_bytes(program))
    assert again == program
    bundle = build(again)
    calls = [call.operators for call in bundle.schedule.calls]
    # Scales of heads are no reason to leave the fused kernel.
    assert calls.count("attention") == sum(node.op == "normalize_rows" for node in program.nodes)
    for batch in (1, 3):
        check(program, CompiledProgram(bundle), images(name, batch, seed=batch).numpy())


@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_each_operand_alone(kind, check):
    program = integerize(calibrated("ours", head_recipe(kinds=(kind,))))
    several = {
        node.op
        for node in program.nodes
        for name in node.inputs
        if name in program.constants and program.constants[name].shape == (3, 1, 1)
    }
    # Queries and keys end in the multiplier of the scores, values in the numerator.
    assert several == ({"normalize_rows"} if kind == "value" else {"requantize"})
    check(program, CompiledProgram(build(program)), images("ours", 4, seed=8).numpy())


@pytest.mark.parametrize("target", RUNNABLE)
def test_each_instruction_set_equals_interpreter(target, check):
    program = integerize(calibrated("swin", head_recipe(4, "mse", symmetric=False)))
    assert {program.constants[n.inputs[2]].size for n in program.nodes if n.op == "normalize_rows"} == {2, 4}
    check(program, CompiledProgram(build(program, target)), np.asarray(images("swin", 3, seed=2)))
