"""Run a compiled program on numpy arrays; needs TVM's runtime, never torch."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.errors import ArtifactError
from quantizers.integer.inputs import check_finite, check_inputs
from tvm_backend.bundle import LIBRARY, Bundle, load_bundle
from tvm_backend.imports import import_tvm
from tvm_backend.targets import check_runnable
from tvm_backend.threads import check_threads, set_threads

_ENTRY = "main"


class CompiledProgram:
    """A compiled program, ready to run; calls from several threads run one after another.

    Args:
        bundle: what to run.
        threads: worker threads, from 1 to the processors of this process; all of them if None.

    Raises:
        ArtifactError: the bundle was compiled by another version of TVM.
        TargetError: this machine lacks what the code needs.
        UsageError: the number of threads is out of range.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        check_runnable(bundle.target, bundle.arch, bundle.cpu_features)
        self.bundle = bundle
        self.threads = check_threads(threads)
        tvm = import_tvm()
        if bundle.tvm_version != str(tvm.__version__):
            raise ArtifactError(
                f"the bundle was compiled with TVM {bundle.tvm_version}, installed is {tvm.__version__}; "
                "build the bundle again, or install the version that built it"
            )
        # The virtual machine keeps the frames of the running call, so it can run one at a time.
        self._running = threading.Lock()
        self._tensor: Any = tvm.runtime.tensor
        with tempfile.TemporaryDirectory() as scratch:
            # The loader maps the file, so it may go as soon as it is loaded.
            path = Path(scratch) / LIBRARY
            path.write_bytes(bundle.library)
            library = tvm.runtime.load_module(str(path))
        machine = import_tvm("tvm.runtime.vm").VirtualMachine(library, tvm.cpu())
        self._run: Any = machine[_ENTRY]
        self._constants = [self._tensor(array) for array in bundle.constants]

    def __call__(self, *inputs: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.generic], ...]:
        """Run the program.

        Args:
            inputs: float32 ``(batch, *shape)``, in the order of ``bundle.inputs``.

        Returns:
            One array ``(batch, *shape)`` for each of ``bundle.outputs``.

        Raises:
            DataError: wrong count, shape or dtype of inputs, or values that are not finite.
        """
        arrays = [np.asarray(array) for array in inputs]
        check_inputs(self.bundle.inputs, [(array.shape, array.dtype.name) for array in arrays])
        for (name, _), array in zip(self.bundle.inputs, arrays, strict=True):
            check_finite(name, finite=bool(np.isfinite(array).all()))
        # TVM's pool belongs to the calling thread and another program may have set it since.
        set_threads(self.threads)
        tensors = [self._tensor(np.ascontiguousarray(array)) for array in arrays]
        with self._running:
            results = self._run(*tensors, self._constants)
        return tuple(result.numpy() for result in results)


def load(directory: Path | str, threads: int | None = None) -> CompiledProgram:
    """Load a bundle that :func:`tvm_backend.bundle.save_bundle` wrote.

    Raises:
        ArtifactError: the bundle is damaged, or was compiled by another version of TVM.
        TargetError: this machine lacks what the code needs.
        UsageError: the number of threads is out of range.
    """
    return CompiledProgram(load_bundle(directory), threads)
