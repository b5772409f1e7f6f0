"""Operator name to the function that emits its CPU kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.elementwise import (
    emit_add,
    emit_dequantize,
    emit_lookup,
    emit_multiply,
    emit_quantize,
    emit_requantize,
)
from tvm_backend.kernels.cpu.ivit import emit_i_layer_norm, emit_shift_gelu, emit_shiftmax
from tvm_backend.kernels.cpu.layer_norm import emit_layer_norm
from tvm_backend.kernels.cpu.linear import emit_linear
from tvm_backend.kernels.cpu.matmul import emit_matmul
from tvm_backend.kernels.cpu.patches import emit_patches
from tvm_backend.kernels.cpu.reduce_sum import emit_reduce_sum
from tvm_backend.kernels.cpu.softmax import emit_exponentials, emit_normalize_rows, emit_row_sum
from tvm_backend.kernels.cpu.views import emit_concat, emit_view
from tvm_backend.kernels.kernel import Kernel, Operand
from tvm_backend.targets import CpuTarget

EMITTERS: Mapping[str, Callable[[Node, Sequence[Operand], CpuTarget], Kernel]] = MappingProxyType(
    {
        "quantize": emit_quantize,
        "dequantize": emit_dequantize,
        "linear": emit_linear,
        "matmul": emit_matmul,
        "multiply": emit_multiply,
        "requantize": emit_requantize,
        "add": emit_add,
        "lookup": emit_lookup,
        "exponentials": emit_exponentials,
        "row_sum": emit_row_sum,
        "normalize_rows": emit_normalize_rows,
        "layer_norm": emit_layer_norm,
        "reduce_sum": emit_reduce_sum,
        "patches": emit_patches,
        "reshape": emit_view,
        "permute": emit_view,
        "slice": emit_view,
        "concat": emit_concat,
        "shiftmax": emit_shiftmax,
        "shift_gelu": emit_shift_gelu,
        "i_layer_norm": emit_i_layer_norm,
    }
)
