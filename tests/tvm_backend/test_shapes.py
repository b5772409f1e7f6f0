"""Fused kernels over shapes and constants that nobody would choose: odd sizes, one token, extremes, zero points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import Shape, attention_program, mlp_program, tied_attention
from support.cuda_emulated import emulate

from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from quantizers.integer.verify import verify
from tvm_backend.build import build
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import TARGETS, cpu_features
from tvm_backend.threads import usable_processors

pytestmark = pytest.mark.tvm

#: Of GPUs as the CPU emulates them: before and after asynchronous copies.
ARCHITECTURES = ("sm_75", "sm_80")
RUNNABLE = [t.name for t in TARGETS.values() if t.arch == "x86_64" and cpu_features().issuperset(t.features)]
shapes = st.builds(
    Shape,
    tokens=st.one_of(st.sampled_from([1, 2, 5, 6, 7, 16, 17, 49, 63, 64, 65]), st.integers(1, 80)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 8, 16, 31, 32, 48, 64, 80]),
    seed=st.integers(0, 2**32 - 1),
    windows=st.one_of(st.none(), st.integers(1, 4)),
)
relaxed = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def images(program: IntegerProgram, batch: int, seed: int) -> np.ndarray:
    """Codes of the whole range, their ends often."""
    rng = np.random.default_rng(seed)
    shape = (batch, *program.inputs[0][1].shape)
    ends = rng.choice([-1e6, -128, -127, -1, 0, 1, 126, 127, 128, 255, 1e6], shape)
    return np.where(rng.random(shape) < 0.3, ends, rng.normal(0, 60, shape)).astype(np.float32)


def compare(program: IntegerProgram, target: str, batch: int, seed: int) -> None:
    verify(program)
    if target in ARCHITECTURES:
        programs = [emulate(program, target)]
    else:
        bundle = build(program, target)
        programs = [CompiledProgram(bundle, threads) for threads in range(1, min(2, usable_processors()) + 1)]
    batches = images(program, batch, seed)
    wanted = [value.numpy() for value in interpret(program, torch.from_numpy(batches))]
    for compiled in programs:
        for got, want in zip(compiled(batches), wanted, strict=True):
            np.testing.assert_array_equal(got, want, strict=True)


@relaxed
@given(shapes, st.integers(1, 9), st.sampled_from(RUNNABLE))
def test_attention(shape: Shape, batch: int, target: str) -> None:
    program = attention_program(shape)
    compare(program, target, batch, shape.seed)


@relaxed
@given(shapes, st.integers(1, 9), st.sampled_from(RUNNABLE))
def test_linears_with_epilogues(shape: Shape, batch: int, target: str) -> None:
    compare(mlp_program(shape), target, batch, shape.seed)


@relaxed
@given(shapes, st.integers(1, 3), st.sampled_from(ARCHITECTURES))
def test_attention_on_tensor_cores(shape: Shape, batch: int, architecture: str) -> None:
    compare(attention_program(shape), architecture, batch, shape.seed)


@relaxed
@given(shapes, st.integers(1, 3), st.sampled_from(ARCHITECTURES))
def test_linears_on_tensor_cores(shape: Shape, batch: int, architecture: str) -> None:
    compare(mlp_program(shape), architecture, batch, shape.seed)


@pytest.mark.parametrize("tokens", [197, 1300])
def test_long_rows_of_scores(tokens: int) -> None:
    """They stay in the registers of a GPU as long as these suffice; beyond, operators have a kernel each."""
    program = attention_program(Shape(tokens, 1, 8, 5))
    compiled = emulate(program)
    batches = images(program, 1, 0)
    (wanted,) = interpret(program, torch.from_numpy(batches))
    np.testing.assert_array_equal(compiled(batches)[0], wanted.numpy(), strict=True)
    assert ("attention" in [call.operators for call in compiled.bundle.schedule.calls]) == (tokens == 197)


@pytest.mark.parametrize("windows", [None, 3])
@pytest.mark.parametrize(("seed", "entries"), [(0, 1), (3, 2)])
def test_attention_is_one_kernel(seed: int, entries: int, windows: int | None) -> None:
    program = attention_program(Shape(7, 2, 8, seed, windows))
    numerators = [program.constants[node.inputs[2]].size for node in program.nodes if node.op == "normalize_rows"]
    assert numerators == [entries]
    for bundle in (build(program), emulate(program).bundle):
        calls = [call.operators for call in bundle.schedule.calls]
        assert "attention" in calls
        assert not any("matmul" in operators for operators in calls)


@pytest.mark.parametrize("target", [*RUNNABLE, *ARCHITECTURES])
def test_exact_ties_of_each_head_go_up(target: str) -> None:
    program = tied_attention((1, 3, 5), 70)
    codes = np.arange(-128, 128).repeat(210)[::-1].reshape(-1, 3, 1, 70).astype(np.float32)
    emulated = target in ARCHITECTURES
    (found,) = (emulate(program, target) if emulated else CompiledProgram(build(program, target)))(codes)
    expected = np.floor(codes * np.array([1, 3, 5]).reshape(-1, 1, 1) / 2 + 0.5).clip(-128, 127)
    np.testing.assert_array_equal(found, expected)


def test_epilogues_are_part_of_their_linears() -> None:
    calls = [call.operators for call in build(mlp_program(Shape(7, 2, 8, 0))).schedule.calls]
    assert "linear+requantize+lookup" in calls
    assert "linear+add" in calls
