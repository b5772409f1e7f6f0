"""Windows of an image as rows of a matrix, so that a convolution becomes a linear operator."""

from __future__ import annotations

from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Function, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.targets import Target


def emit_patches(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """``x[C, H, W]`` to ``[windows, C kh kw]``; outside the image stands ``pad_value``."""
    tirx = script()
    x = operands[0]
    channels, height, width = x.type.shape
    (kernel_h, kernel_w), (stride_h, stride_w) = node.integers("kernel"), node.integers("stride")
    pad_h, pad_w = node.integers("padding")
    windows_h = (height + 2 * pad_h - kernel_h) // stride_h + 1
    windows_w = (width + 2 * pad_w - kernel_w) // stride_w + 1
    outside = literal(node.integer("pad_value"), x.type.dtype)
    function = Function(node, operands, Layout(windows_h, (windows_w, channels, kernel_h, kernel_w)))
    with function.body():
        image = function.value(0, Layout.natural(x.type.shape))
        result = function.result()
        with (
            each_row(function.rows) as row,
            row.columns(windows_w, channels, kernel_h, kernel_w) as (window, channel, dy, dx),
        ):
            y = (row.index % windows_h) * stride_h + dy - pad_h
            left = window * stride_w + dx - pad_w
            value = image[row.index // windows_h, channel, y, left]
            if pad_h or pad_w:
                inside = tirx.And(tirx.And(y >= 0, y < height), tirx.And(left >= 0, left < width))
                value = tirx.if_then_else(inside, value, outside)
            tirx.buffer_store(result, value, [row.index, window, channel, dy, dx])
    return function.kernel()
