"""Link object files for a foreign architecture.

LLVM compiles for every target wherever it runs; only the system's compiler, which TVM links with, knows one
architecture. A library needs nothing but a few symbols that the process which loads it has already (TVM's and
memset), so a linker alone is enough: no cross compiler, no C library of the other architecture.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from quantizers.errors import TargetError
from tvm_backend.targets import CpuTarget

#: LLVM's linker reads objects of any architecture.
_UNIVERSAL = "ld.lld"
Link = Callable[..., None]


def linker(target: CpuTarget, machine: str | None = None) -> Link | None:
    """Return what ``export_library`` takes as ``fcompile``; None where TVM's own choice links for the target.

    Args:
        target: what the objects are compiled for.
        machine: this machine's architecture; detected if not given.

    Raises:
        TargetError: the architecture is foreign and no linker for it is on the path.
    """
    machine = platform.machine() if machine is None else machine
    if target.arch == machine:
        return None
    names = (f"{target.triple}-ld", _UNIVERSAL)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise TargetError(
            f"target {target.name} needs a linker for {target.arch} on this {machine} machine: "
            f"found neither {' nor '.join(names)} on the path; "
            f"install one (Debian: binutils-{target.triple.replace('_', '-')}, or lld)"
        )

    def link(output: str, objects: Sequence[str], *_: object, **__: object) -> None:
        command = [found, "-shared", "-o", output, *objects]
        # The user's own path names the program, as it does for the system's compiler.
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise TargetError(
                f"{Path(found).name} cannot link for target {target.name}: {done.stderr.strip()}; "
                f"check that it supports {target.arch}"
            )

    return link
