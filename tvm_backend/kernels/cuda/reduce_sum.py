"""Sum over one axis of a sample, a thread for each sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal, minus
from tvm_backend.kernels.shared.function import Function, local, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.targets import CudaTarget


def emit_reduce_sum(node: Node, operands: Sequence[Operand], _target: CudaTarget) -> Kernel:
    """``sum (x - zero_point)`` over ``axis``, int32."""
    tirx = script()
    shape, axis = operands[0].type.shape, node.integer("axis")
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    function = Function(node, operands, Layout(outer, (inner,)))
    with function.body():
        x = function.value(0, Layout(outer, (shape[axis], inner)))
        result = function.result()
        with each_row(function.rows) as row, row.columns(inner) as (column,):
            total = local(1, "int32")
            tirx.buffer_store(total, literal(0, "int32"), [0])
            with tirx.serial(shape[axis]) as position:
                term = minus(x[row.index, position, column], node.integer("zero_point"), "int32")
                tirx.buffer_store(total, total[0] + term, [0])
            tirx.buffer_store(result, total[0], [row.index, column])
    return function.kernel()
