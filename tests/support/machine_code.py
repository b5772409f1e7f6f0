"""What nvcc makes of a program, as NVIDIA's own disassembler shows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tvm_backend.gpu.nvcc import COMPILER

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not on the path")
needs_no_driver = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "ldconfig -p | grep -q libcuda.so.1"], check=False).returncode == 0,
    reason="this machine has an NVIDIA driver",
)

_FUNCTION = re.compile(r"^\s*Function : (\w+)$")
_ARCHITECTURE = re.compile(r"^arch = (sm_\d+a?)$")
#: An address, perhaps a predicate, then the operation.
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")
#: How the assembler may load a constant where the units for integers are busy: its bits plus zero times zero.
_CONSTANT = re.compile(r"HFMA2(\.MMA)? R\d+, -RZ, RZ, ")
_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\d+a?)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """What a block of a kernel takes.

    Args:
        registers: of a thread.
        shared: bytes.
        spilled: bytes that a thread writes to memory and reads back because registers are missing.
    """

    registers: int
    shared: int
    spilled: int


def tool(name: str) -> str | None:
    """Return the path of one of NVIDIA's tools: on the path, or in the packages that tests ask for."""
    try:
        import nvidia
    except ImportError:
        return shutil.which(name)
    folders = [str(folder) for root in nvidia.__path__ for folder in Path(root).glob("cu*/bin")]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


needs_disassembler = pytest.mark.skipif(
    not (tool("cuobjdump") and tool("nvdisasm")), reason="cuobjdump and nvdisasm are not installed"
)


def instructions(library: Path) -> dict[tuple[str, str], Counter[str]]:
    """Return how often each operation stands in each kernel, by architecture and kernel."""
    dump, disassembler = tool("cuobjdump"), tool("nvdisasm")
    assert dump
    assert disassembler
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ["PATH"]])
    done = subprocess.run(
        [dump, "-sass", str(library)], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture = kernel = ""
    for line in done.stdout.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _FUNCTION.match(line):
            kernel = match[1]
            found[architecture, kernel] = Counter()
        elif match := _INSTRUCTION.match(line):
            found[architecture, kernel]["MOV" if _CONSTANT.search(line) else match[1]] += 1
    return found


def resources(report: str) -> dict[tuple[str, str], Resources]:
    """Return what ``nvcc -Xptxas -v`` says of each kernel, by architecture and kernel."""
    return {
        (match[2], match[1]): Resources(int(match[5]), int(match[6] or 0), int(match[3]) + int(match[4]))
        for block in report.split("Compiling entry function")[1:]
        if (match := _RESOURCES.search("Compiling entry function" + block))
    }
