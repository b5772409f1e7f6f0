"""CUDA C++ of a lowered program, host code included."""

from __future__ import annotations

from tvm_backend.imports import import_tvm
from tvm_backend.lower import Lowered
from tvm_backend.targets import CudaTarget


def cuda_source(lowered: Lowered, target: CudaTarget) -> str:
    """Return one translation unit with all kernels and the functions that launch them."""
    tvm, chosen = import_tvm(), target.to_tvm()
    with chosen, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(lowered.module, target=chosen, tir_pipeline="tirx")
    source: str = import_tvm("tvm.backend.cuda").export_cuda_host(executable.mod)
    return source
