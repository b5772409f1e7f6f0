"""Every operator at the ends of its range, against the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
from support.compiled import EMULATED, compile_for
from support.operator_programs import CASES, PRODUCTS, WIDTH, Case, case, codes, extremes
from support.programs import ProgramBuilder

from quantizers.integer.ops import OPS
from tvm_backend.kernels.cpu import emitters as cpu
from tvm_backend.kernels.cuda import emitters as cuda

pytestmark = pytest.mark.tvm


def run(case: Case, check, target: str = "native") -> None:
    compiled = compile_for(case.program, target)
    for batch in case.batches:
        check(case.program, compiled, *batch)


@pytest.mark.parametrize("emitters", [cpu.EMITTERS, cuda.EMITTERS], ids=["cpu", "cuda"])
def test_emitters_cover_exactly_the_contract(emitters):
    assert set(emitters) == set(OPS)


@pytest.mark.parametrize("target", ["native", EMULATED])
@pytest.mark.parametrize("name", CASES)
def test_code_equals_interpreter(name, target, check):
    run(CASES[name](), check, target)


@pytest.mark.parametrize("name", PRODUCTS)
def test_plain_products_equal_interpreter(name, check):
    run(PRODUCTS[name](), check, "x86-64")


@pytest.mark.parametrize("target", ["native", "x86-64", EMULATED])
def test_linear_with_many_rows_shares_them_otherwise(target, check):
    # From 768 to 1536 rows on, by the height of the target's tile, threads keep to their rows.
    rng = np.random.default_rng(8)
    b = ProgramBuilder(520, WIDTH)
    x = codes(b, "int8", 520, WIDTH)
    outputs = []
    for half in (128, 8):
        weight = rng.integers(-half, half, (150, WIDTH)).astype(np.int8)
        weight[0], bias = -half, rng.integers(-1000, 1000, 150).astype(np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (520, 150)))
    run(case(b, outputs), check, target)


@pytest.mark.parametrize("target", ["native", "x86-64", EMULATED])
@pytest.mark.parametrize("bits", [3, 4])
def test_linear_with_narrow_weights(bits, target, check):
    rng = np.random.default_rng(7)
    half = 1 << (bits - 1)
    outputs = []
    b = ProgramBuilder(45, WIDTH)
    x = codes(b, "uint8", 45, WIDTH)
    for count in (1, 31, 64, 131):
        weight = rng.choice([-half, 1 - half, -1, 0, 1, half - 1], (count, WIDTH)).astype(np.int8)
        weight[0], bias = -half, rng.integers(-1000, 1000, count).astype(np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (45, count)))
    program = b.build(*outputs)
    compiled = compile_for(program, target)
    weights = [array for array in compiled.bundle.constants if array.dtype == np.uint8]
    assert len(weights) == 4
    if target == EMULATED:
        # Whole tiles of 64 columns and depths.
        assert sum(array.nbytes for array in weights) == (64 + 64 + 64 + 192) * 64 * bits // 8
    else:
        assert sum(array.nbytes for array in weights) < 1.5 * bits / 8 * WIDTH * (16 + 32 + 64 + 144) + 4 * 96
    check(program, compiled, extremes(rng, 3, 45, WIDTH))
