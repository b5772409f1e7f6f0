"""Operator name to the function that emits its kernel, for operators whose loops say all there is to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Kernel, Operand
from tvm_backend.kernels.shared.elementwise import (
    emit_add,
    emit_dequantize,
    emit_lookup,
    emit_multiply,
    emit_requantize,
)
from tvm_backend.kernels.shared.ivit import emit_i_layer_norm, emit_shift_gelu, emit_shiftmax
from tvm_backend.kernels.shared.patches import emit_patches
from tvm_backend.kernels.shared.reduce_sum import emit_reduce_sum
from tvm_backend.kernels.shared.softmax import emit_exponentials, emit_normalize_rows, emit_row_sum
from tvm_backend.kernels.shared.views import emit_concat, emit_view
from tvm_backend.targets import Target

EMITTERS: Mapping[str, Callable[[Node, Sequence[Operand], Target], Kernel]] = MappingProxyType(
    {
        "dequantize": emit_dequantize,
        "multiply": emit_multiply,
        "requantize": emit_requantize,
        "add": emit_add,
        "lookup": emit_lookup,
        "exponentials": emit_exponentials,
        "row_sum": emit_row_sum,
        "normalize_rows": emit_normalize_rows,
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
