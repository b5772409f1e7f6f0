"""Operators that move elements without computing: chains of views in one copy, and concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.function import Function, script
from tvm_backend.kernels.shared.rows import each_row
from tvm_backend.strides import source_index
from tvm_backend.targets import Target


def emit_views(chain: Sequence[Node], operand: Operand) -> Kernel:
    """Emit one copy for a chain of views, first to last.

    Args:
        chain: nodes of :data:`tvm_backend.strides.VIEWS`, each the operand of the next.
        operand: operand of the first.
    """
    tirx = script()
    last = chain[-1]
    shape = last.type.shape or (1,)
    # The first axis joins the batch to give the threads something to share, unless it is the row itself.
    shared = shape[0] if len(shape) > 1 else 1
    function = Function(last, [operand], Layout(shared, shape[1:] if len(shape) > 1 else shape))
    with function.body():
        source = function.value(0, Layout.natural(operand.type.shape))
        result = function.result()
        with each_row(function.rows) as row, row.columns(*(shape[1:] if len(shape) > 1 else shape)) as inner:
            index = (row.index % shared, *inner) if len(shape) > 1 else inner
            place = source_index(chain, operand.type.shape, index if last.type.shape else ())
            sample = row.index // shared if operand.batched else 0
            tirx.buffer_store(result, source[(sample, *place)], [row.index, *inner])
    return function.kernel()


def emit_view(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Emit a copy for a single view."""
    return emit_views([node], operands[0])


def emit_concat(node: Node, operands: Sequence[Operand], _target: Target) -> Kernel:
    """Copy the operands one after the other along ``axis``; constants repeat for each sample."""
    tirx = script()
    axis, shape = node.integer("axis"), node.type.shape
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    function = Function(node, operands, Layout(outer, (shape[axis], inner)))
    with function.body():
        parts = [
            (function.value(i, Layout(outer, (operand.type.shape[axis], inner))), operand)
            for i, operand in enumerate(operands)
        ]
        result = function.result()
        with each_row(function.rows) as row:
            start = 0
            for buffer, operand in parts:
                extent = operand.type.shape[axis]
                with row.columns(extent, inner) as (position, column):
                    value = buffer[row.index if operand.batched else row.index % outer, position, column]
                    tirx.buffer_store(result, value, [row.index, start + position, column])
                start += extent
    return function.kernel()
