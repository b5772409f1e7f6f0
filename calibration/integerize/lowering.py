"""integerize: every value as codes in the format its reader asks for, or as an int32 accumulator.

Formats flow backwards: a reader asks for ``codes(value, format)``, and the request passes through views,
concatenations and scalings until it meets an operation that can produce codes, or the levels of a codebook. Where
several readers take disjoint channels of one linear in different formats (queries, keys and values of a fused
projection), one requantize with a multiplier per channel serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np

from calibration.calibrated import Calibrated, QParams
from calibration.graph import VIEWS, Operation
from calibration.heads import before_concat, before_view, rescaled
from calibration.integerize import corrected
from calibration.integerize.builder import ProgramBuilder
from calibration.integerize.context import Accumulator, requantize
from calibration.integerize.forms import require_integer_forms
from calibration.integerize.multipliers import Multipliers, RowDivision
from calibration.integerize.nonlinear import FORMS, ends_in_table
from calibration.integerize.operands import OperandQParams, operand_codes
from calibration.integerize.scales import Scales, compress, viewed
from calibration.integerize.shared_requantize import plan_shared_requantize, saturation
from calibration.sites import OUTPUT, Edge, Structure
from quantizers.codebook import CodebookQParams, carrier_table
from quantizers.errors import UsageError
from quantizers.integer.fixed_point import to_fixed_point
from quantizers.integer.program import IntegerProgram, TensorType
from quantizers.integer.verify import verify
from quantizers.uniform import UniformQParams, quantize


def integerize(calibrated: Calibrated) -> IntegerProgram:
    """Turn a calibrated graph into a verified IntegerProgram.

    Raises:
        UnsupportedOperatorError: operators without an integer form, all of them, before any work.
        ProgramError: the verifier refuses the program, for example because an accumulator could overflow.
    """
    require_integer_forms(calibrated.graph, calibrated.recipe.nonlinear)
    program = _Lowering(calibrated).run()
    verify(program)
    return program


def multipliers_of(calibrated: Calibrated) -> Multipliers:
    """Return what the multipliers and reciprocals of a network's program stand for.

    Raises:
        UnsupportedOperatorError: operators without an integer form.
    """
    require_integer_forms(calibrated.graph, calibrated.recipe.nonlinear)
    lowering = _Lowering(calibrated)
    lowering.run()
    return lowering.multipliers()


def sums_of(operation: Operation) -> str:
    """Return the name of the node that holds an operation's int32 sums, where it is one with a product of its own."""
    return f"{operation.name}.sum"


