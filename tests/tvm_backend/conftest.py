"""Programs are compiled once a session: compiling takes far longer than running."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.programs import random_block

from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.bundle import Bundle
from tvm_backend.runtime import CompiledProgram

Check = Callable[..., None]


def assert_equals_interpreter(program: IntegerProgram, compiled: CompiledProgram, *images: np.ndarray) -> None:
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
def small_program() -> IntegerProgram:
    return random_block(0)


@pytest.fixture(scope="session")
def small_bundle(small_program: IntegerProgram) -> Bundle:
    return build(small_program)
