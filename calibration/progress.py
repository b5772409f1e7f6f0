"""ProgressStore: what calibration has decided so far, on disk, so that a killed run goes on from its last operation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibration.calibrated import QParams
from calibration.qparams_json import format_name, qparams_from_json, qparams_to_json
from quantizers.errors import ArtifactError, DataError

_IMAGES = "images.json"


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """What was decided at one operation.

    Args:
        formats: parameters by site.
        rewritten: constants that a rewrite replaced, in the float graph and in the quantized one.
        corrected: constants that only the quantized graph has: corrected weights on their grid, rounded biases.
        notes: lines for the user.
    """

    formats: dict[str, QParams] = field(default_factory=dict)
    rewritten: dict[str, Tensor] = field(default_factory=dict)
    corrected: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ProgressStore:
    """One file for each operation; a file is there whole or not at all.

    Args:
        directory: where the files lie; made when needed.
        key: identity of the model, the recipe and this program; what belongs to another one is refused.
    """

    directory: Path
    key: str

    def begin(self, digests: Sequence[str]) -> None:
        """Remember which images the run sees, or compare them with those of the interrupted run.

        Raises:
            ArtifactError: the interrupted run had another model or recipe, or its files are damaged.
            DataError: it saw other images.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / _IMAGES
        if not path.exists():
            self._write(path, json.dumps({"key": self.key, "digests": list(digests)}).encode())
            return
        try:
            known = json.loads(path.read_bytes())
            same_key, same_images = known["key"] == self.key, known["digests"] == list(digests)
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{_IMAGES} of the interrupted run is damaged: {error}; start without resume"
            ) from error
        if not same_key:
            raise ArtifactError(
                "the interrupted run was made with another model or recipe; start without resume, or repeat its options"
            )
        if not same_images:
            raise DataError("the images differ from those of the interrupted run; start without resume")

    def save(self, index: int, operation: str, decisions: Decisions) -> None:
        """Write what was decided at an operation."""
        formats = {name: [format_name(q), qparams_to_json(q)] for name, q in decisions.formats.items()}
        metadata = {
            "operation": operation,
            "formats": json.dumps(formats),
            "notes": json.dumps(decisions.notes),
        }
        tensors = {f"{kind}/{name}": tensor for kind, name, tensor in _tensors(decisions)}
        self._write(self._path(index), safetensors.torch.save(tensors, metadata))

    def load(self, index: int, operation: str) -> Decisions | None:
        """Return what was decided at an operation, or None where the interrupted run did not get there.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = self._path(index)
        if not path.exists():
            return None
        decisions = Decisions()
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    kind, _, constant = name.partition("/")
                    # A copy, aligned as torch's own tensors are.
                    getattr(decisions, kind)[constant] = file.get_tensor(name).clone()
            if metadata["operation"] != operation:
                raise ValueError(f"it belongs to {metadata['operation']}, expected {operation}")
            for name, (kind, values) in json.loads(metadata["formats"]).items():
                decisions.formats[name] = qparams_from_json(kind, values, name)
            decisions.notes.extend(json.loads(metadata["notes"]))
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path.name} of the interrupted run is damaged: {error}; start without resume"
            ) from error
        return decisions

    def _path(self, index: int) -> Path:
        return self.directory / f"operation-{index:05d}.safetensors"

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def _tensors(decisions: Decisions) -> list[tuple[str, str, Tensor]]:
    groups: Mapping[str, Mapping[str, Tensor]] = {"rewritten": decisions.rewritten, "corrected": decisions.corrected}
    return [(kind, name, tensor.contiguous()) for kind, group in groups.items() for name, tensor in group.items()]
