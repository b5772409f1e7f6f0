"""The one door through which this package reaches TVM."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_OPTIONAL = "torch"


def import_tvm(module: str = "tvm") -> ModuleType:
    """Import TVM or one of its modules without importing torch.

    ``tvm_ffi`` imports torch when it is installed, only to exchange tensors with it. This package passes
    numpy arrays, and a process that runs a bundle should not pay for torch's memory and start-up time.

    Args:
        module: dotted name, ``tvm`` or ``tvm_ffi`` or below.

    Raises:
        ImportError: the module is not installed.
    """
    if _OPTIONAL in sys.modules:
        return importlib.import_module(module)
    # None makes an import fail like that of a package which is not installed; the caller may import it later.
    sys.modules[_OPTIONAL] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        if sys.modules.get(_OPTIONAL, _OPTIONAL) is None:
            del sys.modules[_OPTIONAL]


def tvm_version() -> str:
    """Return the version of the installed TVM, without loading it."""
    return importlib.metadata.version("apache-tvm")


def import_runtime() -> ModuleType:
    """Import ``tvm_ffi`` with TVM's runtime library, which compiled functions call; the compiler stays on disk.

    Raises:
        ImportError: TVM is not installed.
    """
    runtime = import_tvm("tvm_ffi")
    if runtime.get_global_func("runtime.NumThreads", allow_missing=True) is None:
        spec = importlib.util.find_spec("tvm")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("TVM is not installed; install apache-tvm")
        library = Path(spec.submodule_search_locations[0]) / "lib" / "libtvm_runtime.so"
        # Compiled functions look their helpers up in the whole process.
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return runtime
