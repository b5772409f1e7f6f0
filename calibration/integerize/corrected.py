"""The corrected forms: tables of 256 entries, un-normalized probabilities, one rounding for each sum.

Arithmetic in :mod:`quantizers.integer.ops`, reasons in ``docs/numerics.md``.
"""

from __future__ import annotations

import numpy as np
import torch

from calibration.graph import UNARY_FUNCTIONS, Operation
from calibration.integerize.context import Context, add_operands
from calibration.integerize.layer_norm import layer_norm_constants
from calibration.integerize.multipliers import RowDivision
from calibration.integerize.operands import OperandQParams, operand_codes
from calibration.integerize.scales import Scales, compress
from calibration.integerize.shared_requantize import saturation
from quantizers.codebook import uniform_codebook
from quantizers.integer.fixed_point import choose_shift, to_common_fixed_point
from quantizers.integer.program import TensorType
from quantizers.row_relative import RowRelativeQParams, exponential_table
from quantizers.uniform import UniformQParams

#: Bits of the numerator of ``normalize_rows``: divided by a sum of at least 255 it fits int32.
_NUMERATOR_BITS = 38


def layer_norm(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a LayerNorm with an exact square root."""
    source, builder = context.uniform(operation.name, 0), context.builder
    x = context.codes(operation.inputs[0], source)
    gamma, beta = (context.graph.constants[name].numpy().astype(np.float64) for name in operation.inputs[1:])
    made = layer_norm_constants(gamma, beta, operation.real("eps"), source.scale[0], qparams.scales())
    # Where several formats are made of one result, each has weights of its own, and no factor is right for all.
    gain = made.weight / np.where(made.weight == 0, 1, made.gain * 2.0**made.shift)
    context.norms.setdefault(operation.name, []).append(np.where(made.weight == 0, 1.0, gain))
    weight = builder.constant(made.weight, f"{operation.name}.weight")
    bias = builder.constant(made.bias, f"{operation.name}.bias")
    return builder.node(
        "layer_norm",
        (x, weight, bias),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
        epsilon=made.epsilon,
        shift=made.shift,
        **saturation(qparams),
    )


def softmax(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a softmax that stands alone: exponentials by table, divided by their row's sum."""
    weights, total = _exponentials(context, operation, RowRelativeQParams(uniform_codebook(8)))
    return _normalized(context, operation, weights, total, 1 / qparams.scales(), qparams)


def attention_product(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a softmax times values, divided once for each row of the product."""
    levels = context.formats[operation.name, 0]
    assert isinstance(levels, RowRelativeQParams)
    producer = context.structure.producers[operation.inputs[0]]
    weights, total = _exponentials(context, producer, levels)
    values = context.operand(operation.name, 1)
    product = context.product(operation, weights, 0, context.codes(operation.inputs[1], values), values.zero_point)
    return _normalized(context, operation, product, total, values.scales() / qparams.scales(), qparams)


def unary(context: Context, operation: Operation, qparams: OperandQParams) -> str:
    """Emit a function of one value as a table of codes, or of the levels of a codebook."""
    source = context.uniform(operation.name, 0)
    x = context.codes(operation.inputs[0], source)
    lowest = -128 if source.dtype == "int8" else 0
    steps = torch.arange(lowest, lowest + 256, dtype=torch.float64) - source.zero_point
    function = UNARY_FUNCTIONS[str(operation.attributes["function"])]
    table = operand_codes(function(steps * source.scale[0]).to(torch.float32), qparams)
    return context.builder.node(
        "lookup",
        (x, context.builder.constant(table, f"{operation.name}.table")),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
    )


def add(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a sum of two scales with one rounding."""
    operands, builder = add_operands(context, operation), context.builder
    ratios = [compress(o.scale / qparams.scales()) for o in operands]
    multipliers, shift = to_common_fixed_point(*ratios)
    context.factors[operation.name] = tuple(
        m / (ratio * 2.0**shift) for m, ratio in zip(multipliers, ratios, strict=True)
    )
    constants = [builder.constant(m, f"{operation.name}.multiplier") for m in multipliers]
    return builder.node(
        "add",
        (*(o.name for o in operands), *constants),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
        zero_point_a=operands[0].zero_point,
        zero_point_b=operands[1].zero_point,
        shift=shift,
        **saturation(qparams),
    )


def _exponentials(context: Context, operation: Operation, levels: RowRelativeQParams) -> tuple[str, str]:
    """Emit a softmax's numerators and their row sums."""
    scores, builder = context.uniform(operation.name, 0), context.builder
    x = context.codes(operation.inputs[0], scores)
    table = builder.constant(exponential_table(scores.scale[0], levels), f"{operation.name}.table")
    label, shape, module = operation.name, operation.shape, operation.module
    weights = context.once(
        (f"{label}@{levels.codebook}", scores),
        lambda: builder.node("exponentials", (x, table), TensorType("uint8", shape), f"{label}.exp", module),
    )
    total = context.once(
        (f"{label}@{levels.codebook}.sum", scores),
        lambda: builder.node("row_sum", (weights,), TensorType("int32", (*shape[:-1], 1)), f"{label}.sum", module),
    )
    return weights, total


def _normalized(
    context: Context, operation: Operation, x: str, total: str, ratio: Scales, qparams: UniformQParams
) -> str:
    # One entry where all heads agree: kernels have it as an immediate.
    ratio = compress(ratio)
    shift = choose_shift(float(ratio.max()), bits=_NUMERATOR_BITS)
    numerator = np.maximum(1, np.rint(ratio * 2.0**shift)).astype(np.int64)
    context.rows[operation.name] = RowDivision(numerator, ratio * 2.0**shift)
    return context.builder.node(
        "normalize_rows",
        (x, total, context.builder.constant(numerator, f"{operation.name}.numerator")),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
        shift=shift,
        **saturation(qparams),
    )
