"""The promise: compiled code equals the interpreter bit for bit, whatever the batch, threads and target."""

from __future__ import annotations

import pytest
from support.compiled import compile_for
from support.programs import block_id, random_block, random_images

from tvm_backend.runtime import CompiledProgram
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


@pytest.mark.parametrize("probabilities", [False, True], ids=["fused", "apart"])
@pytest.mark.parametrize("block", BLOCKS, ids=block_id)
def test_native_code_equals_interpreter(block, probabilities, check_threads_and_batches):
    check_threads_and_batches(random_block(**block, probabilities=probabilities), random_images)


def test_each_instruction_set_equals_interpreter(runnable_target, check):
    program = random_block(5, tokens=9, heads=3, head_dim=11, probabilities=False)
    compiled = compile_for(program, runnable_target)
    for batch in (1, 3):
        check(program, compiled, random_images(program, batch, seed=batch))


def test_one_bundle_gives_equal_bits_for_all_thread_counts(small_program, small_bundle, check):
    images = random_images(small_program, 5, seed=9)
    results = [CompiledProgram(small_bundle, threads)(images) for threads in range(1, usable_processors() + 1)]
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert one.tobytes() == other.tobytes()
    check(small_program, CompiledProgram(small_bundle), images)
