"""Programs ready to run, for targets of the CPU and for GPUs as the CPU emulates them."""

from __future__ import annotations

from support.cuda_emulated import emulate

from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.runtime import CompiledProgram

#: Stands for a GPU among the names of targets.
EMULATED = "cuda (emulated)"


def compile_for(program: IntegerProgram, target: str) -> CompiledProgram | CudaProgram:
    """Compile a program for a target that this machine can run, or emulate a GPU."""
    return emulate(program) if target == EMULATED else CompiledProgram(build(program, target))
