"""CUDA C++ of a program, host code included."""

from __future__ import annotations

import re

from quantizers.integer.program import IntegerProgram
from tvm_backend.imports import import_tvm
from tvm_backend.lower import Lowered, lower
from tvm_backend.targets import CudaTarget

_PROTOTYPE = re.compile(r'^extern "C" __global__ .*;$', re.MULTILINE)


def library_source(program: IntegerProgram, target: CudaTarget) -> tuple[Lowered, str]:
    """Return how a program is called, and one translation unit for all architectures of a target.

    Generations of GPUs have other instructions in kernels of the same names, arguments and numbers of threads: the
    compiler sees those of the architecture that it compiles for, and the host code of the newest.

    Args:
        program: any program that the verifier accepts.
        target: architectures.
    """
    parts = target.generations()
    lowered = [lower(program, part) for part in parts]
    sources = [cuda_source(one, part) for one, part in zip(lowered, parts, strict=True)]
    # What the host code relies on.
    assert all(one.schedule == lowered[0].schedule for one in lowered)
    assert all(_PROTOTYPE.findall(source) == _PROTOTYPE.findall(sources[0]) for source in sources)
    combined = sources[-1]
    for part, source in zip(reversed(parts[:-1]), reversed(sources[:-1]), strict=True):
        oldest = int(part.architectures[0].removeprefix("sm_")) * 10
        combined = f"#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= {oldest}\n{source}\n#else\n{combined}\n#endif\n"
    return lowered[0], combined


def cuda_source(lowered: Lowered, target: CudaTarget) -> str:
    """Return the kernels of one generation and the functions that launch them."""
    tvm, chosen = import_tvm(), target.to_tvm()
    with chosen, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(lowered.module, target=chosen, tir_pipeline="tirx")
    source: str = import_tvm("tvm.backend.cuda").export_cuda_host(executable.mod)
    return source
