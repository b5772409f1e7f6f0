"""Operator name to the function that emits its CPU kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.elementwise import emit_lookup, emit_quantize
from tvm_backend.kernels.cpu.layer_norm import emit_layer_norm
from tvm_backend.kernels.cpu.linear import emit_linear
from tvm_backend.kernels.cpu.matmul import emit_matmul
from tvm_backend.kernels.kernel import Kernel, Operand
from tvm_backend.kernels.shared import emitters as shared
from tvm_backend.targets import CpuTarget

EMITTERS: Mapping[str, Callable[[Node, Sequence[Operand], CpuTarget], Kernel]] = MappingProxyType(
    {
        **shared.EMITTERS,
        "quantize": emit_quantize,
        "linear": emit_linear,
        "matmul": emit_matmul,
        "lookup": emit_lookup,
        "layer_norm": emit_layer_norm,
    }
)
