"""Compile an IntegerProgram to a native library."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from quantizers.integer.program import IntegerProgram, TensorType
from quantizers.integer.serialize import program_to_bytes
from tvm_backend.bundle import Bundle
from tvm_backend.imports import import_tvm
from tvm_backend.lower import lower
from tvm_backend.targets import NATIVE, get_target


def build(program: IntegerProgram, target: str = NATIVE) -> Bundle:
    """Compile a program; needs a C++ compiler to link.

    Args:
        program: any program that the verifier accepts.
        target: a name of :data:`tvm_backend.targets.TARGETS`, or ``native`` for the best one on this machine.

    Raises:
        TargetError: unknown target.
        ProgramError: the program breaks a rule of the contract.
    """
    chosen = get_target(target)
    lowered = lower(program, chosen)
    tvm = import_tvm()
    llvm = chosen.to_tvm()
    with llvm, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(lowered.module, target=llvm, relax_pipeline=_pipeline())
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.so"
        executable.export_library(str(path))
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
        library=library,
        constants=lowered.constants,
    )


def _pipeline() -> Any:
    """Return the Relax passes: memory planning and lowering to the virtual machine, no fusion or folding."""
    tvm = import_tvm()
    transform = import_tvm("tvm.relax").transform
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
