"""Operator name to the function that emits its kernel for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from quantizers.integer.program import Node
from tvm_backend.kernels.cuda.layer_norm import emit_layer_norm
from tvm_backend.kernels.cuda.linear import emit_linear
from tvm_backend.kernels.cuda.matmul import emit_matmul
from tvm_backend.kernels.cuda.quantize import emit_quantize
from tvm_backend.kernels.cuda.reduce_sum import emit_reduce_sum
from tvm_backend.kernels.kernel import Kernel, Operand
from tvm_backend.kernels.shared import emitters as shared
from tvm_backend.targets import CudaTarget

EMITTERS: Mapping[str, Callable[[Node, Sequence[Operand], CudaTarget], Kernel]] = MappingProxyType(
    {
        **shared.EMITTERS,
        "quantize": emit_quantize,
        "linear": emit_linear,
        "matmul": emit_matmul,
        "reduce_sum": emit_reduce_sum,
        "layer_norm": emit_layer_norm,
    }
)
