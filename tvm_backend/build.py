"""Compile an IntegerProgram to a native library."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantizers.integer.program import IntegerProgram, TensorType
from quantizers.integer.serialize import program_to_bytes
from tvm_backend.bundle import LIBRARY, Bundle
from tvm_backend.gpu.nvcc import compile_library, find_compiler
from tvm_backend.gpu.source import library_source
from tvm_backend.gpu.tile_database import known_tiles
from tvm_backend.imports import import_tvm, tvm_version
from tvm_backend.link import linker
from tvm_backend.lower import Lowered, lower
from tvm_backend.targets import NATIVE, CpuTarget, CudaTarget, Target, get_target


def build(program: IntegerProgram, target: str = NATIVE, tiles: Path | None = None) -> Bundle:
    """Compile a program.

    Needs a C++ compiler to link, for another architecture than this machine's a linker, for GPUs CUDA's compiler.

    Args:
        program: any program that the verifier accepts.
        target: a name that :func:`tvm_backend.targets.get_target` knows.
        tiles: for GPUs, a file that tuning wrote; None is the default one if it exists.

    Raises:
        TargetError: unknown target, or nothing that compiles or links for it.
        ProgramError: the program breaks a rule of the contract.
        ArtifactError: the file of tiles cannot be read.
    """
    chosen = get_target(target)
    if isinstance(chosen, CudaTarget):
        chosen = replace(chosen, tiles=known_tiles(chosen.architectures, tiles))
    return build_for(program, chosen)


def build_for(program: IntegerProgram, chosen: Target) -> Bundle:
    """Compile a program for a target; see :func:`build`."""
    # What compiles or links is found before the time that a large program takes.
    if isinstance(chosen, CudaTarget):
        compiler = find_compiler()
        lowered, source = library_source(program, chosen)
        return bundle_of(program, chosen, lowered, compile_library(source, chosen, compiler))
    link = linker(chosen)
    lowered = lower(program, chosen)
    return bundle_of(program, chosen, lowered, _native_library(lowered, chosen, link))


def bundle_of(program: IntegerProgram, target: Target, lowered: Lowered, library: bytes) -> Bundle:
    """Return what is known of a program together with its compiled code."""
    kinds = program.types()
    return Bundle(
        target=target.name,
        arch=target.arch,
        cpu_features=target.features,
        program_sha256=hashlib.sha256(b"".join(program_to_bytes(program))).hexdigest(),
        inputs=program.inputs,
        outputs=tuple((name, TensorType(kinds[value].dtype, kinds[value].shape)) for name, value in program.outputs),
        tvm_version=tvm_version(),
        schedule=lowered.schedule,
        library=library,
        constants=lowered.constants,
    )


def _native_library(lowered: Lowered, target: CpuTarget, link: Any) -> bytes:
    tvm, llvm = import_tvm(), target.to_tvm()
    with llvm, tvm.transform.PassContext(opt_level=3):
        executable = tvm.compile(lowered.module, target=llvm)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / LIBRARY
        executable.export_library(str(path), fcompile=link)
        return path.read_bytes()
