"""CUDA's compiler: one shared library with machine code for each architecture, no GPU needed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from quantizers.errors import TargetError
from tvm_backend.imports import import_tvm
from tvm_backend.targets import CudaTarget

COMPILER = "nvcc"


def find_compiler() -> str:
    """Return the path of the compiler.

    Raises:
        TargetError: there is none.
    """
    found = shutil.which(COMPILER)
    if found is None:
        raise TargetError(
            f"targets cuda need {COMPILER}, which is not on the path; install the CUDA toolkit (no GPU is needed to "
            "build) and put its bin folder on the path"
        )
    return found


def compiler_version(compiler: str) -> str:
    """Return the version of a compiler from :func:`find_compiler`, as it says it: ``release 13.0, V13.0.88``."""
    # As below, the user's own path names the program.
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
    return next((line[line.index("release") :] for line in said.splitlines() if "release" in line), "unknown")


def compile_library(source: str, target: CudaTarget, compiler: str) -> bytes:
    """Compile a translation unit to a shared library.

    Args:
        source: CUDA C++ with host code that calls TVM's small runtime library.
        target: architectures.
        compiler: from :func:`find_compiler`.

    Raises:
        TargetError: the compiler refuses; its first complaint is in the message.
    """
    info = import_tvm("tvm_ffi.libinfo")
    with tempfile.TemporaryDirectory() as folder:
        unit, library = Path(folder) / "model.cu", Path(folder) / "model.so"
        unit.write_text(source)
        command = [compiler, "-std=c++17", "-O3", "-w", "-shared", "-Xcompiler", "-fPIC"]
        # The doors multiply and divide in float32, each with a rounding of its own.
        command += ["--fmad=false", "--prec-div=true", *code_flags(target)]
        command += ["-I", info.find_include_path(), "-I", info.find_dlpack_include_path()]
        # The user's own path names the program, as it does for the system's compiler.
        done = subprocess.run(  # noqa: S603
            [*command, str(unit), "-o", str(library)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            complaints = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise TargetError(
                f"{COMPILER} cannot compile for target {target.name}: {complaints[0] if complaints else 'no message'}; "
                "check that this version of the toolkit knows these architectures"
            )
        return library.read_bytes()


def code_flags(target: CudaTarget) -> list[str]:
    """Return what asks for machine code of every architecture, and for PTX of the newest."""
    numbers = [architecture.removeprefix("sm_") for architecture in target.architectures]
    if target.tiles.groups:
        # Instructions of this one architecture, which newer ones do not have.
        return [f"-gencode=arch=compute_{numbers[0]}a,code=sm_{numbers[0]}a"]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]
