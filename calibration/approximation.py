"""What the integer forms of softmax, GELU and LayerNorm cost: their error against float, for given scales.

GELU and LayerNorm are measured on the very nodes that integerize writes for them, on their own in a program. A softmax
is measured as its probabilities enter the product with the values. Errors include the rounding to the output's steps,
half a step, which no form avoids.

============  ==========================================================================================
operator      rows it is measured on
============  ==========================================================================================
softmax       scores of normal distribution with deviations of 1/32, 1/8 and 1/3 of the codes' range,
              equal scores, and one score above equal ones
GELU          every code, in rows of every maximum from zero to the highest code
LayerNorm     channels of normal distribution with deviations of 2, 8, 64, 512 and 4096 codes and
              a mean of as much, rows with one outlier of 30 deviations, and a constant row
============  ==========================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from calibration.calibrated import Calibrated, CalibratedSite, QParams
from calibration.graph import UNARY_FUNCTIONS, Graph, Operation
from calibration.integerize import integerize
from calibration.integerize.published import SHIFT_GELU_FUNCTIONS
from calibration.published import reading_formats
from calibration.rules import NONLINEAR, Recipe
from calibration.sites import OUTPUT, Edge, Site
from quantizers.codebook import uniform_codebook
from quantizers.integer import ivit
from quantizers.integer.interpret import interpret
from quantizers.integer.interpret_ivit import shiftmax
from quantizers.integer.program import IntegerProgram
from quantizers.row_relative import RowRelativeQParams, exponential_table
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams

Codes = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_ROWS_OF_A_KIND = 16
_DEVIATIONS = (2, 8, 64, 512, 4096)


@dataclass(frozen=True, slots=True)
class Approximation:
    """Error of an operator in one of its forms.

    Args:
        operation: name in the graph.
        module: its place in the model.
        kind: ``softmax``, ``layer_norm`` or the function of a unary operator.
        nonlinear: which form, a member of :data:`calibration.rules.NONLINEAR`.
        in_use: whether it is the program's.
        step: real value of one step of the result; for row-relative probabilities that of the largest.
        largest: largest absolute error.
        mean: mean absolute error.
    """

    operation: str
    module: str
    kind: str
    nonlinear: str
    in_use: bool
    step: float
    largest: float
    mean: float

    @property
    def largest_steps(self) -> float:
        """Largest error in steps of the result."""
        return self.largest / self.step

    @property
    def mean_steps(self) -> float:
        """Mean error in steps of the result."""
        return self.mean / self.step


def approximations(calibrated: Calibrated) -> tuple[Approximation, ...]:
    """Measure both forms of every softmax, GELU and LayerNorm of a graph with its calibrated scales."""
    formats = calibrated.by_edge()
    found = []
    for operation in calibrated.graph.operations:
        for nonlinear in NONLINEAR:
            measured = _measure(calibrated.graph, formats, operation, nonlinear)
            if measured is not None:
                step, error = measured
                kind = str(operation.attributes.get("function", operation.op))
                used = nonlinear == calibrated.recipe.nonlinear
                where = (operation.name, operation.module, kind, nonlinear, used)
                found.append(Approximation(*where, step, float(error.max()), float(error.mean())))
    return tuple(found)


def _measure(
    graph: Graph, formats: Mapping[Edge, QParams], operation: Operation, nonlinear: str
) -> tuple[float, Reals] | None:
    """Return the step of an operator's result and its absolute errors, or None where it has no forms to compare."""
    source = formats.get((operation.name, 0))
    if operation.op not in ("softmax", "unary", "layer_norm") or not isinstance(source, UniformQParams):
        return None
    if operation.op == "softmax":
        probabilities = _probability_format(graph, formats, operation, nonlinear)
        codes = softmax_rows(source, operation.shape[-1])
        found = probabilities_of(codes, source, probabilities)
        step = 1 / probabilities.peak if isinstance(probabilities, RowRelativeQParams) else probabilities.scale
        return step, np.abs(found - float_probabilities(codes, source))
    read = reading_formats(graph, formats, operation.name)
    # Of several steps the finest, where an error shows most.
    targets = sorted((_finest(qparams) for qparams in read), key=lambda qparams: qparams.scale)
    if not targets:
        return None
    if operation.op == "layer_norm":
        weight, bias = (graph.constants[name] for name in operation.inputs[1:])
        if nonlinear == "published" and bool(((weight == 0) & (bias != 0)).any()):
            return None
        norm = LayerNorm(weight, bias, operation.real("eps"), source, targets[0])
        return targets[0].scale[0], norm.error(layer_norm_rows(source, len(weight)), nonlinear)
    function = str(operation.attributes["function"])
    if function not in SHIFT_GELU_FUNCTIONS:
        return None
    return targets[0].scale[0], unary_error(function, source, targets[0], nonlinear)


