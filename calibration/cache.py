"""ActivationCache: activations of the calibration images, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

#: Where one tensor lies: the run it belongs to, the value's name, the micro-batch.
Key = tuple[str, str, int]

#: Bytes that activations may take in memory where the user says nothing.
DEFAULT_MEMORY_LIMIT = 128 << 20
_PREFIX = "activations-"


def remove_left_files(directory: Path) -> None:
    """Remove the files of a cache that was killed, from a directory that no other run uses."""
    for left in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


class ActivationCache:
    """A store of float32 tensors that never holds more than ``limit`` bytes of them in memory.

    What does not fit is written to files in a directory of its own, which goes with the cache. Files
    are read whole and not mapped, so that their pages are the system's to drop and do not count as the process's own.

    Args:
        limit: bytes in memory; 0 keeps everything in files.
        directory: where the directory for files is made; the system's place for temporary files where None.
    """

    def __init__(self, limit: int = DEFAULT_MEMORY_LIMIT, directory: Path | None = None) -> None:
        self._limit = limit
        self._parent = directory
        self._tensors: dict[Key, Tensor] = {}
        self._files: dict[Key, tuple[Path, tuple[int, ...]]] = {}
        self._bytes = 0
        self._written = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._tensors or key in self._files

    @property
    def memory_bytes(self) -> int:
        """Bytes of tensors held in memory."""
        return self._bytes

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a float32 tensor under a new key."""
        stored = tensor.detach().to("cpu").contiguous()
        # A view of a larger tensor would keep all of it alive.
        if stored.untyped_storage().nbytes() > stored.nbytes:
            stored = stored.clone()
        if self._bytes + stored.nbytes <= self._limit:
            self._tensors[key] = stored
            self._bytes += stored.nbytes
            return
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self._parent)
        path = Path(self._folder.name) / f"{self._written}.f32"
        self._written += 1
        stored.numpy().tofile(path)
        self._files[key] = path, tuple(stored.shape)

    def get(self, key: Key) -> Tensor:
        """Return a tensor that is kept; it is not to be written to."""
        if key in self._tensors:
            return self._tensors[key]
        path, shape = self._files[key]
        # Into memory of torch's own, aligned as every other tensor: last bits of a matrix product can depend on it.
        tensor = torch.empty(shape, dtype=torch.float32)
        with path.open("rb") as file:
            file.readinto(tensor.numpy().data.cast("B"))
        return tensor

    def drop(self, key: Key) -> None:
        """Forget a tensor, if it is there."""
        tensor = self._tensors.pop(key, None)
        if tensor is not None:
            self._bytes -= tensor.nbytes
        entry = self._files.pop(key, None)
        if entry is not None:
            entry[0].unlink()

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._tensors.clear()
        self._files.clear()
        self._bytes = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
