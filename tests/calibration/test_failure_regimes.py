"""Where the published forms of I-ViT fail: shown in them, absent in the corrected forms, reported from constants."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.twins import exact

from calibration.approximation import (
    LayerNorm,
    _alone,
    float_probabilities,
    probabilities_of,
    unary_error,
)
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.graph import Graph, Operation
from calibration.integerize import integerize
from calibration.rules import Recipe
from calibration.sites import OUTPUT, Site
from quantizers.codebook import uniform_codebook
from quantizers.integer import ivit
from quantizers.integer.interpret import interpret, run
from quantizers.integer.interpret_ivit import shift_exponential
from quantizers.integer.program import IntegerProgram
from quantizers.integer.regimes import REGIMES, find_regimes
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

WIDE, NARROW, ROW = ShiftmaxQParams(16), ShiftmaxQParams(8), RowRelativeQParams(uniform_codebook(8))
INT32 = 2**31 - 1


def byte(scale: float) -> UniformQParams:
    return UniformQParams((float(np.float32(scale)),), 0, -128, 127)


def wide(scale: float) -> UniformQParams:
    return UniformQParams((float(np.float32(scale)),), 0, -32768, 32767)


def kinds(program: IntegerProgram) -> set[str]:
    return {regime.kind for regime in find_regimes(program)}


def attention(keys: int, scores: UniformQParams, probabilities: ShiftmaxQParams | RowRelativeQParams) -> IntegerProgram:
    """A softmax over some keys times values, on its own."""
    operations = (
        Operation("p", "softmax", ("x",), {}, (1, keys), "attn"),
        Operation("o", "matmul", ("p", "v"), {"transpose_b": False}, (1, 4), "attn"),
    )
    graph = Graph((("x", (1, keys)), ("v", (keys, 4))), {}, operations, (("result", "o"),))
    formats = [
        ("x", "scores", "x", ("p", 0), scores),
        ("p", "probability", "p", ("o", 0), probabilities),
        ("v", "value", "v", ("o", 1), byte(1 / 127)),
        ("result", "output", "o", (OUTPUT, 0), wide(1 / 32767)),
    ]
    sites = tuple(CalibratedSite(Site(n, k, v, (e,)), QuantSpec(8), q) for n, k, v, e, q in formats)
    nonlinear = "published" if isinstance(probabilities, ShiftmaxQParams) else "corrected"
    return integerize(Calibrated(graph, Recipe("t", (), nonlinear), sites, 0, ""))


# (a) flat rows of probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [50, 197, 257, 1370])
def test_flat_rows_lose_their_mass_at_8_bits(keys: int) -> None:
    """1/197 is less than 2^-7: every code is cut off to zero. Un-normalized probabilities keep all of it."""
    codes, scores = np.zeros((1, keys), np.int64), byte(0.1)
    published, corrected = (probabilities_of(codes, scores, q).sum() for q in (NARROW, ROW))
    assert published == keys * math.floor(ivit.RECIPROCAL // (keys * (10 << 15)) * (10 << 15) / 2**24) / 2**7
    assert published < 0.79
    assert corrected == pytest.approx(1, abs=1e-12)
    if keys > 128:
        assert published == 0


@pytest.mark.parametrize(("deviation", "lost"), [(0.5, 0.75), (1.0, 0.5), (2.0, 0.25)])
def test_rows_of_noise_lose_most_of_their_mass_at_8_bits(deviation: float, lost: float) -> None:
    """Scores as networks have them; at 16 bits, and un-normalized, all but 3 % stays."""
    scores = byte(deviation * 4.5 / 127)
    codes = np.rint(np.random.default_rng(0).normal(0, deviation, (200, 197)) / scores.scale[0]).clip(-128, 127)
    codes = codes.astype(np.int64)
    narrow, full, row = (probabilities_of(codes, scores, q).sum(-1).mean() for q in (NARROW, WIDE, ROW))
    assert narrow < 1 - lost
    assert full > 0.97
    assert row == pytest.approx(1, abs=1e-12)
    wanted = float_probabilities(codes, scores)
    # Half of the summed distances, which is 1 for distributions that share nothing.
    apart = [np.abs(probabilities_of(codes, scores, q) - wanted).sum(-1).mean() / 2 for q in (NARROW, ROW)]
    assert apart[0] > 5 * apart[1]


def test_lost_mass_reaches_the_result_and_is_reported() -> None:
    """Values of one, equal scores: the mean is one. Eight published bits make it zero."""
    results, reported = [], []
    for probabilities in (NARROW, WIDE, ROW):
        program = attention(197, byte(0.1), probabilities)
        (result,) = interpret(program, torch.zeros(1, 1, 197), torch.ones(1, 197, 4))
        results.append(float(result[0, 0, 0]))
        reported.append(kinds(program))
    assert results[0] == 0
    assert results[1:] == pytest.approx([1, 1], abs=0.02)
    assert reported == [{"softmax_mass"}, set(), set()]
    (regime,) = find_regimes(attention(197, byte(0.1), NARROW))
    assert regime.source == "attn"
    assert regime.detail == "197 equal scores get probabilities that sum to 0.000 at 8 bits"


def test_fine_scores_lose_mass_at_16_bits_too() -> None:
    """The reciprocal 2^31 // sum is 2.9 for 257 keys at a scale of 0.0112: the sum of the row is 2 / 2.9."""
    codes, scores = np.zeros((1, 257), np.int64), byte(1 / 89)
    assert probabilities_of(codes, scores, WIDE).sum() == pytest.approx(2 / (2**16 / (257 * 89)), rel=0.01)
    assert kinds(attention(257, scores, WIDE)) == {"softmax_mass"}
    assert kinds(attention(257, scores, ROW)) == set()


