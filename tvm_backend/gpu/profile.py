"""Where the time of a program on a GPU goes."""

from __future__ import annotations

import statistics

from quantizers.errors import UsageError
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.profile import KernelTime, by_kernel

#: Runs of a kernel in a row: enough for the clock, few enough to stay short.
_IN_A_ROW = 20


def profile(program: CudaProgram, batch: int, rounds: int = 10) -> list[KernelTime]:
    """Time every kernel of a program on its own.

    Args:
        program: what to run, on whatever lies in its inputs: no kernel's time depends on values.
        batch: samples.
        rounds: measurements of each kernel; the median counts.

    Returns:
        One entry for each kind of kernel and shape, slowest first.

    Raises:
        UsageError: ``rounds`` is not positive.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}, expected at least 1")
    runs = [program.time_calls(batch, _IN_A_ROW) for _ in range(rounds)]
    return by_kernel(program.bundle.schedule, batch, [statistics.median(taken) for taken in zip(*runs, strict=True)])
