"""LayerNorm in integers, with an exact integer square root."""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import Node
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cpu.arithmetic import cast, literal, saturate, shift_round
from tvm_backend.kernels.cpu.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.targets import CpuTarget

#: Steps after which Newton's iteration from 2^31 is within one of the root, for values in [2^60, 2^62).
#: The error after a step is at most its square over twice the root: 2^30, 2^28, 2^25, 2^19, 2^7, below 1.
_NEWTON_STEPS = 5


def _local(value: Expr) -> Buffer:
    """Hold an int64 in a local variable, which a loop may update."""
    tirx = script()
    buffer = local(1, "int64")
    tirx.buffer_store(buffer, value, [0])
    return buffer


def floor_sqrt(value: Expr) -> Buffer:
    """Emit ``floor(sqrt(value))`` of an int64 in [2^60, 2^62) and return the variable that holds it."""
    tirx = script()
    root = _local(literal(1 << 31, "int64"))
    for _ in range(_NEWTON_STEPS):
        # Never below the floor of the root, because an arithmetic mean is never below the geometric one.
        mean = tirx.shift_right(root[0] + import_tvm("tvm.tirx").truncdiv(value, root[0]), literal(1, "int64"))
        tirx.buffer_store(root, mean, [0])
    above = root[0] * root[0] > value
    tirx.buffer_store(root, root[0] - cast(above, "int64"), [0])
    return root


def emit_layer_norm(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """Normalize rows of 8-bit or int16 codes, scale and shift them, and saturate."""
    tirx = script()
    x, weight, bias = operands
    layout = Layout.matrix(x.type.shape)
    width = layout.tail[0]
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        weights, biases = function.constant(weight.constant()), function.constant(bias.constant())
        result = function.result()
        with tirx.parallel(function.rows) as row:
            total, squares = _local(literal(0, "int64")), _local(literal(0, "int64"))
            with tirx.serial(width) as column:
                code = cast(codes[row, column], "int64")
                tirx.buffer_store(total, total[0] + code, [0])
                tirx.buffer_store(squares, squares[0] + code * code, [0])
            extent = literal(width, "int64")
            variance = _local(extent * squares[0] - total[0] * total[0] + literal(node.integer("epsilon"), "int64"))
            # A value of b bits may be multiplied by 4^e while b + 2 e <= 62.
            leading_zeros = cast(tirx.clz(variance[0]), "int64")
            exponent = _local(tirx.shift_right(leading_zeros - literal(2, "int64"), literal(1, "int64")))
            tirx.buffer_store(variance, tirx.shift_left(variance[0], exponent[0] * literal(2, "int64")), [0])
            root = floor_sqrt(variance[0])
            reciprocal = _local(import_tvm("tvm.tirx").truncdiv(literal(1 << 61, "int64"), root[0]))
            shift = _local(literal(61 - LAYER_NORM_FRACTION_BITS, "int64") - exponent[0])
            half = _local(tirx.shift_left(literal(1, "int64"), shift[0] - literal(1, "int64")))
            with tirx.serial(width) as column:
                centred = extent * cast(codes[row, column], "int64") - total[0]
                normalized = tirx.shift_right(centred * reciprocal[0] + half[0], shift[0])
                scaled = normalized * cast(weights[column], "int64") + biases[column]
                rounded = shift_round(scaled, node.integer("shift"))
                tirx.buffer_store(result, saturate(rounded, node), [row, column])
    return function.kernel()
