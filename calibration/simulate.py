"""simulate: run the float graph with every site fake-quantized, which is what papers report.

It predicts the integer program, and at 4 bits a prediction has to be exact: where one code of a token falls to the
other side of a tie, other features follow. So it runs in float64, in which the sums of the program, integers of up to
31 bits times a scale, are exact (float32 moves one 16-bit residual in a thousand by a step); it adds biases as the
program holds them, in whole steps of input times weight; LayerNorm normalizes codes as the program does; and levels of
a codebook are those nearest to carrier codes where the program has carriers. With the program's multipliers and
reciprocals it rounds as the program does, to the last of hundreds of millions of codes.

Where the recipe asks for the published forms of I-ViT, they are computed as in :mod:`calibration.published`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from calibration.apply import apply
from calibration.calibrated import Calibrated, QParams
from calibration.graph import EXECUTORS, VIEWS, Executor, Operation, aligned, execute
from calibration.integerize.layer_norm import epsilon_in_codes
from calibration.integerize.multipliers import Multipliers
from calibration.integerize.nonlinear import ends_in_table
from calibration.published import PUBLISHED_OPERATORS, published_executors
from calibration.sites import OUTPUT, Edge, Structure
from quantizers.codebook import CodebookQParams
from quantizers.integer.interpret import normalized_deviations
from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams, dequantize, quantize

#: What an input of the program passes through before it is quantized, in float32 as in the program.
_BEFORE_THE_DOOR = VIEWS | {"scale"}


class Simulation:
    """How the simulation reads operands and computes operators, for :func:`calibration.graph.execute`.

    Args:
        calibrated: a graph with formats.
        published: the operators that take their published form where the recipe asks for it; all by default. The others
            are float functions of fake-quantized values, so that one operator's share of a loss can be told.
        multipliers: what :func:`calibration.integerize.multipliers_of` returns; exact ratios where None.
    """

    def __init__(
        self,
        calibrated: Calibrated,
        published: Collection[str] = PUBLISHED_OPERATORS,
        multipliers: Multipliers | None = None,
    ) -> None:
        self._formats = calibrated.by_edge()
        self._constants = calibrated.graph.constants
        self._cache: dict[str, Tensor] = {}
        self._on_carrier = _edges_on_carrier(calibrated)
        known = multipliers or Multipliers()
        self._factors = {name: [torch.from_numpy(f) for f in entry] for name, entry in known.factors.items()}
        self._edges = {edge: torch.from_numpy(factor) for edge, factor in known.edges.items()}
        self._rows = known.rows
        self.executors: dict[str, Executor] = dict.fromkeys(("linear", "conv2d", "multiply", "mean"), self._scaled)
        self.executors |= {"matmul": self._matmul, "layer_norm": self._layer_norm, "add": self._add}
        if calibrated.recipe.nonlinear == "published":
            forms = published_executors(calibrated.graph, self._formats)
            self.executors |= {operator: executor for operator, executor in forms.items() if operator in published}

    def read(self, operation: Operation, position: int, value: Tensor) -> Tensor:
        """Return what an operation reads: its operand in its format, float64."""
        qparams = self._formats.get((operation.name, position))
        name = operation.inputs[position]
        if operation.op in ("linear", "conv2d") and position == 2:
            return _in_steps(value.to(torch.float64), self._formats, operation)
        if qparams is None:
            return value if operation.op in _BEFORE_THE_DOOR else value.to(torch.float64)
        if name in self._constants:
            # Weights carry their channels on axis 0; the leading batch axis of a constant is set aside.
            if name not in self._cache:
                self._cache[name] = apply(qparams, value[0].to(torch.float64))[None]
            return self._cache[name]
        if value.dtype == torch.float32 and isinstance(qparams, UniformQParams):
            # An image: the program divides it in float32, and what its codes stand for is exact from there on.
            return dequantize(quantize(value, qparams).to(torch.float64), qparams)
        if (operation.name, position) in self._edges:
            value = value * self._edges[operation.name, position].to(value.device)
        if isinstance(qparams, CodebookQParams) and (operation.name, position) in self._on_carrier:
            value = apply(qparams.carrier, value)
        return apply(qparams, value).to(torch.float64)

    def output(self, index: int, result: Tensor) -> Tensor:
        """Return a result of the network in its format, float32."""
        qparams = self._formats.get((OUTPUT, index))
        return (result if qparams is None else apply(qparams, result)).to(torch.float32)

    def _add(self, operation: Operation, a: Tensor, b: Tensor) -> Tensor:
        sides = aligned(operation, a, b)
        if operation.name in self._factors:
            factors = self._factors[operation.name]
            sides = [side * factor.to(side.device) for side, factor in zip(sides, factors, strict=True)]
        return sides[0] + sides[1]

    def _layer_norm(self, operation: Operation, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        source, unit = self._formats.get((operation.name, 0)), 2.0**LAYER_NORM_FRACTION_BITS
        if not isinstance(source, UniformQParams) or len(source.scale) > 1:
            deviations = functional.layer_norm(x, weight[0].shape, eps=operation.real("eps"))
            return (deviations * unit + 0.5).floor() / unit * weight[0] + bias[0]
        codes = (x / source.scale[0]).round().to(torch.int64)
        epsilon = epsilon_in_codes(operation.real("eps"), x.shape[-1], source.scale[0])
        gain = weight[0]
        if operation.name in self._factors:
            gain = gain * self._factors[operation.name][0].to(x.device)
        return normalized_deviations(codes, epsilon).to(torch.float64) / unit * gain + bias[0]

    def _matmul(self, operation: Operation, a: Tensor, b: Tensor) -> Tensor:
        product = self._scaled(operation, a, b)
        levels, rows = self._formats.get((operation.name, 0)), self._rows.get(operation.name)
        if rows is None or not isinstance(levels, RowRelativeQParams):
            return product
        # The largest probability of a row has the largest level, so that it says what the levels add up to.
        total = (levels.peak / a.amax(-1, keepdim=True)).round()
        numerator, exact = (torch.from_numpy(entry).to(a.device) for entry in (rows.numerator, rows.exact))
        return product * ((numerator / total).floor() * total / exact)

    def _scaled(self, operation: Operation, *operands: Tensor) -> Tensor:
        result: Tensor = EXECUTORS[operation.op](operation, *operands)
        factors = self._factors.get(operation.name)
        return result if factors is None else result * factors[0].to(result.device)


@torch.no_grad()
def simulate(
    calibrated: Calibrated,
    inputs: Sequence[Tensor],
    published: Collection[str] = PUBLISHED_OPERATORS,
    multipliers: Multipliers | None = None,
) -> tuple[Tensor, ...]:
    """Run the simulation.

    Args:
        calibrated: a graph with formats.
        inputs: float32 tensors ``(batch, *shape)``.
        published: as :class:`Simulation` has it.
        multipliers: as :class:`Simulation` has it.

    Returns:
        One float32 tensor for each output.
    """
    rules = Simulation(calibrated, published, multipliers)
    results = execute(calibrated.graph, inputs, rules.read, rules.executors)
    return tuple(rules.output(index, result) for index, result in enumerate(results))


def _edges_on_carrier(calibrated: Calibrated) -> set[Edge]:
    """Return the edges whose levels the program looks up from carrier codes: what no table of a function makes."""
    structure, edges = Structure(calibrated.graph), set()
    for operation in calibrated.graph.operations:
        for position, name in enumerate(operation.inputs):
            root = structure.root(name)
            if root is not None and not ends_in_table(root, calibrated.recipe.nonlinear):
                edges.add((operation.name, position))
    return edges


def _in_steps(bias: Tensor, formats: Mapping[Edge, QParams], operation: Operation) -> Tensor:
    source, weight = (formats.get((operation.name, position)) for position in (0, 1))
    if not isinstance(source, UniformQParams | CodebookQParams) or not isinstance(weight, UniformQParams):
        return bias
    step = torch.from_numpy(source.scales() * weight.scales()).to(bias.device)
    return (bias / step).round() * step