def _finest(qparams: UniformQParams) -> UniformQParams:
    return dataclasses.replace(qparams, scale=(min(qparams.scale),))


def _probability_format(
    graph: Graph, formats: Mapping[Edge, QParams], operation: Operation, nonlinear: str
) -> RowRelativeQParams | ShiftmaxQParams:
    """Return the format of the probabilities; that of the form which is not in use has its preset's width."""
    readers = graph.consumers().get(operation.name, [])
    used = [formats.get((reader.name, position)) for reader, position in readers]
    wanted = ShiftmaxQParams if nonlinear == "published" else RowRelativeQParams
    chosen = [qparams for qparams in used if isinstance(qparams, wanted)]
    if chosen:
        return chosen[0]
    return ShiftmaxQParams(16) if nonlinear == "published" else RowRelativeQParams(uniform_codebook(8))


# Softmax ------------------------------------------------------------------------------------------------


def softmax_rows(source: UniformQParams, keys: int) -> Codes:
    """Return scores, int64 (rows, keys), as the table above says."""
    rng = np.random.default_rng(0)
    width = source.qmax - source.qmin
    rows = [rng.normal(0, width * share, (_ROWS_OF_A_KIND, keys)) for share in (1 / 32, 1 / 8, 1 / 3)]
    peak = np.zeros((1, keys))
    peak[0, 0] = source.qmax
    codes = np.rint(np.concatenate([*rows, np.zeros((1, keys)), peak])) + source.zero_point
    return np.clip(codes, source.qmin, source.qmax).astype(np.int64)


def probabilities_of(codes: Codes, source: UniformQParams, qparams: RowRelativeQParams | ShiftmaxQParams) -> Reals:
    """Return the probabilities that an integer softmax gives to the values that it is multiplied with.

    Args:
        codes: int64 (rows, keys).
        source: format of the scores.
        qparams: format of the probabilities, which says the form too.
    """
    if isinstance(qparams, ShiftmaxQParams):
        inverse = ivit.inverse_scale(source.scale[0])
        result = shiftmax(torch.from_numpy(codes), inverse, ivit.SHIFTMAX_WINDOW, qparams.bits)
        return result.numpy().astype(np.float64) * qparams.scale
    table = exponential_table(source.scale[0], qparams).astype(np.float64)
    weights: Reals = table[codes.max(-1, keepdims=True) - codes]
    return weights / weights.sum(-1, keepdims=True)


def float_probabilities(codes: Codes, source: UniformQParams) -> Reals:
    """Return the softmax of the scores that codes stand for, float64 (rows, keys)."""
    exponentials: Reals = np.exp(source.scale[0] * (codes - codes.max(-1, keepdims=True)))
    return exponentials / exponentials.sum(-1, keepdims=True)


# GELU ---------------------------------------------------------------------------------------------------


