"""The number of threads that TVM's worker pool uses.

TVM keeps one pool for each thread that calls it. The pool is as large as the environment variable
TVM_NUM_THREADS says when the thread first calls, by default half of the processors; later only a
number up to that size can be chosen. So this module creates the pool large enough and then chooses.
"""

from __future__ import annotations

import os
import threading

from quantizers.errors import UsageError
from tvm_backend.imports import import_tvm

_VARIABLE = "TVM_NUM_THREADS"
#: TVM's affinity mode "big cores first", its default.
_AFFINITY = 1
#: The environment is the process's, so only one thread at a time may start its pool.
_ENVIRONMENT = threading.Lock()


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
    return int(import_tvm("tvm_ffi").get_global_func("runtime.NumThreads")())


def set_threads(threads: int) -> None:
    """Let kernels called from this thread use ``threads`` threads.

    Raises:
        UsageError: other code has already started TVM's pool in this thread, with fewer.
    """
    configure = import_tvm("tvm_ffi").get_global_func("runtime.config_threadpool")
    with _ENVIRONMENT:
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(max(threads, usable_processors()))
        try:
            configure(_AFFINITY, threads)
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before
    if current_threads() != threads:
        raise UsageError(
            f"asked for {threads} threads, but TVM's pool was already started with {current_threads()}; "
            f"set {_VARIABLE}={threads} before the process starts"
        )