@pytest.mark.parametrize(("scale", "inverse"), [(0.455, 3), (2.5, 1)])
def test_coarse_scores_are_flattened(scale: float, inverse: int) -> None:
    """I0 takes the place of 1 / scale in every exponent: the softmax is that of scores scale I0 times smaller."""
    scores = byte(scale)
    codes = np.array([[0, -1, -2, -4]])
    assert ivit.inverse_scale(scale) == inverse
    published = probabilities_of(codes, scores, WIDE)[0]
    flattened = np.exp(codes[0] / inverse)
    # The shifts of so small integers are coarse as well.
    assert np.abs(published - flattened / flattened.sum()).max() < 0.1
    wanted = float_probabilities(codes, scores)[0]
    assert wanted[0] - published[0] > 0.08
    assert np.abs(probabilities_of(codes, scores, ROW)[0] - wanted).max() < 0.005
    (regime,) = find_regimes(attention(4, scores, WIDE))
    assert regime.kind == "softmax_slope"
    assert regime.detail.startswith(f"I0 is {inverse} for a scale")
    assert kinds(attention(4, scores, ROW)) == set()


# (b) GELU rows with a large maximum -----------------------------------------------------------------------


def gelu(scale: float, nonlinear: str, *rows: list[float]) -> tuple[IntegerProgram, np.ndarray]:
    """Run rows of values through a GELU that reads steps of ``scale`` and writes fine ones."""
    x = torch.tensor(rows)
    operation = Operation("y", "unary", ("x",), {"function": "gelu"}, tuple(x.shape), "act")
    program = _alone(operation, {}, byte(scale), wide(scale / 256), nonlinear)
    return program, interpret(program, x[None])[0][0].numpy()


@pytest.mark.parametrize(("largest", "value", "published"), [(16.0, -8.0, -3.97), (12.0, -4.0, -1.95)])
def test_a_large_row_maximum_gives_a_sigmoid_of_one_half(largest: float, value: float, published: float) -> None:
    """Both exponentials are cut off at 2^-23: what lies 9.4 below the maximum is halved instead of dropped."""
    scale = largest / 127
    program, found = gelu(scale, "published", [largest, value])
    assert found[0, 1] == pytest.approx(published, abs=0.06)
    assert "gelu_maximum" in kinds(program)
    program, found = gelu(scale, "corrected", [largest, value])
    assert found[0, 1] == pytest.approx(0, abs=0.001)
    assert kinds(program) == set()


def test_positive_values_are_halved_too() -> None:
    """A value of 6.05 beside a maximum of 16, and 1.04 beside 12."""
    for largest, value in ((16.0, 6.05), (12.0, 1.04)):
        found = {n: gelu(largest / 127, n, [largest, value])[1][0, 1] for n in ("published", "corrected")}
        assert found["corrected"] == pytest.approx(value, abs=largest / 127 + 0.16)
        assert found["published"] < 0.62 * value


