"""Programs whose linears and products read levels of codebooks: equal to the interpreter, and no dearer than codes."""

from __future__ import annotations

import functools

import pytest
import torch
from support.codebooks import GELU_LOW, with_codebooks
from support.compiled import compile_for
from support.models import ours, recipe, spread

from calibration.engine import calibrate
from calibration.integerize import integerize
from calibration.trace import trace
from quantizers.adalog import adalog
from quantizers.integer.program import IntegerProgram
from quantizers.logarithm import log_sqrt2
from quantizers.tangent import tangent
from tvm_backend.build import build

pytestmark = pytest.mark.tvm

FC2, PROJ = r".*\.mlp\.fc2\.input", r".*\.attn\.proj\.input"


@functools.cache
def program(width: int, heads: int, operands: tuple[str, ...]) -> IntegerProgram:
    """Return a ViT of one block whose FC2 and PROJ inputs have codebooks, and the operands of some kinds."""
    model = spread(ours(embed_dim=width, num_heads=heads, depth=1))
    x = torch.randn((8, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    result = calibrate(trace(model, (x[:2],)), [(image,) for image in x], recipe())
    signed = tangent(6, 1.2)
    result = with_codebooks(result, {PROJ: signed, "probability": log_sqrt2(4), **dict.fromkeys(operands, signed)})
    return integerize(with_codebooks(result, {FC2: adalog(4, 20)}, low=GELU_LOW))


@pytest.mark.parametrize(("width", "heads"), [(66, 3), (128, 2), (130, 1)])
def test_each_instruction_set_equals_interpreter(width, heads, runnable_target, check):
    """Heads of ragged vectors, of one whole lookup, and of more than a lookup takes."""
    chosen = program(width, heads, ())
    compiled = compile_for(chosen, runnable_target)
    for batch in (1, 3):
        images = torch.randn((batch, 1, 8, 8), generator=torch.Generator().manual_seed(batch)).numpy()
        check(chosen, compiled, images)


def test_each_instruction_set_reads_levels_in_attention(runnable_target, check):
    """Queries, keys and values may be levels, as unsigned as probabilities are; and norms write them for linears."""
    chosen = program(66, 3, ("query", "key", "value", r".*\.attn\.qkv\.input", r".*\.mlp\.fc1\.input"))
    compiled = compile_for(chosen, runnable_target)
    for batch in (1, 3):
        images = torch.randn((batch, 1, 8, 8), generator=torch.Generator().manual_seed(batch)).numpy()
        check(chosen, compiled, images)


def test_tables_are_part_of_what_they_follow():
    """Neither the GELU's table nor the one behind an attention is a pass of its own, and heads are not turned."""
    calls = [call.operators for call in build(program(24, 3, ())).schedule.calls]
    assert calls.count("linear+requantize+lookup") == 1
    assert calls.count("attention") == 1
    assert not any(call in ("lookup", "permute+reshape", "permute") for call in calls)
