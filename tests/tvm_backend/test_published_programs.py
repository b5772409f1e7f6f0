"""The published forms of I-ViT through TVM: equal to the interpreter bit for bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from support.compiled import compile_for
from support.cuda_emulated import emulate
from support.programs import ProgramBuilder, block_id, saturate
from support.published_programs import random_published_block, random_tokens

from tvm_backend.build import build
from tvm_backend.runtime import CompiledProgram

pytestmark = pytest.mark.tvm

BLOCKS = [
    {"seed": 0},
    {"seed": 1, "tokens": 1, "heads": 3, "head_dim": 5, "bits": 8},
    {"seed": 2, "tokens": 18, "heads": 1, "head_dim": 32},
    {"seed": 3, "tokens": 17, "heads": 3, "head_dim": 48, "bits": 8},
    {"seed": 4, "tokens": 197, "heads": 2, "head_dim": 64},
]


@pytest.mark.parametrize("inner", [False, True], ids=["fused", "apart"])
@pytest.mark.parametrize("block", BLOCKS, ids=block_id)
def test_native_code_equals_interpreter(block, inner, check_threads_and_batches):
    check_threads_and_batches(random_published_block(**block, inner=inner), random_tokens)


def test_each_instruction_set_equals_interpreter(runnable_target, check):
    program = random_published_block(5, tokens=9, heads=3, head_dim=11, inner=False)
    compiled = compile_for(program, runnable_target)
    for batch in (1, 3):
        check(program, compiled, random_tokens(program, batch, seed=batch))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
@pytest.mark.parametrize("bits", [8, 16])
def test_attention_is_one_kernel_on_tensor_cores(bits: int, architecture: str, check) -> None:
    program = random_published_block(6, tokens=70, heads=2, head_dim=24, bits=bits, inner=False)
    compiled = emulate(program, architecture)
    calls = [call.operators for call in compiled.bundle.schedule.calls]
    assert "attention" in calls
    assert "shiftmax" not in calls
    check(program, compiled, random_tokens(program, 2, seed=0))


WIDTH = 37


def rows(dtype: str) -> np.ndarray:
    """Rows of all ends and neighbours of zero, flat rows, and noise of all sizes."""
    rng = np.random.default_rng(0)
    ends = [-32768, -129, -128, -127, -1, 0, 1, 127, 128, 255, 32767]
    noise = rng.normal(0, 1, (6, 4, WIDTH)) * 10.0 ** rng.integers(0, 5, (6, 4, 1))
    images = np.where(rng.random((6, 4, WIDTH)) < 0.5, rng.choice(ends, (6, 4, WIDTH)), noise)
    images[0] = np.arange(4)[:, None] - 2
    images[1] = 1 + np.arange(WIDTH) % 2
    images[2] = -200 if dtype != "uint8" else 0
    return images.astype(np.float32)


def codes(dtype: str) -> tuple[ProgramBuilder, str]:
    b = ProgramBuilder(4, WIDTH)
    return b, b.node("quantize", ("image",), dtype, (4, WIDTH), scale=1.0, **saturate(dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_shiftmax_and_shift_gelu_at_all_settings(dtype, check):
    b, x = codes(dtype)
    outputs = []
    for inverse, window in itertools.product((1, 12, 54, 255), (1, 15, 23)):
        settings = {"inverse_scale": inverse, "window": window}
        outputs += [b.node("shiftmax", (x,), f"int{bits}", (4, WIDTH), bits=bits, **settings) for bits in (8, 16)]
        outputs += [
            b.node("shift_gelu", (x,), "int32", (4, WIDTH), bits=8, input_zero_point=zero, **settings)
            for zero in (0, 100)
        ]
    program = b.build(*outputs)
    check(program, CompiledProgram(build(program)), rows(dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_i_layer_norm_at_all_starts(dtype, check):
    rng = np.random.default_rng(1)
    b, x = codes(dtype)
    weight = b.constant(rng.integers(-(2**31), 2**31, WIDTH).astype(np.int32))
    bias = b.constant(rng.integers(-(2**31), 2**31, WIDTH))
    outputs = [
        b.node("i_layer_norm", (x, weight, bias), "int16", (4, WIDTH), start=start, iterations=iterations, shift=50,
               **saturate("int16", 1))
        for start, iterations in itertools.product((-1, 0, 16, 31), (1, 10))
    ]  # fmt: skip
    program = b.build(*outputs)
    check(program, CompiledProgram(build(program)), rows(dtype))


def test_int16_probabilities_times_values(check):
    b, x = codes("int8")
    b.inputs = (*b.inputs, ("values", type(b.inputs[0][1])("float32", (WIDTH, 70))))
    v = b.node("quantize", ("values",), "int8", (WIDTH, 70), scale=1.0, **saturate("int8"))
    p = b.node("shiftmax", (x,), "int16", (4, WIDTH), inverse_scale=20, window=15, bits=16)
    outputs = [
        b.node("matmul", (p, v), "int32", (4, 70), zero_point_a=0, zero_point_b=zero, transpose_b=0)
        for zero in (0, -128, 127)
    ]
    program = b.build(*outputs)
    values = np.random.default_rng(2).choice([-128, -1, 0, 127], (6, WIDTH, 70)).astype(np.float32)
    check(program, CompiledProgram(build(program)), rows("int8"), values)
