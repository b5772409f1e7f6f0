"""The door into the integers: float32 pixels to codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.elementwise import door, not_finite
from tvm_backend.kernels.shared.function import Function, local, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.targets import CudaTarget


def emit_quantize(node: Node, operands: Sequence[Operand], _target: CudaTarget) -> Kernel:
    """``saturate(round_half_even(x / scale))``, float32 division; flags rows with NaN or infinity."""
    tirx = script()
    layout = Layout.matrix(operands[0].type.shape)
    function = Function(node, operands, layout)
    with function.body():
        image = function.value(0, layout)
        # An argument, because TVM turns a division by a literal into a multiplication, which rounds differently.
        scale = function.constant(np.array([node.real("scale")], np.float32))
        flags, result = function.flags(), function.result()
        with each_row(function.rows) as row:
            flag = local(1, "int32")
            tirx.buffer_store(flag, literal(0, "int32"), [0])
            with row.columns(layout.tail[0]) as (column,):
                pixel = image[row.index, column]
                tirx.buffer_store(flag, tirx.bitwise_or(flag[0], not_finite(pixel, 1)), [0])
                tirx.buffer_store(result, door(node, pixel, scale[0], 1), [row.index, column])
            row.unite(flag)
            tirx.buffer_store(flags, flag[0], [row.index])
    return function.kernel()
