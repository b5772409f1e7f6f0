"""Targets: what code is compiled for, and what a processor must offer to run the result."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantizers.errors import TargetError, UnknownTargetError
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cuda.tiles import Tiles

NATIVE, CUDA = "native", "cuda"
#: Of GPUs, oldest first: what ``cuda`` alone stands for.
CUDA_ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
_OLDEST, _ASYNCHRONOUS = 75, 80
#: The one with groups of warps.
_HOPPER = "sm_90"


@dataclass(frozen=True, slots=True)
class CpuTarget:
    """An instruction set.

    Args:
        name: public name.
        arch: ``platform.machine()`` of processors that can run it.
        mcpu: LLVM's processor name.
        mattr: LLVM features on top of it.
        features: flags, as Linux names them in /proc/cpuinfo, without which the code would not run.
        dot: how matrix products are multiplied, a key of :data:`tvm_backend.kernels.cpu.dot.DOTS`.
        byte_tables: whether a 256-entry table of bytes can be read for 64 codes at once (AVX512-VBMI); needs a ``dot``
            that takes 64 unsigned codes, which adds what the table of exponentials returns.
    """

    name: str
    arch: str
    mcpu: str
    mattr: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    dot: str = field(kw_only=True)
    byte_tables: bool = False

    @property
    def triple(self) -> str:
        """Architecture and system as GNU tools are named after them."""
        return f"{self.arch}-linux-gnu"

    def to_tvm(self) -> Any:
        """Return the ``tvm.target.Target``."""
        tvm = import_tvm()
        options: dict[str, object] = {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "opt-level": 3,
        }
        if self.mattr:
            options["mattr"] = list(self.mattr)
        return tvm.target.Target(options)


@dataclass(frozen=True, slots=True)
class CudaTarget:
    """NVIDIA GPUs.

    Args:
        architectures: those that machine code is made for, as ``sm_80``, oldest first; the newest one's PTX serves
            those that come after it.
        tiles: how the products of linears are cut; those of Hopper's groups of warps are left out where machine code
            is made for another architecture too.
    """

    architectures: tuple[str, ...]
    tiles: Tiles = field(default_factory=Tiles, repr=False)

    def __post_init__(self) -> None:
        if self.tiles.groups and self.architectures != (_HOPPER,):
            object.__setattr__(self, "tiles", self.tiles.without_groups())

    @property
    def name(self) -> str:
        """Public name."""
        return f"cuda:{','.join(self.architectures)}"

    @property
    def asynchronous_copies(self) -> bool:
        """Whether all copy into shared memory on their own, and multiply 16 by 8 by 32 codes at once."""
        return _number(self.architectures[0]) >= _ASYNCHRONOUS

    def generations(self) -> tuple[CudaTarget, ...]:
        """Split into targets whose architectures have the same instructions, the newest first."""
        recent = tuple(name for name in self.architectures if _number(name) >= _ASYNCHRONOUS)
        older = tuple(name for name in self.architectures if name not in recent)
        return tuple(replace(self, architectures=names) for names in (recent, older) if names)

    @property
    def arch(self) -> str:
        """Architecture of the machine that launches the kernels: that of this one."""
        return platform.machine()

    @property
    def features(self) -> tuple[str, ...]:
        """Flags that its processor must have."""
        return ()

    def to_tvm(self) -> Any:
        """Return the ``tvm.target.Target``; its host code is CUDA C++, so that one compiler makes the library."""
        options: dict[str, object] = {
            "kind": "cuda",
            "arch": f"{_HOPPER}a" if self.tiles.groups else self.architectures[0],
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
            "host": {"kind": "cuda_host"},
        }
        return import_tvm().target.Target(options)


Target = CpuTarget | CudaTarget

_AVX2 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
#: LLVM's model of the AVX512 level avoids 512-bit registers, for processors that slow down under them.
_WIDE = "-prefer-256-bit"

#: Weakest first within an architecture: ``native`` is the last one that the machine can run.
TARGETS: Mapping[str, CpuTarget] = MappingProxyType(
    {
        target.name: target
        for target in (
            CpuTarget("x86-64", "x86_64", "x86-64", dot="pmaddwd-128"),
            CpuTarget("x86-64-avx2", "x86_64", "x86-64-v3", (), _AVX2, dot="pmaddwd-256"),
            CpuTarget(
                "x86-64-avx-vnni", "x86_64", "x86-64-v3", ("+avxvnni",), (*_AVX2, "avx_vnni"), dot="vpdpbusd-256"
            ),
            CpuTarget("x86-64-avx512", "x86_64", "x86-64-v4", (_WIDE,), _AVX512, dot="pmaddwd-512"),
            CpuTarget(
                "x86-64-avx512-vnni",
                "x86_64",
                "x86-64-v4",
                ("+avx512vnni", _WIDE),
                (*_AVX512, "avx512_vnni"),
                dot="vpdpbusd-512",
            ),
            CpuTarget(
                "x86-64-avx512-vnni-vbmi",
                "x86_64",
                "x86-64-v4",
                ("+avx512vnni", "+avx512vbmi", _WIDE),
                (*_AVX512, "avx512_vnni", "avx512vbmi"),
                dot="vpdpbusd-512",
                byte_tables=True,
            ),
            CpuTarget("aarch64", "aarch64", "generic", ("+neon",), dot="smull-128"),
            CpuTarget("aarch64-dotprod", "aarch64", "generic", ("+neon", "+dotprod"), ("asimddp",), dot="sdot-128"),
        )
    }
)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the flags of this machine's processor; empty where the system does not list them."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def get_target(name: str) -> Target:
    """Return the target of a name.

    Args:
        name: a key of :data:`TARGETS`; ``native`` for the best of them on this machine; ``cuda`` for GPUs of
            :data:`CUDA_ARCHITECTURES`, or ``cuda:sm_80,sm_90`` for others.

    Raises:
        TargetError: no such target, or ``native`` on a processor that no target fits.
    """
    return _cuda_target(name) if is_cuda(name) else get_cpu_target(name)


def is_cuda(name: str) -> bool:
    """Tell whether a target's name is one of a GPU."""
    return name.partition(":")[0] == CUDA


