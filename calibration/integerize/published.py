"""The forms of I-ViT as published (arXiv 2207.01405): Shiftmax, ShiftGELU, I-LayerNorm, sums with two roundings.

Arithmetic in :mod:`quantizers.integer.ops`, where paper and code differ and what they cost in
``docs/integer-nonlinearities.md``. Functions of one value that the paper does not treat keep their table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.graph import Operation
from calibration.integerize import corrected
from calibration.integerize.context import AddOperand, Context, add_operands, requantize
from calibration.integerize.scales import compress
from calibration.integerize.shared_requantize import saturation
from quantizers.errors import ProgramError
from quantizers.integer import ivit
from quantizers.integer.fixed_point import choose_shift, to_fixed_point
from quantizers.integer.program import INTEGER_RANGES, TensorType
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.uniform import UniformQParams

#: The functions that ShiftGELU stands for: all of them are within 0.021 of ``x sigmoid(1.702 x)``.
SHIFT_GELU_FUNCTIONS = frozenset({"gelu", "gelu_tanh", "quick_gelu"})
#: Width of a softmax that is not the left side of a product, as ViT and DeiT have it.
_LONE_SOFTMAX = ShiftmaxQParams(16)


@dataclass(frozen=True, slots=True, eq=False)
class ILayerNormConstants:
    """``(n + bias) gain`` is the normalized value times gamma plus beta, for ``n`` of the published I-LayerNorm.

    Args:
        gain: float64 (C,), ``gamma sqrt(C) / 2^30``.
        bias: int64 (C,), ``floor(beta / gamma 2^30 / sqrt(C))``.
    """

    gain: npt.NDArray[np.float64]
    bias: npt.NDArray[np.int64]


def i_layer_norm_constants(
    gamma: npt.NDArray[np.float64], beta: npt.NDArray[np.float64], where: str
) -> ILayerNormConstants:
    """Express gamma and beta as the published form does: beta as a multiple of gamma.

    Args:
        gamma: (C,), either sign.
        beta: (C,); zero where gamma is.
        where: names the layer in errors.

    Raises:
        ProgramError: beta cannot be expressed, with the channel.
    """
    step = np.sqrt(len(gamma)) / 2.0**ivit.NORMALIZED_BITS
    impossible = (gamma == 0) & (beta != 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.where(gamma == 0, 0.0, np.floor(beta / gamma / step))
    impossible |= np.abs(bias) >= 2.0**62
    if impossible.any():
        channel = int(np.flatnonzero(impossible)[0])
        raise ProgramError(
            f"{where}: the published I-LayerNorm divides beta by gamma; channel {channel} has a beta of "
            f"{beta[channel]:g} and a gamma of {gamma[channel]:g}; quantize with 'nonlinear: corrected'"
        )
    return ILayerNormConstants(gamma * step, bias.astype(np.int64))


def layer_norm(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit I-LayerNorm with the paper's Newton start, and its requantization in the same operator."""
    builder, where = context.builder, operation.module or operation.name
    x = context.codes(operation.inputs[0], context.uniform(operation.name, 0))
    gamma, beta = (context.graph.constants[name].numpy().astype(np.float64) for name in operation.inputs[1:])
    made = i_layer_norm_constants(gamma, beta, where)
    ratio = made.gain / qparams.scales()
    reach = np.abs(ratio) * (2.0**ivit.NORMALIZED_BITS + np.abs(made.bias))
    # Sums of 2^30 and a bias beyond int32 leave their product with a multiplier of 31 bits no room in int64.
    shift = min(choose_shift(float(np.abs(ratio).max())), choose_shift(float(reach.max()), bits=61))
    far = np.flatnonzero(np.abs(made.bias) > 2**shift)
    if len(far):
        channel = int(far[0])
        raise ProgramError(
            f"{where}: beta / gamma is {beta[channel] / gamma[channel]:g} in channel {channel}, more than the "
            "published I-LayerNorm can hold even in 64 bits; quantize with 'nonlinear: corrected'"
        )
    weight = np.rint(ratio * 2.0**shift).astype(np.int32)
    constants = [builder.constant(a, f"{operation.name}.{n}") for a, n in ((weight, "weight"), (made.bias, "bias"))]
    return builder.node(
        "i_layer_norm",
        (x, *constants),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
        start=ivit.PAPER_START,
        iterations=ivit.NEWTON_ITERATIONS,
        shift=shift,
        **saturation(qparams),
    )


