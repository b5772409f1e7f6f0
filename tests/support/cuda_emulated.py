"""CUDA on the CPU: the generated source compiled by g++, and a driver whose device memory is the host's.

TVM writes each instruction of the GPU as a function of its own around an assembler statement; those are taken out here,
and ``cuda_emulation/cuda_runtime.h`` has functions of the same names. What this cannot show is time, what the GPU's own
compiler makes of the source, and an instruction that the header misunderstands.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tvm_ffi.libinfo

from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build_for, bundle_of
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.source import cuda_source
from tvm_backend.lower import lower
from tvm_backend.targets import CudaTarget

#: Where this is set in the environment, programs run on the machine's own GPU instead, if nothing changes their source.
REAL = "VIT_PTQ_TEST_GPU"
HEADERS = Path(__file__).resolve().parent / "cuda_emulation"
#: Signed overflow wraps around in CUDA's integers as it does in the interpreter's.
FLAGS = ("-std=c++20", "-O1", "-w", "-fwrapv", "-shared", "-fPIC")


#: A function of one instruction, its body included.
_INSTRUCTION = re.compile(
    r"^__forceinline__ __device__ \w+ tvm_builtin_ptx_\w+\([^)]*\) \{\n.*?^\}\n", re.MULTILINE | re.DOTALL
)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _compile(source: Path, library: Path) -> None:
    info = tvm_ffi.libinfo
    folders = [str(HEADERS), info.find_include_path(), info.find_dlpack_include_path()]
    command = ["g++", *FLAGS, *(f"-I{folder}" for folder in folders), str(source), "-o", str(library)]
    subprocess.run(command, check=True)


def _for_the_cpu(source: str) -> str:
    without = _INSTRUCTION.sub("", source)
    # Blocks run one after the other, so they may share one memory.
    return re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", without)


@functools.cache
def emulated_driver_library() -> str:
    """Return the path of a driver library for which this machine has a device."""
    library = Path(_folder().name) / "driver.so"
    _compile(HEADERS / "driver.cpp", library)
    return str(library)


@functools.cache
def emulated_driver() -> Driver:
    """Return a driver for which this machine has a device."""
    # Compiled programs look there for what their launches become.
    ctypes.CDLL(emulated_driver_library(), ctypes.RTLD_GLOBAL)
    return Driver(emulated_driver_library())


def other_stream() -> int:
    """Return the handle of a stream that is not the driver's own."""
    emulated_driver()
    get = ctypes.CDLL(emulated_driver_library()).emulation_other_stream
    get.restype = ctypes.c_void_p
    return int(get())


def emulate(
    program: IntegerProgram, architecture: str = "sm_80", change: Callable[[str], str] | None = None
) -> CudaProgram:
    """Compile a program for a GPU and run it on the CPU, its source changed before."""
    return emulate_for(program, CudaTarget((architecture,)), change)


def emulate_for(program: IntegerProgram, target: CudaTarget, change: Callable[[str], str] | None = None) -> CudaProgram:
    """Compile a program for a target; see :func:`emulate`."""
    if os.environ.get(REAL) and change is None:
        driver = Driver()
        if target.tiles.groups and driver.architecture() not in target.architectures:
            pytest.skip(f"{driver.name()} has no groups of warps")
        return CudaProgram(build_for(program, target), driver)
    lowered = lower(program, target)
    source = cuda_source(lowered, target)
    library = emulate_source(source if change is None else change(source))
    return CudaProgram(bundle_of(program, target, lowered, library), emulated_driver())


def emulate_source(source: str) -> bytes:
    """Compile CUDA C++ that TVM has written to a shared library for the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        unit, library = Path(folder) / "model.cpp", Path(folder) / "model.so"
        unit.write_text(_for_the_cpu(source))
        _compile(unit, library)
        return library.read_bytes()
