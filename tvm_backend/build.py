"""Compile an IntegerProgram to a native library."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from quantizers.integer.program import IntegerProgram, TensorType
from quantizers.integer.serialize import program_to_bytes
from tvm_backend.bundle import Bundle
from tvm_backend.imports import import_tvm
from tvm_backend.link import linker
from tvm_backend.lower import lower
from tvm_backend.targets import NATIVE, get_target


def build(program: IntegerProgram, target: str = NATIVE) -> Bundle:
    """Compile a program; needs a C++ compiler to link, or for another architecture than this machine's a linker.

    Args:
        program: any program that the verifier accepts.
        target: a name of :data:`tvm_backend.targets.TARGETS`, or ``native`` for the best one on this machine.

    Raises:
        TargetError: unknown target, or no linker for its architecture.
        ProgramError: the program breaks a rule of the contract.
    """
    chosen = get_target(target)
    # Found before the minutes that a large program compiles.
    link = linker(chosen)
    lowered = lower(program, chosen)
    tvm = import_tvm()
    llvm = chosen.to_tvm()
    with llvm, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(lowered.module, target=llvm)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.so"
        executable.export_library(str(path), fcompile=link)
        library = path.read_bytes()
    kinds = program.types()
    return Bundle(
        target=chosen.name,
        arch=chosen.arch,
        cpu_features=chosen.features,
        program_sha256=hashlib.sha256(b"".join(program_to_bytes(program))).hexdigest(),
        inputs=program.inputs,
        outputs=tuple((name, TensorType(kinds[value].dtype, kinds[value].shape)) for name, value in program.outputs),
        tvm_version=str(tvm.__version__),
        schedule=lowered.schedule,
        library=library,
        constants=lowered.constants,
    )
