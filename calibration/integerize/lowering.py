"""integerize: every value as codes in the format its reader asks for, or as an int32 accumulator.

Formats flow backwards: a reader asks for ``codes(value, format)``, and the request passes through views,
concatenations and scalings until it meets an operation that can produce codes. Where several readers take
disjoint channels of one linear in different formats (queries, keys and values of a fused projection), one
requantize with a multiplier per channel serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from calibration.engine import Calibrated
from calibration.graph import UNARY_FUNCTIONS, VIEWS, Operation
from calibration.integerize.builder import ProgramBuilder
from calibration.integerize.forms import require_integer_forms
from calibration.integerize.layer_norm import layer_norm_constants
from calibration.integerize.scales import Scales, compress, viewed
from calibration.integerize.shared_requantize import plan_shared_requantize, rescaled, saturation
from calibration.sites import OUTPUT, Structure
from quantizers.integer.fixed_point import choose_shift, to_common_fixed_point, to_fixed_point
from quantizers.integer.program import IntegerProgram, TensorType
from quantizers.integer.verify import verify
from quantizers.row_relative import RowRelativeQParams, exponential_table
from quantizers.uniform import UniformQParams, quantize

#: Bits of the numerator of ``normalize_rows``: divided by a sum of at least 255 it fits int32.
_NUMERATOR_BITS = 38


@dataclass(frozen=True, slots=True, eq=False)
class Accumulator:
    """An int32 value and what one unit of it is worth; ``scale`` broadcasts to the value's sample shape."""

    name: str
    scale: Scales


def integerize(calibrated: Calibrated) -> IntegerProgram:
    """Turn a calibrated graph into a verified IntegerProgram.

    Raises:
        UnsupportedOperatorError: operators without an integer form, all of them, before any work.
        ProgramError: the verifier refuses the program, for example because an accumulator could overflow.
    """
    require_integer_forms(calibrated.graph)
    program = _Lowering(calibrated).run()
    verify(program)
    return program


