"""LayerNorm in integers, with an exact integer square root; a warp for each row."""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import Node
from tvm_backend.kernels.cuda.rescale import Numbers, Shift
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Function, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.kernels.shared.square_root import divide, floor_sqrt, variable
from tvm_backend.targets import CudaTarget


def emit_layer_norm(node: Node, operands: Sequence[Operand], _target: CudaTarget) -> Kernel:
    """Normalize rows of 8-bit or int16 codes, scale and shift them, and saturate."""
    tirx = script()
    x, weight, bias = operands
    layout = Layout.matrix(x.type.shape)
    width = layout.tail[0]
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        weights, biases = function.constant(weight.constant()), function.constant(bias.constant())
        numbers, last = Numbers(function, [node.integer("epsilon")]), Shift(node, function, narrow=False)
        result = function.result()
        one, two = literal(1, "int64"), literal(2, "int64")
        with each_row(function.rows) as row:
            total, squares = variable(literal(0, "int64")), variable(literal(0, "int64"))
            with row.columns(width) as (column,):
                code = cast(codes[row.index, column], "int64")
                tirx.buffer_store(total, total[0] + code, [0])
                tirx.buffer_store(squares, squares[0] + code * code, [0])
            row.add_up(total)
            row.add_up(squares)
            (epsilon,) = numbers.hold()
            last.hold()
            extent = literal(width, "int64")
            spread = extent * squares[0] - total[0] * total[0] + epsilon
            variance = variable(spread)
            # A value of b bits may be multiplied by 4^e while b + 2 e <= 62.
            leading_zeros = cast(tirx.clz(variance[0]), "int64")
            exponent = variable(tirx.shift_right(leading_zeros - two, one))
            tirx.buffer_store(variance, tirx.shift_left(variance[0], exponent[0] * two), [0])
            (root,) = floor_sqrt([variance[0]])
            reciprocal = variable(divide(literal(1 << 61, "int64"), root[0]))
            shift = variable(literal(61 - LAYER_NORM_FRACTION_BITS, "int64") - exponent[0])
            half = variable(tirx.shift_left(one, shift[0] - one))
            with row.columns(width) as (column,):
                centred = extent * cast(codes[row.index, column], "int64") - total[0]
                normalized = tirx.shift_right(centred * reciprocal[0] + half[0], shift[0])
                product = normalized * cast(weights[column], "int64") + biases[column]
                tirx.buffer_store(result, last.code(product), [row.index, column])
    return function.kernel()
