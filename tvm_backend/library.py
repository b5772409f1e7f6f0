"""The code of a bundle, loaded into this process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from quantizers.errors import ArtifactError
from tvm_backend.bundle import LIBRARY, Bundle
from tvm_backend.imports import import_runtime, tvm_version


def load_library(bundle: Bundle) -> tuple[ModuleType, Any]:
    """Return TVM's small runtime and the functions of a bundle, by symbol.

    Raises:
        ArtifactError: the bundle was compiled by another version of TVM.
    """
    if bundle.tvm_version != tvm_version():
        raise ArtifactError(
            f"the bundle was compiled with TVM {bundle.tvm_version}, installed is {tvm_version()}; "
            "build the bundle again, or install the version that built it"
        )
    runtime = import_runtime()
    with tempfile.TemporaryDirectory() as scratch:
        # The loader maps the file, so it may go as soon as it is loaded.
        path = Path(scratch) / LIBRARY
        path.write_bytes(bundle.library)
        return runtime, runtime.load_module(str(path))
