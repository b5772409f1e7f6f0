"""What tuning has found, in a file that builds read."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantizers.errors import ArtifactError
from tvm_backend.kernels.cuda.tiles import LinearShape, Tile, Tiles

FORMAT_VERSION = 1
_FILE = "cuda-tiles.json"
_REMEDY = "remove the file and run ptq tune again"


def default_path() -> Path:
    """Return where tuning writes and builds look: ``$XDG_CACHE_HOME/vit-ptq``, by default below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vit-ptq" / _FILE


@dataclass(frozen=True)
class Entry:
    """The best tile of a linear on one kind of GPU.

    Args:
        architecture: as ``sm_90``.
        device: name of the GPU that it was measured on.
        shape: of the linear.
        tile: the fastest of those that were measured.
        ms: batch size to the median milliseconds of a call.
        default_ms: the same with the default tile, in the same rounds.
    """

    architecture: str
    device: str
    shape: LinearShape
    tile: Tile
    ms: Mapping[int, float]
    default_ms: Mapping[int, float]


class TileDatabase:
    """Entries by architecture and linear.

    Args:
        entries: a later one replaces an earlier one of the same linear.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self._entries = {(entry.architecture, entry.shape): entry for entry in entries}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, in order of architecture and shape."""
        return tuple(self._entries[key] for key in sorted(self._entries))

    def updated(self, entries: Sequence[Entry]) -> TileDatabase:
        """Return a database with other entries beside these, or in their place."""
        return TileDatabase((*self.entries, *entries))

    def tiles(self, architectures: Sequence[str]) -> Tiles:
        """Return what is known for a target; of several architectures, which share one source, the newest counts.

        Args:
            architectures: oldest first.
        """
        chosen: dict[LinearShape, Tile] = {}
        for architecture in architectures:
            chosen.update({key[1]: entry.tile for key, entry in self._entries.items() if key[0] == architecture})
        return Tiles(MappingProxyType(chosen))

    @classmethod
    def read(cls, path: Path) -> TileDatabase:
        """Read a file.

        Raises:
            ArtifactError: it cannot be read, or is no such database; names what is wrong.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ArtifactError(f"{path} is not JSON: {error}; {_REMEDY}") from error
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path}: format version {version}, this version reads {FORMAT_VERSION}; {_REMEDY}")
        try:
            return cls([_entry(item) for item in document["entries"]])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} has an entry of the wrong form: {error}; {_REMEDY}") from error

    def write(self, path: Path) -> None:
        """Write a file; it appears whole or stays as it was."""
        document = {"format_version": FORMAT_VERSION, "entries": [dataclasses.asdict(entry) for entry in self.entries]}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(document, indent=1) + "\n")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def known_tiles(architectures: Sequence[str], path: Path | None = None) -> Tiles:
    """Return the tiles for a target.

    Args:
        architectures: oldest first.
        path: a database; None is the default one if it exists.

    Raises:
        ArtifactError: the database cannot be read.
    """
    if path is None:
        path = default_path()
        if not path.exists():
            return Tiles()
    return TileDatabase.read(path).tiles(architectures)


def _entry(item: Mapping[str, Any]) -> Entry:
    ms, default_ms = ({int(batch): float(taken) for batch, taken in item[key].items()} for key in ("ms", "default_ms"))
    return Entry(
        architecture=str(item["architecture"]),
        device=str(item["device"]),
        shape=LinearShape(**item["shape"]),
        tile=Tile(**item["tile"]),
        ms=ms,
        default_ms=default_ms,
    )
