"""CUDA on the CPU: the generated source compiled by g++, and a driver whose device memory is the host's.

Kernels whose threads do not wait for each other run as loops. What this cannot show is time, and what the GPU's own
compiler makes of the source.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import tvm_ffi.libinfo

from quantizers.integer.program import IntegerProgram
from tvm_backend.build import bundle_of
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.source import cuda_source
from tvm_backend.lower import lower
from tvm_backend.targets import CudaTarget

HEADERS = Path(__file__).resolve().parent / "cuda_emulation"
#: Signed overflow wraps around in CUDA's integers as it does in the interpreter's.
FLAGS = ("-std=c++20", "-O1", "-w", "-fwrapv", "-shared", "-fPIC")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _compile(source: Path, library: Path) -> None:
    info = tvm_ffi.libinfo
    folders = [str(HEADERS), info.find_include_path(), info.find_dlpack_include_path()]
    command = ["g++", *FLAGS, *(f"-I{folder}" for folder in folders), str(source), "-o", str(library)]
    subprocess.run(command, check=True)


@functools.cache
def emulated_driver() -> Driver:
    """Return a driver for which this machine has a device."""
    library = Path(_folder().name) / "driver.so"
    _compile(HEADERS / "driver.cpp", library)
    return Driver(str(library))


def emulate(program: IntegerProgram, architecture: str = "sm_80") -> CudaProgram:
    """Compile a program for a GPU and run it on the CPU."""
    target = CudaTarget((architecture,))
    lowered = lower(program, target)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "model.cpp", Path(folder) / "model.so"
        source.write_text(cuda_source(lowered, target))
        _compile(source, library)
        return CudaProgram(bundle_of(program, target, lowered, library.read_bytes()), emulated_driver())