class _Lowering:
    def __init__(self, calibrated: Calibrated) -> None:
        self.graph = calibrated.graph
        self.structure = Structure(calibrated.graph)
        self.formats = calibrated.by_edge()
        self.builder = ProgramBuilder(calibrated.graph.inputs)
        self.shapes = calibrated.graph.shapes()
        self._codes: dict[tuple[str, UniformQParams], str] = {}
        self._sums: dict[str, Accumulator] = {}
        self._patch_sums: dict[str, Accumulator] = {}
        self._shared_outputs: dict[str, str] = {}
        self._plans = {
            operation.name: plan_shared_requantize(self.structure, self.formats, operation)
            for operation in calibrated.graph.operations
            if operation.op in ("linear", "conv2d")
        }

    def run(self) -> IntegerProgram:
        outputs = []
        for index, (public, value) in enumerate(self.graph.outputs):
            if (OUTPUT, index) in self.formats:
                qparams = self._uniform(OUTPUT, index)
                name, zero_point, scale = self.codes(value, qparams), qparams.zero_point, qparams.scales()
            else:
                accumulator = self.accumulator(value)
                name, zero_point, scale = accumulator.name, 0, accumulator.scale
            constant = self.builder.constant(compress(scale).astype(np.float32), f"{public}.scale")
            kind = TensorType("float32", self.builder.type(name).shape)
            node = self.builder.node("dequantize", (name, constant), kind, public, "", zero_point=zero_point)
            outputs.append((public, node))
        return self.builder.finish(outputs)

    # Codes ------------------------------------------------------------------------------------------

    def codes(self, value: str, qparams: UniformQParams) -> str:
        """Return the program value that holds ``value`` in a format."""
        key = (value, qparams)
        if key not in self._codes:
            self._codes[key] = self._make_codes(value, qparams)
        return self._codes[key]

    def _make_codes(self, value: str, qparams: UniformQParams) -> str:
        builder = self.builder
        if value in self.graph.constants:
            codes = quantize(self.graph.constants[value], qparams).numpy().astype(qparams.dtype)
            return builder.constant(codes, f"{value}.codes")
        operation = self.structure.producers.get(value)
        if operation is None:
            kind = TensorType(qparams.dtype, self.shapes[value])
            # Seen from before a scaling inside the model, the scale need not be a float32 value any more.
            scale = float(np.float32(qparams.scale[0]))
            return builder.node("quantize", (value,), kind, f"{value}.codes", "", scale=scale, **saturation(qparams))
        if operation.op in VIEWS:
            return self._view(operation, self.codes(operation.inputs[0], qparams))
        if operation.op == "scale" and operation.real("factor") > 0:
            return self.codes(operation.inputs[0], rescaled(qparams, 1 / operation.real("factor")))
        if operation.op == "concat":
            parts = [self.codes(name, qparams) for name in operation.inputs]
            return builder.concat(parts, operation.integer("axis"), f"{value}.codes", operation.module)
        maker: dict[str, Callable[[Operation, UniformQParams], str]] = {
            "layer_norm": self._layer_norm,
            "softmax": self._softmax,
            "unary": self._lookup,
            "add": self._add,
        }
        if operation.op in maker:
            return maker[operation.op](operation, qparams)
        if self.structure.is_row_relative(operation):
            return self._attention_product(operation, qparams)
        return self._requantized(operation, qparams)

    def _view(self, operation: Operation, x: str) -> str:
        match operation.op:
            case "reshape":
                return self.builder.reshape(x, operation.integers("shape"), operation.module)
            case "permute":
                return self.builder.permute(x, operation.integers("axes"), operation.module)
        axis, start, stop, step = (operation.integer(key) for key in ("axis", "start", "stop", "step"))
        return self.builder.slice(x, axis, start, stop, step, operation.module)

    def _layer_norm(self, operation: Operation, qparams: UniformQParams) -> str:
        source = self._uniform(operation.name, 0)
        x = self.codes(operation.inputs[0], source)
        gamma, beta = (self.graph.constants[name].numpy().astype(np.float64) for name in operation.inputs[1:])
        made = layer_norm_constants(gamma, beta, operation.real("eps"), source.scale[0], qparams.scale[0])
        weight = self.builder.constant(made.weight, f"{operation.name}.weight")
        bias = self.builder.constant(made.bias, f"{operation.name}.bias")
        return self.builder.node(
            "layer_norm",
            (x, weight, bias),
            TensorType(qparams.dtype, operation.shape),
            f"{operation.name}.codes",
            operation.module,
            epsilon=made.epsilon,
            shift=made.shift,
            **saturation(qparams),
        )

    def _exponentials(self, operation: Operation, levels: RowRelativeQParams) -> tuple[str, str]:
        """Emit a softmax's numerators and their row sums."""
        scores = self._uniform(operation.name, 0)
        x = self.codes(operation.inputs[0], scores)
        table = self.builder.constant(exponential_table(scores.scale[0], levels), f"{operation.name}.table")
        label, shape = operation.name, operation.shape
        key = (f"{label}@{levels.levels}", scores)
        if key not in self._codes:
            kind = TensorType("uint8", shape)
            self._codes[key] = self.builder.node("exponentials", (x, table), kind, f"{label}.exp", operation.module)
        weights = self._codes[key]
        total_key = (f"{label}@{levels.levels}.sum", scores)
        if total_key not in self._codes:
            kind = TensorType("int32", (*shape[:-1], 1))
            self._codes[total_key] = self.builder.node("row_sum", (weights,), kind, f"{label}.sum", operation.module)
        return weights, self._codes[total_key]

    def _softmax(self, operation: Operation, qparams: UniformQParams) -> str:
        weights, total = self._exponentials(operation, RowRelativeQParams(255))
        return self._normalized(operation, weights, total, 1 / qparams.scale[0], qparams)

    def _attention_product(self, operation: Operation, qparams: UniformQParams) -> str:
        levels = self.formats[operation.name, 0]
        assert isinstance(levels, RowRelativeQParams)
        softmax = self.structure.producers[operation.inputs[0]]
        weights, total = self._exponentials(softmax, levels)
        values = self._uniform(operation.name, 1)
        product = self._product(operation, weights, 0, self.codes(operation.inputs[1], values), values.zero_point)
        return self._normalized(operation, product, total, values.scale[0] / qparams.scale[0], qparams)

    def _normalized(self, operation: Operation, x: str, total: str, ratio: float, qparams: UniformQParams) -> str:
        shift = choose_shift(ratio, bits=_NUMERATOR_BITS)
        return self.builder.node(
            "normalize_rows",
            (x, total),
            TensorType(qparams.dtype, operation.shape),
            f"{operation.name}.codes",
            operation.module,
            numerator=max(1, round(ratio * 2**shift)),
            shift=shift,
            **saturation(qparams),
        )

    def _lookup(self, operation: Operation, qparams: UniformQParams) -> str:
        source = self._uniform(operation.name, 0)
        x = self.codes(operation.inputs[0], source)
        lowest = -128 if source.dtype == "int8" else 0
        steps = torch.arange(lowest, lowest + 256, dtype=torch.float64) - source.zero_point
        function = UNARY_FUNCTIONS[str(operation.attributes["function"])]
        table = quantize(function(steps * source.scale[0]).to(torch.float32), qparams).numpy().astype(qparams.dtype)
        return self.builder.node(
            "lookup",
            (x, self.builder.constant(table, f"{operation.name}.table")),
            TensorType(qparams.dtype, operation.shape),
            f"{operation.name}.codes",
            operation.module,
        )

    def _add(self, operation: Operation, qparams: UniformQParams) -> str:
        names, ratios, zeros = [], [], []
        for position, value in enumerate(operation.inputs):
            if (operation.name, position) in self.formats:
                source = self._uniform(operation.name, position)
                name, scale, zero_point = self.codes(value, source), source.scales(), source.zero_point
            else:
                accumulator = self.accumulator(value)
                name, scale, zero_point = accumulator.name, accumulator.scale, 0
            if value not in self.graph.constants:
                shape = (1,) * (len(operation.shape) - len(self.shapes[value])) + self.shapes[value]
                name = self.builder.reshape(name, shape, operation.module)
            names.append(name)
            ratios.append(compress(scale / qparams.scale[0]))
            zeros.append(zero_point)
        multipliers, shift = to_common_fixed_point(*ratios)
        constants = [self.builder.constant(m, f"{operation.name}.multiplier") for m in multipliers]
        return self.builder.node(
            "add",
            (*names, *constants),
            TensorType(qparams.dtype, operation.shape),
            f"{operation.name}.codes",
            operation.module,
            zero_point_a=zeros[0],
            zero_point_b=zeros[1],
            shift=shift,
            **saturation(qparams),
        )

    # Accumulators -----------------------------------------------------------------------------------

    def accumulator(self, value: str) -> Accumulator:
        """Return a value as int32 sums with their scale; views and scalings are followed to the operation."""
        operation = self.structure.producers[value]
        if operation.op == "scale":
            inner = self.accumulator(operation.inputs[0])
            return Accumulator(inner.name, inner.scale * operation.real("factor"))
        if operation.op in VIEWS:
            inner = self.accumulator(operation.inputs[0])
            scale = np.broadcast_to(inner.scale, self.shapes[operation.inputs[0]])
            return Accumulator(self._view(operation, inner.name), compress(viewed(operation, scale)))
        if value not in self._sums:
            makers: dict[str, Callable[[Operation], Accumulator]] = {
                "linear": self._linear,
                "conv2d": self._conv2d,
                "matmul": self._matmul,
                "multiply": self._multiply,
                "mean": self._mean,
            }
            self._sums[value] = makers[operation.op](operation)
        return self._sums[value]

    def _linear(self, operation: Operation) -> Accumulator:
        source = self._uniform(operation.name, 0)
        return self._layer(operation, self.codes(operation.inputs[0], source), source)

    def _layer(self, operation: Operation, x: str, source: UniformQParams) -> Accumulator:
        """Emit the integer linear of a linear, or of a convolution on patches."""
        weight, bias = (self.graph.constants[name] for name in operation.inputs[1:])
        qparams = self._uniform(operation.name, 1)
        codes = quantize(weight, qparams).numpy().astype(np.int64).reshape(weight.shape[0], -1)
        scale = source.scale[0] * qparams.scales()
        offset = np.rint(bias.numpy().astype(np.float64) / scale) - source.zero_point * codes.sum(1)
        kind = TensorType("int32", (*self.builder.type(x).shape[:-1], len(codes)))
        name = self.builder.node(
            "linear",
            (
                x,
                self.builder.constant(codes.astype(np.int8), f"{operation.inputs[1]}.codes"),
                self.builder.constant(offset.astype(np.int32), f"{operation.inputs[2]}.codes"),
            ),
            kind,
            f"{operation.name}.sum",
            operation.module,
        )
        return Accumulator(name, scale)

    def _conv2d(self, operation: Operation) -> Accumulator:
        rows = self._patch_rows(operation)
        return Accumulator(self._as_planes(operation, rows.name), rows.scale.reshape(-1, 1, 1))

    def _patch_rows(self, operation: Operation) -> Accumulator:
        """Emit a convolution as a linear on patches: int32[windows, channels]."""
        if operation.name in self._patch_sums:
            return self._patch_sums[operation.name]
        source = self._uniform(operation.name, 0)
        x = self.codes(operation.inputs[0], source)
        kernel = tuple(self.graph.constants[operation.inputs[1]].shape[2:])
        channels, (height, width) = self.shapes[operation.inputs[0]][0], operation.shape[1:]
        rows = self.builder.node(
            "patches",
            (x,),
            TensorType(source.dtype, (height * width, channels * math.prod(kernel))),
            f"{operation.name}.patches",
            operation.module,
            kernel=kernel,
            stride=operation.integers("stride"),
            padding=operation.integers("padding"),
            pad_value=source.zero_point,
        )
        self._patch_sums[operation.name] = self._layer(operation, rows, source)
        return self._patch_sums[operation.name]

    def _as_planes(self, operation: Operation, rows: str) -> str:
        turned = self.builder.permute(rows, (1, 0), operation.module)
        return self.builder.reshape(turned, operation.shape, operation.module)

    def _matmul(self, operation: Operation) -> Accumulator:
        left, right = (self._uniform(operation.name, position) for position in (0, 1))
        a, b = (self.codes(operation.inputs[i], qparams) for i, qparams in enumerate((left, right)))
        name = self._product(operation, a, left.zero_point, b, right.zero_point)
        return Accumulator(name, left.scales() * right.scales())

    def _product(self, operation: Operation, a: str, zero_a: int, b: str, zero_b: int) -> str:
        return self.builder.node(
            "matmul",
            (a, b),
            TensorType("int32", operation.shape),
            f"{operation.name}.sum",
            operation.module,
            zero_point_a=zero_a,
            zero_point_b=zero_b,
            transpose_b=int(operation.integer("transpose_b")),
        )

    def _multiply(self, operation: Operation) -> Accumulator:
        sides = [self._uniform(operation.name, position) for position in (0, 1)]
        names = [self.codes(value, side) for value, side in zip(operation.inputs, sides, strict=True)]
        name = self.builder.node(
            "multiply",
            names,
            TensorType("int32", operation.shape),
            f"{operation.name}.product",
            operation.module,
            zero_point_a=sides[0].zero_point,
            zero_point_b=sides[1].zero_point,
        )
        return Accumulator(name, sides[0].scales() * sides[1].scales())

    def _mean(self, operation: Operation) -> Accumulator:
        source, axis = self._uniform(operation.name, 0), operation.integer("axis")
        name = self.builder.node(
            "reduce_sum",
            (self.codes(operation.inputs[0], source),),
            TensorType("int32", operation.shape),
            f"{operation.name}.sum",
            operation.module,
            axis=axis,
            zero_point=source.zero_point,
        )
        return Accumulator(name, source.scales() / self.shapes[operation.inputs[0]][axis])

    def _requantized(self, operation: Operation, qparams: UniformQParams) -> str:
        plan = self._plans.get(operation.name)
        shared = plan is not None and qparams in plan.members
        target = plan.scale if plan is not None and shared else qparams.scales()
        if shared and operation.name in self._shared_outputs:
            return self._shared_outputs[operation.name]
        is_conv = operation.op == "conv2d"
        # Requantizing the rows, before they are turned into planes, lets the turning cancel with the
        # reader's own view, and keeps channels last.
        accumulator = self._patch_rows(operation) if is_conv else self.accumulator(operation.name)
        multiplier, shift = to_fixed_point(compress(accumulator.scale / (target.reshape(-1) if is_conv else target)))
        name = self.builder.node(
            "requantize",
            (accumulator.name, self.builder.constant(multiplier, f"{operation.name}.multiplier")),
            TensorType(qparams.dtype, self.builder.type(accumulator.name).shape),
            f"{operation.name}.codes",
            operation.module,
            input_zero_point=0,
            shift=shift,
            **saturation(qparams),
        )
        if is_conv:
            name = self._as_planes(operation, name)
        if shared:
            self._shared_outputs[operation.name] = name
        return name

    def _uniform(self, operation: str, position: int) -> UniformQParams:
        qparams = self.formats[operation, position]
        assert isinstance(qparams, UniformQParams), (operation, position, qparams)
        return qparams
