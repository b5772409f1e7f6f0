"""The number of threads that TVM's worker pool uses.

TVM keeps one pool for each thread that calls it. The environment variable TVM_NUM_THREADS, by default half
of the processors, is read twice: when the calling thread's pool starts it is the pool's size, up to which a
number can be chosen later; and at each kernel, which runs on one thread, pool or not, if it is 1. So this
module sets the variable for good, to all processors, and chooses within the pool.
"""

from __future__ import annotations

import os

from quantizers.errors import UsageError
from tvm_backend.imports import import_runtime

_VARIABLE = "TVM_NUM_THREADS"
#: TVM's affinity mode "big cores first", its default.
_AFFINITY = 1


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """Return the number of threads to use; all processors if None.

    Raises:
        UsageError: below 1, or more than the processors that this process may use.
    """
    available = usable_processors()
    if threads is None:
        return available
    if not 1 <= threads <= available:
        raise UsageError(f"threads is {threads}, expected 1 to {available}, the processors this process may use")
    return threads


def current_threads() -> int:
    """Return how many threads a kernel called from this thread would use."""
    return int(import_runtime().get_global_func("runtime.NumThreads")())


def set_threads(threads: int) -> None:
    """Let kernels called from this thread use ``threads`` threads.

    Raises:
        UsageError: other code has already started TVM's pool in this thread, with fewer.
    """
    configure = import_runtime().get_global_func("runtime.config_threadpool")
    size = str(usable_processors())
    # Writing the environment while another thread reads it is not safe in C, hence only if it differs.
    if os.environ.get(_VARIABLE) != size:
        os.environ[_VARIABLE] = size
    # Choosing moves the pool's threads between processors, so it is not repeated for every call.
    if current_threads() != threads:
        configure(_AFFINITY, threads)
    if current_threads() != threads:
        raise UsageError(
            f"asked for {threads} threads, but TVM's pool was already started with {current_threads()}; "
            f"set {_VARIABLE}={usable_processors()} before the process starts"
        )