def _cuda_target(name: str) -> CudaTarget:
    _, _, listed = name.partition(":")
    architectures = tuple(listed.split(",")) if listed else CUDA_ARCHITECTURES
    numbers = [re.fullmatch(r"sm_(\d{2,3})", architecture) for architecture in architectures]
    if name.endswith(":") or not all(numbers) or len(set(architectures)) < len(architectures):
        raise UnknownTargetError(
            f"unknown target {name!r}; expected {CUDA} or {CUDA}: and architectures with commas between them, "
            f"as {CUDA}:{','.join(CUDA_ARCHITECTURES)}"
        )
    by_age = sorted(architectures, key=_number)
    if _number(by_age[0]) < _OLDEST:
        raise TargetError(f"{by_age[0]} has no integer tensor cores; the oldest supported architecture is sm_{_OLDEST}")
    return CudaTarget(tuple(by_age))


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


def get_cpu_target(name: str) -> CpuTarget:
    """Return a target of the table, or the best one for this machine where the name is ``native``.

    Raises:
        TargetError: no such target, or ``native`` on a processor that no target fits.
    """
    if name in TARGETS:
        return TARGETS[name]
    if name != NATIVE:
        raise UnknownTargetError(f"unknown target {name!r}; known targets are {NATIVE}, {', '.join(TARGETS)}, {CUDA}")
    arch, features = platform.machine(), cpu_features()
    fitting = [t for t in TARGETS.values() if t.arch == arch and features.issuperset(t.features)]
    if not fitting:
        raise TargetError(f"no target fits this machine, whose architecture is {arch}; known are {', '.join(TARGETS)}")
    return fitting[-1]


def check_runnable(
    name: str,
    arch: str,
    required: tuple[str, ...],
    features: AbstractSet[str] | None = None,
    machine: str | None = None,
) -> None:
    """Refuse a bundle that this machine cannot run.

    Args:
        name: the bundle's target.
        arch: its architecture.
        required: the CPU features it needs.
        features: what the processor offers; detected if not given.
        machine: this machine's architecture; detected if not given.

    Raises:
        TargetError: another architecture, or missing features.
    """
    machine = platform.machine() if machine is None else machine
    if arch != machine:
        raise TargetError(
            f"the bundle was built for {arch} (target {name}), this machine is {machine}; build it again here"
        )
    missing = [flag for flag in required if flag not in (cpu_features() if features is None else features)]
    if missing:
        raise TargetError(
            f"the bundle was built for an instruction set that this CPU lacks (target {name}): "
            f"missing {', '.join(missing)}; build it again with target {NATIVE} on this machine"
        )
