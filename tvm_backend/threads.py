"""The number of threads that TVM's worker pool uses, and where they may run.

TVM keeps one pool for each thread that calls it. The environment variable TVM_NUM_THREADS, by default half
of the processors, is read twice: when the calling thread's pool starts it is the pool's size, up to which a
number can be chosen later; and at each kernel, which runs on one thread, pool or not, if it is 1. So this
module sets the variable for good, to all processors, and chooses within the pool.

By default TVM binds each worker to a processor of its own but leaves the calling thread free, which may then
find itself on a worker's processor and share it while another is idle. Here all of them may run on every
processor of the process, and the system keeps them apart.

After a call workers look for more work in a loop before they sleep, by default for more than a tenth of a second.
Unless TVM_THREAD_POOL_SPIN_COUNT says otherwise this is cut to a few milliseconds, longer than any gap between calls.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

from quantizers.errors import UsageError
from tvm_backend.imports import import_runtime

_VARIABLE = "TVM_NUM_THREADS"
_SPIN_VARIABLE, _SPIN_COUNT = "TVM_THREAD_POOL_SPIN_COUNT", "20000"
#: TVM's affinity mode in which all workers share the processors that are listed.
_SHARED = -3
_chosen = threading.local()


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    return len(_processors())


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
    return int(_runtime_function("runtime.NumThreads")())


@functools.cache
def _runtime_function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = import_runtime().get_global_func(name)
    return function


def set_threads(threads: int) -> None:
    """Let kernels called from this thread use ``threads`` threads.

    Raises:
        UsageError: other code has already started TVM's pool in this thread, with fewer.
    """
    # After a large network has run nothing of Python is in the cache, so that every call repeats little.
    if getattr(_chosen, "threads", None) == threads and current_threads() == threads:
        return
    configure = _runtime_function("runtime.config_threadpool")
    size = str(usable_processors())
    # Writing the environment while another thread reads it is not safe in C, hence only if it differs.
    if os.environ.get(_VARIABLE) != size:
        os.environ[_VARIABLE] = size
    if _SPIN_VARIABLE not in os.environ:
        os.environ[_SPIN_VARIABLE] = _SPIN_COUNT
    configure(_SHARED, threads, [str(number) for number in _processors()])
    _chosen.threads = threads
    if current_threads() != threads:
        raise UsageError(
            f"asked for {threads} threads, but TVM's pool was already started with {current_threads()}; "
            f"set {_VARIABLE}={usable_processors()} before the process starts"
        )


def _processors() -> list[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