class _Lowering:
    def __init__(self, calibrated: Calibrated) -> None:
        self.graph = calibrated.graph
        self.structure = Structure(calibrated.graph)
        self.formats: Mapping[Edge, QParams] = calibrated.by_edge()
        self.builder = ProgramBuilder(calibrated.graph.inputs)
        self.shapes: Mapping[str, tuple[int, ...]] = calibrated.graph.shapes()
        self.factors: dict[str, tuple[Scales, ...]] = {}
        self.rows: dict[str, RowDivision] = {}
        self.norms: dict[str, list[Scales]] = {}
        self._requests: dict[str, dict[UniformQParams, Scales]] = {}
        self._nonlinear = calibrated.recipe.nonlinear
        self._forms = FORMS[self._nonlinear]
        self._codes: dict[tuple[str, OperandQParams], str] = {}
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
                qparams = self.uniform(OUTPUT, index)
                name, zero_point, scale = self.codes(value, qparams), qparams.zero_point, qparams.scales()
            else:
                accumulator = self.accumulator(value)
                name, zero_point, scale = accumulator.name, 0, accumulator.scale
            constant = self.builder.constant(compress(scale).astype(np.float32), f"{public}.scale")
            kind = TensorType("float32", self.builder.type(name).shape)
            node = self.builder.node("dequantize", (name, constant), kind, public, "", zero_point=zero_point)
            outputs.append((public, node))
        return self.builder.finish(outputs)

    def multipliers(self) -> Multipliers:
        """Return what the multipliers of the program stand for, once it has been written."""
        factors, edges = dict(self.factors), {}
        factors |= {name: (found[0],) for name, found in self.norms.items() if len(found) == 1}
        added = {
            root.name
            for operation in self.graph.operations
            if operation.op == "add"
            for position, value in enumerate(operation.inputs)
            if (operation.name, position) not in self.formats and (root := self.structure.root(value)) is not None
        }
        for name, found in self._requests.items():
            if len(found) == 1 and name not in added:
                factors[name] = tuple(found.values())
        for edge, qparams in self.formats.items():
            wanted = qparams.carrier if isinstance(qparams, CodebookQParams) else qparams
            if edge[0] != OUTPUT and isinstance(wanted, UniformQParams):
                factor = self._factor_of_request(self.structure.producers[edge[0]].inputs[edge[1]], wanted, factors)
                if factor is not None:
                    edges[edge] = compress(factor)
        return Multipliers(factors, edges, self.rows)

    def _factor_of_request(self, value: str, qparams: UniformQParams, known: Collection[str]) -> Scales | None:
        """Return the factor of the multiplier that makes a value in a format, where it is not its operation's own."""
        operation = self.structure.producers.get(value)
        if operation is None:
            return None
        source = operation.inputs[0]
        if operation.op in VIEWS:
            before = before_view(operation, self.shapes[source], qparams)
            inner = None if before is None else self._factor_of_request(source, before, known)
            return None if inner is None else viewed(operation, np.broadcast_to(inner, self.shapes[source]))
        if operation.op == "scale" and operation.real("factor") > 0:
            return self._factor_of_request(source, rescaled(qparams, 1 / operation.real("factor")), known)
        return None if operation.name in known else self._requests.get(operation.name, {}).get(qparams)

    # Codes ------------------------------------------------------------------------------------------

    def codes(self, value: str, qparams: OperandQParams) -> str:
        """Return the program value that holds ``value`` in a format: codes, or the levels of a codebook."""
        return self.once((value, qparams), lambda: self._make_codes(value, qparams))

    def _make_codes(self, value: str, qparams: OperandQParams) -> str:
        if value in self.graph.constants:
            return self.builder.constant(operand_codes(self.graph.constants[value], qparams), f"{value}.codes")
        operation = self.structure.producers.get(value)
        passed_on = None if operation is None else self._passed_on(operation, qparams)
        if passed_on is not None:
            return passed_on
        if isinstance(qparams, CodebookQParams):
            return self._levels(value, operation, qparams)
        if operation is None:
            kind = TensorType(qparams.dtype, self.shapes[value])
            # Seen from before a scaling inside the model, the scale need not be a float32 value any more.
            scale = float(np.float32(qparams.scale[0]))
            label = f"{value}.codes"
            return self.builder.node("quantize", (value,), kind, label, "", scale=scale, **saturation(qparams))
        if self.structure.is_row_relative(operation):
            return self._forms["attention_product"](self, operation, qparams)
        if operation.op in self._forms:
            return self._forms[operation.op](self, operation, qparams)
        return self._requantized(operation, qparams)

    def _passed_on(self, operation: Operation, qparams: OperandQParams) -> str | None:
        """Answer a request behind a transparent operation, or return None for any other operation."""
        if operation.op in VIEWS:
            source = operation.inputs[0]
            before = before_view(operation, self.shapes[source], qparams)
            assert before is not None, "calibration refuses such heads"
            return self._view(operation, self.codes(source, before))
        if operation.op == "scale" and operation.real("factor") > 0:
            return self.codes(operation.inputs[0], rescaled(qparams, 1 / operation.real("factor")))
        if operation.op == "concat":
            formats = before_concat(operation, [self.shapes[name] for name in operation.inputs], qparams)
            parts = [self.codes(name, part) for name, part in zip(operation.inputs, formats, strict=True)]
            return self.builder.concat(parts, operation.integer("axis"), f"{operation.name}.codes", operation.module)
        return None

    def _levels(self, value: str, operation: Operation | None, qparams: CodebookQParams) -> str:
        """Emit the levels of a codebook: in the operation's own table if it is one, otherwise in a table behind it."""
        if operation is not None and ends_in_table(operation, self._nonlinear):
            return corrected.unary(self, operation, qparams)
        codes = self.codes(value, qparams.carrier)
        table = self.builder.constant(carrier_table(qparams.codebook), f"{value}.levels.table")
        kind = TensorType(qparams.dtype, self.shapes[value])
        source = "" if operation is None else operation.module
        return self.builder.node("lookup", (codes, table), kind, f"{value}.levels", source)

    def once(self, key: tuple[str, OperandQParams], make: Callable[[], str]) -> str:
        """Return what ``make`` returned the first time that the key was asked for."""
        if key not in self._codes:
            self._codes[key] = make()
        return self._codes[key]

    def _view(self, operation: Operation, x: str) -> str:
        match operation.op:
            case "reshape":
                return self.builder.reshape(x, operation.integers("shape"), operation.module)
            case "permute":
                return self.builder.permute(x, operation.integers("axes"), operation.module)
        axis, start, stop, step = (operation.integer(key) for key in ("axis", "start", "stop", "step"))
        return self.builder.slice(x, axis, start, stop, step, operation.module)

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
        source = self.operand(operation.name, 0)
        return self._layer(operation, self.codes(operation.inputs[0], source), source)

    def _layer(self, operation: Operation, x: str, source: OperandQParams) -> Accumulator:
        """Emit the integer linear of a linear, or of a convolution on patches."""
        weight, bias = (self.graph.constants[name] for name in operation.inputs[1:])
        qparams = self.uniform(operation.name, 1)
        codes = quantize(weight, qparams).numpy().astype(np.int64).reshape(weight.shape[0], -1)
        scale = source.scales() * qparams.scales()
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
            sums_of(operation),
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
        source = self.operand(operation.name, 0)
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
        left, right = (self.operand(operation.name, position) for position in (0, 1))
        a, b = (self.codes(operation.inputs[i], qparams) for i, qparams in enumerate((left, right)))
        name = self.product(operation, a, left.zero_point, b, right.zero_point)
        return Accumulator(name, left.scales() * right.scales())

    def product(self, operation: Operation, a: str, zero_a: int, b: str, zero_b: int) -> str:
        """Emit the int32 product of two values, for a matmul of the graph."""
        return self.builder.node(
            "matmul",
            (a, b),
            TensorType("int32", operation.shape),
            sums_of(operation),
            operation.module,
            zero_point_a=zero_a,
            zero_point_b=zero_b,
            transpose_b=int(operation.integer("transpose_b")),
        )

    def _multiply(self, operation: Operation) -> Accumulator:
        sides = [self.operand(operation.name, position) for position in (0, 1)]
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
        source, axis = self.uniform(operation.name, 0), operation.integer("axis")
        name = self.builder.node(
            "reduce_sum",
            (self.codes(operation.inputs[0], source),),
            TensorType("int32", operation.shape),
            sums_of(operation),
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
        ratio = accumulator.scale / (target.reshape(-1) if is_conv else target)
        name = requantize(self.builder, operation, accumulator.name, ratio, qparams)
        multiplier, shift = to_fixed_point(ratio)
        factor = multiplier / (np.atleast_1d(ratio) * 2.0**shift)
        found = factor.reshape(-1, 1, 1) if is_conv else factor
        self._requests.setdefault(operation.name, {})[qparams] = found
        if is_conv:
            name = self._as_planes(operation, name)
        if shared:
            self._shared_outputs[operation.name] = name
        return name

    def uniform(self, operation: str, position: int) -> UniformQParams:
        """Return the format of an operand that must be uniform.

        Raises:
            UsageError: it is a codebook.
        """
        qparams = self.operand(operation, position)
        if isinstance(qparams, CodebookQParams):
            raise UsageError(
                f"operand {position} of {operation} is in levels of {qparams.codebook.name}; only activations that a "
                "linear, a convolution or a product reads can have a codebook, choose a uniform format here"
            )
        return qparams

    def operand(self, operation: str, position: int) -> OperandQParams:
        """Return the format of an operand of a product."""
        qparams = self.formats[operation, position]
        assert isinstance(qparams, UniformQParams | CodebookQParams), (operation, position, qparams)
        return qparams
