"""Programs are compiled once a session: compiling takes far longer than running."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.compiled import EMULATED, compile_for
from support.programs import random_block

from quantizers.errors import TargetError
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import TARGETS, check_runnable, get_target
from tvm_backend.threads import usable_processors

Check = Callable[..., None]
Images = Callable[..., np.ndarray]


def assert_equals_interpreter(
    program: IntegerProgram, compiled: CompiledProgram | CudaProgram, *images: np.ndarray
) -> None:
    wanted = interpret(program, *map(torch.from_numpy, images))
    given = compiled(*images)
    assert len(given) == len(wanted)
    for (name, _), got, want in zip(program.outputs, given, wanted, strict=True):
        assert got.dtype == want.numpy().dtype, name
        np.testing.assert_array_equal(got, want.numpy(), err_msg=name, strict=True)


@pytest.fixture(scope="session")
def check() -> Check:
    return assert_equals_interpreter


@pytest.fixture(scope="session")
def check_threads_and_batches(check: Check) -> Check:
    """Compare a program, on this machine with one and two threads and on an emulated GPU, each with several batches."""

    def compare(program: IntegerProgram, images: Images) -> None:
        bundle = build(program)
        programs = [CompiledProgram(bundle, threads) for threads in range(1, min(2, usable_processors()) + 1)]
        for compiled in (*programs, compile_for(program, EMULATED)):
            for batch in (1, 2, 7):
                check(program, compiled, images(program, batch, seed=batch))

    return compare


@pytest.fixture(params=[*TARGETS, EMULATED])
def runnable_target(request: pytest.FixtureRequest) -> str:
    """Name of each target in turn, of GPUs as the CPU emulates them; those that this machine cannot run are skipped."""
    if request.param == EMULATED:
        return EMULATED
    chosen = get_target(request.param)
    try:
        check_runnable(chosen.name, chosen.arch, chosen.features)
    except TargetError as error:
        pytest.skip(str(error))
    return chosen.name


@pytest.fixture(scope="session")
def small_program() -> IntegerProgram:
    return random_block(0)


@pytest.fixture(scope="session")
def small_bundle(small_program: IntegerProgram) -> Bundle:
    return build(small_program)
