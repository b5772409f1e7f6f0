"""Every named recipe, through to integers: the program verifies, and is the simulation's arithmetic."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from support.models import images, ours, spread
from support.stepwise import steps_apart

import ptq
from ptq.recipes import RECIPES
from quantizers.integer.interpret import interpret
from quantizers.integer.serialize import program_from_bytes, program_to_bytes
from quantizers.integer.verify import verify

BITS = ("w8a8", "w4a4", "w3a3")


@functools.cache
def quantized(method: str, bits: str) -> ptq.Quantized:
    """Quantize a ViT of one block with 24 channels on twelve images."""
    return ptq.quantize(spread(ours(depth=1)), images("ours", 12, seed=1), method=method, bits=bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", RECIPES)
def test_integers_are_the_simulation(method: str, bits: str) -> None:
    """Operator by operator, given the same codes: one step apart at most, and that seldom.

    Requantization in integers rounds ties another way, and tables hold functions of codes: one step. One code in fifty
    may differ, and two more, for the smallest results have a hundred values. The published forms of I-ViT approximate
    what the simulation computes in the same form from float scales: the same bound.
    """
    result = quantized(method, bits)
    verify(result.program)
    assert result.describe()["float_ops"] == 0
    for site, steps in steps_apart(result.calibrated, images("ours", 6, seed=9)).items():
        assert float(steps.max()) <= 1, site
        assert int((steps > 0).sum()) <= steps.numel() / 50 + 2, site


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", RECIPES)
def test_logits_are_the_simulations(method: str, bits: str) -> None:
    """Over the whole network: a code that differs by one step is like noise far below that of quantization itself.

    So integers are nearer to the simulation than half of what the simulation is away from float.
    """
    result, x = quantized(method, bits), images("ours", 12, seed=5)
    integers, simulated, exact = result.integer(x), result(x), result.float(x)
    assert float((integers - simulated).norm()) < 0.5 * float((simulated - exact).norm())


@pytest.mark.parametrize("method", RECIPES)
def test_programs_survive_their_file(method: str) -> None:
    program = quantized(method, "w3a3").program
    assert program_from_bytes(*program_to_bytes(program)) == program


@pytest.mark.tvm
@pytest.mark.parametrize(("method", "bits"), [("auto", "w4a4"), ("adalog", "w3a3"), ("dopq", "w8a8")])
def test_native_code_equals_the_interpreter(method: str, bits: str) -> None:
    """Bit for bit, at several batch sizes."""
    result = quantized(method, bits)
    compiled = result.compile("cpu", threads=1)
    for batch in (1, 5):
        x = images("ours", batch, seed=batch)
        (expected,) = interpret(result.program, x)
        np.testing.assert_array_equal(np.asarray(compiled(x)), np.asarray(expected), strict=True)


def test_narrower_codes_lose_more() -> None:
    """With every method, three bits are further from float than eight."""
    x = images("ours", 12, seed=5)
    for method in RECIPES:
        wide, narrow = (quantized(method, bits) for bits in ("w8a8", "w3a3"))
        exact = wide.float(x)
        assert isinstance(exact, torch.Tensor)
        assert float((wide(x) - exact).norm()) < float((narrow(x) - exact).norm()), method
