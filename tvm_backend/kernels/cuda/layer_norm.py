"""LayerNorm in integers, with an exact integer square root; a warp for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from quantizers.integer.ops import LAYER_NORM_FRACTION_BITS
from quantizers.integer.program import Node
from tvm_backend.kernels.cuda.threads import WARP
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, saturate
from tvm_backend.kernels.shared.function import Expr, Function, script
from tvm_backend.kernels.shared.square_root import divide, floor_sqrt, variable
from tvm_backend.targets import CudaTarget


def emit_layer_norm(node: Node, operands: Sequence[Operand], _target: CudaTarget) -> Kernel:
    """Normalize rows of 8-bit or int16 codes, scale and shift them, and saturate."""
    tirx = script()
    x, weight, bias = operands
    layout = Layout.matrix(x.type.shape)
    width = layout.tail[0]
    # Half a unit of the last shift is part of the bias; the verifier counts it too.
    rounded = bias.constant().astype(np.int64) + (1 << (node.integer("shift") - 1))
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        weights, biases = function.constant(weight.constant()), function.constant(rounded)
        result = function.result()
        one, two = literal(1, "int64"), literal(2, "int64")
        with tirx.warps(function.rows) as (row, lane):
            total, squares = variable(literal(0, "int64")), variable(literal(0, "int64"))
            with _columns(width, lane) as column:
                code = cast(codes[row, column], "int64")
                tirx.buffer_store(total, total[0] + code, [0])
                tirx.buffer_store(squares, squares[0] + code * code, [0])
            tirx.add_lanes(total)
            tirx.add_lanes(squares)
            extent = literal(width, "int64")
            spread = extent * squares[0] - total[0] * total[0] + literal(node.integer("epsilon"), "int64")
            variance = variable(spread)
            # A value of b bits may be multiplied by 4^e while b + 2 e <= 62.
            leading_zeros = cast(tirx.clz(variance[0]), "int64")
            exponent = variable(tirx.shift_right(leading_zeros - two, one))
            tirx.buffer_store(variance, tirx.shift_left(variance[0], exponent[0] * two), [0])
            (root,) = floor_sqrt([variance[0]])
            reciprocal = variable(divide(literal(1 << 61, "int64"), root[0]))
            shift = variable(literal(61 - LAYER_NORM_FRACTION_BITS, "int64") - exponent[0])
            half = variable(tirx.shift_left(one, shift[0] - one))
            with _columns(width, lane) as column:
                centred = extent * cast(codes[row, column], "int64") - total[0]
                normalized = tirx.shift_right(centred * reciprocal[0] + half[0], shift[0])
                product = normalized * cast(weights[column], "int64") + biases[column]
                shifted = tirx.shift_right(product, literal(node.integer("shift"), "int64"))
                tirx.buffer_store(result, saturate(shifted, node), [row, column])
    return function.kernel()


@contextmanager
def _columns(width: int, lane: Expr) -> Iterator[Expr]:
    """Go through the columns of a row, neighbours side by side in the lanes."""
    tirx = script()
    with tirx.serial(-(-width // WARP)) as step:
        column = step * WARP + lane
        if width % WARP:
            with tirx.If(column < width), tirx.Then():
                yield column
        else:
            yield column
