"""The promise: compiled code equals the interpreter bit for bit, whatever the batch, threads and target."""

from __future__ import annotations

import pytest
from support.programs import random_block, random_images

from quantizers.errors import TargetError
from tvm_backend.build import build
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import TARGETS as CPU_TARGETS
from tvm_backend.targets import check_runnable, get_target
from tvm_backend.threads import usable_processors

pytestmark = pytest.mark.tvm

BLOCKS = [
    {"seed": 0},
    {"seed": 1, "tokens": 2, "heads": 3, "head_dim": 5},
    {"seed": 2, "tokens": 18, "heads": 1, "head_dim": 32},
    {"seed": 3, "tokens": 17, "heads": 3, "head_dim": 48, "patch": 3},
    {"seed": 4, "tokens": 70, "heads": 2, "head_dim": 64},
    {"seed": 5, "tokens": 197, "heads": 1, "head_dim": 16},
]
TARGETS = list(CPU_TARGETS)


def name(block: dict[str, int]) -> str:
    return "-".join(f"{key}{value}" for key, value in block.items())


@pytest.mark.parametrize("probabilities", [False, True], ids=["fused", "apart"])
@pytest.mark.parametrize("block", BLOCKS, ids=name)
def test_native_code_equals_interpreter(block, probabilities, check):
    program = random_block(**block, probabilities=probabilities)
    bundle = build(program)
    for threads in range(1, min(2, usable_processors()) + 1):
        compiled = CompiledProgram(bundle, threads)
        for batch in (1, 2, 7):
            check(program, compiled, random_images(program, batch, seed=batch))


@pytest.mark.parametrize("target", TARGETS)
def test_each_instruction_set_equals_interpreter(target, check):
    chosen = get_target(target)
    try:
        check_runnable(chosen.name, chosen.arch, chosen.features)
    except TargetError as error:
        pytest.skip(str(error))
    program = random_block(5, tokens=9, heads=3, head_dim=11, probabilities=False)
    compiled = CompiledProgram(build(program, target))
    for batch in (1, 3):
        check(program, compiled, random_images(program, batch, seed=batch))


def test_one_bundle_gives_equal_bits_for_all_thread_counts(small_program, small_bundle, check):
    images = random_images(small_program, 5, seed=9)
    results = [CompiledProgram(small_bundle, threads)(images) for threads in range(1, usable_processors() + 1)]
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert one.tobytes() == other.tobytes()
    check(small_program, CompiledProgram(small_bundle), images)
