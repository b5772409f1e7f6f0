"""Where our engine's time goes: the share of each kind of kernel, and its distance from the processor's int8 peak."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEAK_MEASUREMENTS = 4


def profile_kernels(program: Any, images: Any, rounds: int) -> dict[str, Any]:
    """Time the kernels of a loaded program, and the peak in the same process.

    Args:
        program: a ``tvm_backend.runtime.CompiledProgram``.
        images: float32 (batch, 3, height, width).
        rounds: runs of each kernel.

    Returns:
        ``kernels``: kernel, shape, calls, and macs and median_ms of all calls; ``peak``: multiply-adds a second; or
        ``problem``: why there are none.
    """
    if importlib.util.find_spec("tvm_backend.profile") is None:
        return {"problem": "this version of the engine has no profile of its kernels (tvm_backend.profile)"}
    from tvm_backend.profile import int8_peak, profile  # noqa: PLC0415 - other workers need no TVM

    kernels = [asdict(kernel) for kernel in profile(program, images, rounds=rounds)]
    # A peak is the most that was seen; a disturbance can only lower it.
    peak = max(int8_peak(program.bundle.target, program.threads) for _ in range(PEAK_MEASUREMENTS))
    return {"kernels": kernels, "peak": peak}


@dataclass(frozen=True, slots=True)
class KernelKind:
    """All kernels of one kind, in one run of the network.

    Args:
        kernel: the kind.
        calls: in a run.
        ms: milliseconds of all calls.
        share: of the time of all kernels, 0 to 1.
        macs: multiply-adds of all calls.
        of_peak: multiply-adds a second over the peak; 0 for kernels without any.
    """

    kernel: str
    calls: int
    ms: float
    share: float
    macs: int
    of_peak: float


def by_kind(kernels: Sequence[dict[str, Any]], peak: float) -> list[KernelKind]:
    """Sum over kernels of a kind, the longest first.

    Args:
        kernels: see :func:`profile_kernels`.
        peak: multiply-adds a second.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel["kernel"]].append(kernel)
    total = sum(kernel["median_ms"] for kernel in kernels)
    found = []
    for kind, members in groups.items():
        ms = sum(member["median_ms"] for member in members)
        macs = sum(member["macs"] for member in members)
        calls = sum(member["calls"] for member in members)
        found.append(KernelKind(kind, calls, ms, ms / total, macs, 1000 * macs / ms / peak))
    return sorted(found, key=lambda kind: -kind.ms)


def floor_ms(kernels: Sequence[dict[str, Any]], peak: float) -> float:
    """Return what the matrix products alone would take at the peak, milliseconds."""
    macs: int = sum(kernel["macs"] for kernel in kernels)
    return 1000 * macs / peak
