"""The bridge from torch to the TVM runtime, which knows only arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantizers.integer.program import IntegerProgram

#: What ``cpu`` means to the compiler: the machine at hand.
_ALIASES = {"cpu": "native"}


def compile_program(program: IntegerProgram, target: str, threads: int | None) -> Callable[..., Any]:
    """Compile a program for this process; see :meth:`ptq.Quantized.compile`."""
    from tvm_backend.build import build
    from tvm_backend.gpu.driver import Driver
    from tvm_backend.runtime import open_bundle
    from tvm_backend.targets import CUDA

    # For this process: machine code of the GPU at hand is enough, and without one there is nothing to compile for.
    chosen = f"{CUDA}:{Driver().architecture()}" if target == CUDA else _ALIASES.get(target, target)
    return adapt(open_bundle(build(program, chosen), threads))


def load_compiled(directory: Path, threads: int | None) -> Callable[..., Any]:
    """Load a bundle; the function takes tensors or arrays and returns the same kind."""
    from tvm_backend.runtime import load

    return adapt(load(directory, threads=threads))


def write_bundle(program: IntegerProgram, directory: Path, target: str, tiles: Path | None) -> None:
    """Compile a program and write its bundle; see :meth:`ptq.Quantized.export_tvm`."""
    from tvm_backend.build import build
    from tvm_backend.bundle import save_bundle

    save_bundle(build(program, _ALIASES.get(target, target), tiles), directory)


def adapt(run: Callable[..., tuple[np.ndarray, ...]]) -> Callable[..., Any]:
    """Let a function of arrays take tensors too; one result comes alone, several as a tuple."""

    def call(*inputs: Tensor | np.ndarray) -> Any:
        as_tensors = any(isinstance(x, Tensor) for x in inputs)
        results: tuple[Any, ...] = run(*(x.numpy() if isinstance(x, Tensor) else x for x in inputs))
        if as_tensors:
            results = tuple(torch.from_numpy(result) for result in results)
        return results[0] if len(results) == 1 else results

    return call
