"""Sum over one axis of a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal, minus
from tvm_backend.kernels.shared.function import Function, script
from tvm_backend.targets import Target


def emit_reduce_sum(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``sum (x - zero_point)`` over ``axis``, int32."""
    tirx = script()
    shape, axis = operands[0].type.shape, node.integer("axis")
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    function = Function(node, operands, Layout(outer, (inner,)))
    with function.body():
        x = function.value(0, Layout(outer, (shape[axis], inner)))
        result = function.result()
        with tirx.parallel(function.rows) as row:
            with tirx.serial(inner) as column:
                tirx.buffer_store(result, literal(0, "int32"), [row, column])
            with tirx.serial(shape[axis]) as position, tirx.serial(inner) as column:
                term = minus(x[row, position, column], node.integer("zero_point"), "int32")
                tirx.buffer_store(result, result[row, column] + term, [row, column])
    return function.kernel()