def test_the_limit_is_where_the_report_says() -> None:
    """Below the reported maximum the lowest code keeps its small sigmoid; 9.4 in, what lies below zero is halved."""
    source = byte(16 / 127)
    (regime,) = find_regimes(gelu(16 / 127, "published", [0.0])[0])
    assert regime.kind == "gelu_maximum"
    limit = int(regime.detail.split()[5])
    # At 9.4 where 1 / I0 is the scale, but I0 is rounded up, here from 4.66 to 5; five of 128 codes come 18.3 bits in.
    rounding = ivit.inverse_scale(1.702 * source.scale[0]) * 1.702 * source.scale[0]
    assert limit * source.scale[0] == pytest.approx(9.4 * rounding * 18.3 / 23, rel=0.03)
    target = wide(source.scale[0] / 256)

    def lowest(largest: int) -> float:
        """Return what the lowest code gets instead of almost nothing."""
        return float(unary_error("gelu", source, target, "published", range(largest, largest + 1))[0])

    assert lowest(limit - 1) <= 16.2 / 32
    assert lowest(limit) > 16 / 32
    assert lowest(math.ceil(9.4 * rounding / source.scale[0]) + 1) > 0.49 * 16
    assert unary_error("gelu", source, target, "corrected").max() <= 0.51 * target.scale[0]


@pytest.mark.parametrize(("inverse", "share"), [(22, 0.96), (120, 0.66)])
def test_fine_scales_have_no_bits_left_for_the_reciprocal(inverse: int, share: float) -> None:
    """2^31 over an exponential of I0 2^23 is 256 / I0: floored 11 instead of 11.6, and 1 instead of 2.1."""
    scale = 0.9999 / (1.702 * (inverse - 0.01))
    largest = 127 * scale
    program, found = gelu(scale, "published", [largest])
    wanted = largest / (1 + math.exp(-1.702 * largest))
    assert found[0, 0] < share * wanted
    assert kinds(program) == {"gelu_resolution"}
    program, found = gelu(scale, "corrected", [largest])
    assert found[0, 0] == pytest.approx(wanted, abs=0.03)
    assert kinds(program) == set()


def test_two_exponentials_overflow_int32_at_the_finest_scales() -> None:
    """From I0 = 128 on their sum can leave int32; clipped, the sigmoid is wrong as well."""
    program, found = gelu(1 / 512, "published", [0.1])
    assert "int32_exponentials" in kinds(program)
    assert abs(found[0, 0] - 0.054) > 0.05
    program, found = gelu(1 / 512, "corrected", [0.1])
    assert found[0, 0] == pytest.approx(0.054, abs=0.002)


# (c) the start of Newton's iteration ----------------------------------------------------------------------


def norm(weight: list[float], bias: list[float]) -> LayerNorm:
    return LayerNorm(torch.tensor(weight), torch.tensor(bias), 1e-12, wide(1e-3), wide(1e-3))


@pytest.mark.parametrize(("value", "found"), [(100, 64), (10**4, 108), (10**5, 316)])
def test_the_start_of_the_code_is_late_for_small_variances(value: int, found: int) -> None:
    """Ten halvings of 2^16 end at 64, whatever the variance; the paper's start is at the root."""
    assert ivit.newton_root(value, ivit.CODE_START, 10) == found
    assert ivit.newton_root(value, ivit.PAPER_START, 10) == math.isqrt(value)


def test_small_variances_come_out_too_small_with_the_start_of_the_code() -> None:
    """Deviations of 2 codes over 16 channels have a root of 8: divided by 64 an eighth is left."""
    layer = norm([1.0] * 16, [0.0] * 16)
    codes = np.tile([2, -2], 8)[None].astype(np.int64)
    assert layer.error(codes, "published", ivit.CODE_START).max() == pytest.approx(7 / 8, abs=0.01)
    assert layer.error(codes, "published").max() < 0.01
    assert layer.error(codes, "corrected").max() < 0.01


def test_the_start_of_the_code_is_reported() -> None:
    operation = Operation("y", "layer_norm", ("x", "w", "b"), {"eps": 1e-6}, (1, 16), "norm1")
    constants = {"w": torch.ones(16), "b": torch.zeros(16)}
    program = _alone(operation, constants, byte(0.1), byte(0.1), "published")
    assert kinds(program) == set()
    node = program.nodes[1]
    late = dataclasses.replace(node, attributes={**node.attributes, "start": ivit.CODE_START})
    changed = dataclasses.replace(program, nodes=(program.nodes[0], late, *program.nodes[2:]))
    (regime,) = find_regimes(changed)
    assert regime.kind == "newton_start"
    assert regime.detail.startswith("from 2^16 in 10 steps: rows whose squares sum to less than")
    assert regime.detail.endswith("at least by 64")
    assert kinds(_alone(operation, constants, byte(0.1), byte(0.1), "corrected")) == set()


