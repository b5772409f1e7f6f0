"""The GPU at hand, and what builds programs for it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.nvcc import compile_library, compiler_version, find_compiler
from tvm_backend.gpu.peak import Compile
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.targets import CudaTarget

#: What the report names the versions of, where it is installed.
_PACKAGES = ("torch", "triton", "apache-tvm", "numpy")


@dataclass(frozen=True)
class Device:
    """A GPU with its compiler.

    Args:
        driver: of the GPU.
        toolkit: version of the compiler.
        build: a program and the name of a target to a bundle.
        compile_source: CUDA C++ and its target to a shared library.
    """

    driver: Driver
    toolkit: str
    build: Callable[[IntegerProgram, str], Bundle]
    compile_source: Compile

    @property
    def target(self) -> CudaTarget:
        """The device's own architecture."""
        return CudaTarget((self.driver.architecture(),))

    def program(self, program: IntegerProgram) -> CudaProgram:
        """Build a program for this device and load it."""
        return CudaProgram(self.build(program, self.target.name), self.driver)

    def describe(self) -> dict[str, Any]:
        """Return what a number in a report depends on."""
        return {
            "name": self.driver.name(),
            "architecture": self.driver.architecture(),
            "multiprocessors": self.driver.processors(),
            "driver": self.driver.version(),
            "toolkit": self.toolkit,
            "versions": _versions(),
        }


def device_here(open_driver: Callable[[], Driver] = Driver) -> Device:
    """Return this machine's GPU.

    Args:
        open_driver: returns the driver.

    Raises:
        TargetError: no driver, no device, or no compiler.
    """
    driver, compiler = open_driver(), find_compiler()
    return Device(driver, compiler_version(compiler), build, partial(_compiled, compiler))


def _compiled(compiler: str, source: str, target: CudaTarget) -> bytes:
    return compile_library(source, target, compiler)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
