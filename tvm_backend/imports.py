"""The one door through which this package reaches TVM."""

from __future__ import annotations

import importlib
import sys
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