def unary_error(
    function: str, source: UniformQParams, target: UniformQParams, nonlinear: str, maxima: range | None = None
) -> Reals:
    """Return the absolute errors of a function of one value.

    Args:
        function: a key of :data:`calibration.graph.UNARY_FUNCTIONS`.
        source: format of its input.
        target: format of its result; values beyond its range count as its ends.
        nonlinear: which form.
        maxima: the largest codes of the rows; all from zero to the highest by default.

    Returns:
        float64 (n,), one for each row and each code that the row holds.
    """
    maxima = range(source.zero_point, source.qmax + 1) if maxima is None else maxima
    every = np.arange(source.qmin, source.qmax + 1)
    # Codes above the maximum of a row are replaced by it and not counted.
    codes = np.minimum(every, np.array(maxima)[:, None])
    counted = every <= np.array(maxima)[:, None]
    wanted = UNARY_FUNCTIONS[function](torch.from_numpy(_reals(codes, source))).numpy()
    operation = Operation("y", "unary", ("x",), {"function": function}, codes.shape)
    program = _alone(operation, {}, source, target, nonlinear)
    return _errors(program, codes, source, target, wanted)[counted]


# LayerNorm ----------------------------------------------------------------------------------------------


def layer_norm_rows(source: UniformQParams, channels: int) -> Codes:
    """Return codes, int64 (rows, channels), as the table above says; rows beyond the format's range are left out."""
    rng = np.random.default_rng(0)
    rows = []
    for deviation in _DEVIATIONS:
        if 4 * deviation < source.qmax - source.zero_point:
            block = rng.normal(deviation, deviation, (_ROWS_OF_A_KIND, channels))
            rows += [block, block[:1] + 30 * deviation * (np.arange(channels) == channels // 2)]
    rows.append(np.full((1, channels), 7.0))
    codes = np.rint(np.concatenate(rows)) + source.zero_point
    return np.clip(codes, source.qmin, source.qmax).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """A LayerNorm with formats.

    Args:
        weight: float32 (channels,).
        bias: float32 (channels,).
        eps: added to the variance.
        source: format of its input.
        target: format of its result; values beyond its range count as its ends.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    source: UniformQParams
    target: UniformQParams

    def error(self, codes: Codes, nonlinear: str, start: int = ivit.PAPER_START) -> Reals:
        """Return the absolute errors on rows of codes.

        Args:
            codes: int64 (rows, channels).
            nonlinear: which form.
            start: exponent of Newton's start in the published form, or that of the paper.
        """
        operation = Operation("y", "layer_norm", ("x", "weight", "bias"), {"eps": self.eps}, codes.shape)
        constants = {"weight": self.weight, "bias": self.bias}
        program = _alone(operation, constants, self.source, self.target, nonlinear)
        program = dataclasses.replace(
            program,
            nodes=tuple(
                dataclasses.replace(node, attributes={**node.attributes, "start": start})
                if node.op == "i_layer_norm"
                else node
                for node in program.nodes
            ),
        )
        weight, bias = self.weight.to(torch.float64), self.bias.to(torch.float64)
        values = torch.from_numpy(_reals(codes, self.source))
        wanted = functional.layer_norm(values, weight.shape, weight, bias, self.eps).numpy()
        return _errors(program, codes, self.source, self.target, wanted)


# One operator as a program ------------------------------------------------------------------------------


def _alone(
    operation: Operation,
    constants: Mapping[str, Tensor],
    source: UniformQParams,
    target: UniformQParams,
    nonlinear: str,
) -> IntegerProgram:
    graph = Graph((("x", operation.shape),), constants, (operation,), (("result", operation.name),))
    sites = (
        CalibratedSite(Site("x", "activation_input", "x", ((operation.name, 0),)), QuantSpec(8), source),
        CalibratedSite(Site("result", "output", operation.name, ((OUTPUT, 0),)), QuantSpec(8), target),
    )
    return integerize(Calibrated(graph, Recipe("alone", (), nonlinear), sites, 0, ""))


def _reals(codes: Codes, qparams: UniformQParams) -> Reals:
    values: Reals = (codes - qparams.zero_point) * np.float64(np.float32(qparams.scale[0]))
    return values


def _errors(
    program: IntegerProgram, codes: Codes, source: UniformQParams, target: UniformQParams, wanted: Reals
) -> Reals:
    images = torch.from_numpy(_reals(codes, source).astype(np.float32))[None]
    (result,) = interpret(program, images)
    low, high = _reals(np.array([target.qmin, target.qmax]), target)
    return np.abs(result[0].numpy().astype(np.float64) - np.clip(wanted, low, high))