def softmax(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a Shiftmax that stands alone, at 16 bits, and its requantization."""
    probabilities = _shiftmax(context, operation, _LONE_SOFTMAX)
    ratio = _LONE_SOFTMAX.scale / qparams.scales()
    return requantize(context.builder, operation, probabilities, ratio, qparams)


def attention_product(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit a Shiftmax times values, int16 (or int8) by int8, and its requantization."""
    levels = context.formats[operation.name, 0]
    assert isinstance(levels, ShiftmaxQParams)
    probabilities = _shiftmax(context, context.structure.producers[operation.inputs[0]], levels)
    values = context.operand(operation.name, 1)
    v = context.codes(operation.inputs[1], values)
    product = context.product(operation, probabilities, 0, v, values.zero_point)
    ratio = levels.scale * values.scales() / qparams.scales()
    return requantize(context.builder, operation, product, ratio, qparams)


def unary(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit ShiftGELU and its requantization; a table for any other function."""
    if operation.attributes["function"] not in SHIFT_GELU_FUNCTIONS:
        return corrected.unary(context, operation, qparams)
    source, builder = context.uniform(operation.name, 0), context.builder
    x = context.codes(operation.inputs[0], source)
    product = context.once(
        (f"{operation.name}@shift_gelu", source),
        lambda: builder.node(
            "shift_gelu",
            (x,),
            TensorType("int32", operation.shape),
            f"{operation.name}.product",
            operation.module,
            input_zero_point=source.zero_point,
            inverse_scale=ivit.inverse_scale(ivit.SIGMOID_SLOPE * source.scale[0]),
            window=ivit.SHIFT_GELU_WINDOW,
            bits=ivit.SIGMOID_BITS,
        ),
    )
    ratio = source.scales() * 2.0 ** (1 - ivit.SIGMOID_BITS) / qparams.scales()
    return requantize(builder, operation, product, ratio, qparams)


def add(context: Context, operation: Operation, qparams: UniformQParams) -> str:
    """Emit the two-scale sum: each side is rounded to the steps of the result, then added and clipped."""
    names = [_on_steps(context, operation, operand, qparams) for operand in add_operands(context, operation)]
    # A shift of at least 1 is what ``add`` has, so the sum is doubled and halved.
    two = context.builder.constant(np.array([2], np.int32), f"{operation.name}.two")
    return context.builder.node(
        "add",
        (*names, two, two),
        TensorType(qparams.dtype, operation.shape),
        f"{operation.name}.codes",
        operation.module,
        zero_point_a=0,
        zero_point_b=0,
        shift=1,
        **saturation(qparams),
    )


def _on_steps(context: Context, operation: Operation, operand: AddOperand, qparams: UniformQParams) -> str:
    """Return a side of a sum in steps of the result, int32 and not clipped."""
    builder = context.builder
    multiplier, shift = to_fixed_point(compress(operand.scale / qparams.scales()))
    low, high = INTEGER_RANGES["int32"]
    codes = builder.array(operand.name)
    if codes is not None:
        # A table is rescaled here, by the arithmetic of ``requantize``; 16 bits times 31 leave int64 room.
        product = (codes.astype(np.int64) - operand.zero_point) * multiplier.astype(np.int64)
        steps = np.clip((product + (1 << (shift - 1))) >> shift, low, high).astype(np.int32)
        return builder.constant(steps, f"{operand.name}.steps")
    return builder.node(
        "requantize",
        (operand.name, builder.constant(multiplier, f"{operation.name}.multiplier")),
        TensorType("int32", builder.type(operand.name).shape),
        f"{operation.name}.steps",
        operation.module,
        input_zero_point=operand.zero_point,
        shift=shift,
        zero_point=0,
        qmin=low,
        qmax=high,
    )


def _shiftmax(context: Context, operation: Operation, levels: ShiftmaxQParams) -> str:
    scores = context.uniform(operation.name, 0)
    x = context.codes(operation.inputs[0], scores)
    return context.once(
        (f"{operation.name}@shiftmax{levels.bits}", scores),
        lambda: context.builder.node(
            "shiftmax",
            (x,),
            TensorType(f"int{levels.bits}", operation.shape),
            f"{operation.name}.probabilities",
            operation.module,
            inverse_scale=ivit.inverse_scale(scores.scale[0]),
            window=ivit.SHIFTMAX_WINDOW,
            bits=levels.bits,
        ),
    )
