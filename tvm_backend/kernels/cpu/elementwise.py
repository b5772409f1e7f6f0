"""The door into the integers and tables, a vector at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.byte_table import WIDTH, by_unsigned_code, look_up
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared import elementwise
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.elementwise import door, not_finite
from tvm_backend.kernels.shared.function import Function, local, script
from tvm_backend.targets import CpuTarget

#: Pixels of a vector.
_LANES = 16


def emit_lookup(node: Node, operands: Sequence[Operand], target: CpuTarget) -> Kernel:
    """``table[x - min(dtype)]``, for whole vectors of codes where the processor can."""
    x, table = operands
    whole = x.type.shape and x.type.shape[-1] % WIDTH == 0
    if target.byte_tables and table.type.dtype in ("int8", "uint8") and whole:
        return _wide_lookup(node, operands)
    return elementwise.emit_lookup(node, operands, target)


def _wide_lookup(node: Node, operands: Sequence[Operand]) -> Kernel:
    """Look up whole vectors of codes."""
    tirx = script()
    x, table = operands
    layout = Layout.matrix(x.type.shape)
    function = Function(node, operands, layout)
    with function.body():
        codes = function.value(0, layout)
        entries = function.constant(by_unsigned_code(table.constant(), x.type.dtype))
        result = function.result()
        with tirx.parallel(function.rows) as row, tirx.serial(layout.tail[0] // WIDTH) as vector:
            place = tirx.ramp(vector * WIDTH, 1, WIDTH)
            found = look_up(entries, tirx.reinterpret(codes[row, place], dtype=f"int8x{WIDTH}"))
            tirx.buffer_store(result, tirx.reinterpret(found, dtype=f"{node.type.dtype}x{WIDTH}"), [row, place])
    return function.kernel()


def emit_quantize(node: Node, operands: Sequence[Operand], _target: CpuTarget) -> Kernel:
    """``saturate(round_half_even(x / scale))``, float32 division; flags rows with NaN or infinity."""
    tirx = script()
    layout = Layout.matrix(operands[0].type.shape)
    function = Function(node, operands, layout)
    with function.body():
        image = function.value(0, layout)
        # The scale is an argument, not a literal: TVM turns a division by a literal into a multiplication by
        # its reciprocal, which rounds differently.
        scale = function.constant(np.array([node.real("scale")], np.float32))
        flags, result = function.flags(), function.result()
        whole, rest = divmod(layout.tail[0], _LANES)
        with tirx.parallel(function.rows) as row:
            wide, flag = local(_LANES, "int32"), local(1, "int32")
            every = tirx.ramp(0, 1, _LANES)
            tirx.buffer_store(wide, literal(0, "int32", _LANES), [every])
            tirx.buffer_store(flag, literal(0, "int32"), [0])
            with tirx.serial(whole) as vector:
                place = tirx.ramp(vector * _LANES, 1, _LANES)
                found = tirx.bitwise_or(wide[every], not_finite(image[row, place], _LANES))
                tirx.buffer_store(wide, found, [every])
                codes = door(node, image[row, place], tirx.broadcast(scale[0], _LANES), _LANES)
                tirx.buffer_store(result, codes, [row, place])
            with tirx.serial(rest) as column:
                at = whole * _LANES + column
                tirx.buffer_store(flag, tirx.bitwise_or(flag[0], not_finite(image[row, at], 1)), [0])
                tirx.buffer_store(result, door(node, image[row, at], scale[0], 1), [row, at])
            reduce = tirx.llvm_lookup_intrinsic_id("llvm.vector.reduce.or")
            together = tirx.call_llvm_pure_intrin(reduce, wide[every], dtype="int32")
            tirx.buffer_store(flags, tirx.bitwise_or(together, flag[0]), [row])
    return function.kernel()