# (d) int32 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "overflows"), [(1.9, False), (2.01, True), (40.0, True)])
def test_beta_over_gamma_overflows_int32_from_two_roots_of_the_width(ratio: float, overflows: bool) -> None:
    """The bias in steps of sqrt(C) / 2^30: in int32, as published, it wraps. In 64 bits it is right, and reported."""
    width = 64
    gamma = 0.05
    layer = norm([1.0] * (width - 1) + [gamma], [0.0] * (width - 1) + [ratio * math.sqrt(width) * gamma])
    operation = Operation("y", "layer_norm", ("x", "w", "b"), {"eps": 1e-6}, (1, width), "norm1")
    constants = {"w": layer.weight, "b": layer.bias}
    program = _alone(operation, constants, layer.source, layer.target, "published")
    bias = exact(program.constants[program.nodes[1].inputs[2]])[-1]
    assert (bias > INT32) == overflows
    # As int32 code would hold it.
    wrapped = (bias + 2**31) % 2**32 - 2**31
    restored = wrapped * gamma * math.sqrt(width) / 2**30
    assert (abs(restored - float(layer.bias[-1])) > 1) == overflows
    rows = np.rint(np.random.default_rng(0).normal(0, 3000, (4, width))).astype(np.int64)
    assert layer.error(rows, "published").max() < 0.01
    assert layer.error(rows, "corrected").max() < 0.01
    regimes = {regime.kind: regime for regime in find_regimes(program)}
    # A sum with 2^30 overflows a little before the bias does.
    assert "int32_bias" in regimes
    assert not REGIMES["int32_bias"].changes_result
    assert regimes["int32_bias"].detail.startswith("1 of 64 channels, |beta / gamma| up to")
    assert kinds(_alone(operation, constants, layer.source, layer.target, "corrected")) == set()


def test_half_of_the_limit_is_not_reported() -> None:
    layer = norm([1.0] * 64, [7.9] * 64)
    operation = Operation("y", "layer_norm", ("x", "w", "b"), {"eps": 1e-6}, (1, 64), "norm1")
    program = _alone(operation, {"w": layer.weight, "b": layer.bias}, byte(0.1), byte(0.1), "published")
    assert kinds(program) == set()


def test_sums_of_squares_overflow_int32_with_a_16_bit_stream() -> None:
    """384 channels that deviate by 3000 codes: 3.5e9. The program sums in 64 bits; the published graph holds 32."""
    layer = norm([1.0] * 384, [0.0] * 384)
    rows = np.tile([3000, -3000], 192)[None].astype(np.int64)
    assert (rows**2).sum() > 2**31
    assert layer.error(rows, "published").max() < 0.01
    operation = Operation("y", "layer_norm", ("x", "w", "b"), {"eps": 1e-6}, (1, 384), "norm1")
    constants = {"w": layer.weight, "b": layer.bias}
    assert kinds(_alone(operation, constants, layer.source, layer.target, "published")) == {"int32_squares"}
    assert kinds(_alone(operation, constants, byte(0.1), layer.target, "published")) == set()


def test_sums_of_exponentials_overflow_int32() -> None:
    """257 equal scores at a scale of 1/300: as int32 the sum is negative; clipped, the row weighs more than one."""
    scores, keys = byte(1 / 300), 257
    one = int(shift_exponential(torch.tensor([0]), ivit.inverse_scale(scores.scale[0]), ivit.SHIFTMAX_WINDOW))
    assert keys * one > INT32
    with np.errstate(over="ignore"):
        assert np.full(keys, one, np.int32).sum(dtype=np.int32) < 0
    codes = np.zeros((1, keys), np.int64)
    assert probabilities_of(codes, scores, WIDE).sum() > 1.15
    assert probabilities_of(codes, scores, ROW).sum() == pytest.approx(1, abs=1e-12)
    assert kinds(attention(keys, scores, WIDE)) == {"softmax_mass", "int32_exponentials"}
    assert kinds(attention(keys, scores, ROW)) == set()


def test_every_regime_is_shown_here() -> None:
    """Each kind of the table has a summary, an advice, and a test above that reports it."""
    assert set(REGIMES) == {
        *("softmax_mass", "softmax_slope", "gelu_maximum", "gelu_resolution", "newton_start"),
        *("int32_exponentials", "int32_bias", "int32_squares"),
    }
    for kind in REGIMES.values():
        assert kind.summary
        assert kind.advice


def test_values_of_attention_are_bounded_by_their_rows() -> None:
    """1370 keys would overflow by codes alone; a row of probabilities never weighs more than one."""
    program = attention(1370, byte(0.1), WIDE)
    values = run(program, [torch.zeros(1, 1, 1370), torch.ones(1, 1370, 4)])
    (product,) = [node.name for node in program.nodes if node.op == "matmul"]
    assert int(values[product].max()) <= 2**15 * 127
