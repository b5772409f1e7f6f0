"""Batched matrix products of two values, a thread for each element."""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal, minus
from tvm_backend.kernels.shared.function import Function, local, script
from tvm_backend.targets import CudaTarget


def emit_matmul(node: Node, operands: Sequence[Operand], _target: CudaTarget) -> Kernel:
    """``sum_k (a - zero_point_a) (b - zero_point_b)``, int32."""
    tirx = script()
    rows, depth = operands[0].type.shape[-2:]
    count = node.type.shape[-1]
    items = Layout.matrix(node.type.shape, 2).rows
    function = Function(node, operands, Layout.matrix(node.type.shape, 2))
    with function.body():
        left, right = (function.value(i, Layout.matrix(operand.type.shape, 2)) for i, operand in enumerate(operands))
        result = function.result()
        with tirx.parallel(function.rows * (rows * count)) as index:
            item, row, column = index // (rows * count), index // count % rows, index % count
            item_a, item_b = (item if operand.batched else item % items for operand in operands)
            total = local(1, "int32")
            tirx.buffer_store(total, literal(0, "int32"), [0])
            with tirx.serial(depth) as k:
                a = minus(left[item_a, row, k], node.integer("zero_point_a"), "int32")
                b = right[item_b, column, k] if node.integer("transpose_b") else right[item_b, k, column]
                tirx.buffer_store(total, total[0] + a * minus(b, node.integer("zero_point_b"), "int32"), [0])
            tirx.buffer_store(result, total[0], [item, row, column])
    return function.kernel()
