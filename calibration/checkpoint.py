"""StatisticsStore: what has been observed so far, on disk, so that a killed calibration can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from calibration.statistics import Histogram
from quantizers.errors import ArtifactError

_FILE = "statistics.safetensors"


@dataclass(frozen=True, slots=True)
class StatisticsStore:
    """One file in a directory; each save replaces it whole, so a kill leaves the old or the new one.

    Args:
        directory: where the file lies; made when needed.
        key: identity of the model and the recipe; statistics of another one are refused.
    """

    directory: Path
    key: str

    def save(self, stats: Mapping[str, Histogram], digests: Sequence[str]) -> None:
        """Write statistics and the digests of the images they cover."""
        self.directory.mkdir(parents=True, exist_ok=True)
        scalars = {name: [h.count, h.low, h.high, h.exponent] for name, h in stats.items()}
        metadata = {"key": self.key, "digests": json.dumps(list(digests)), "scalars": json.dumps(scalars)}
        temporary = self.directory / (_FILE + ".tmp")
        temporary.write_bytes(safetensors.torch.save({n: h.counts for n, h in stats.items()}, metadata))
        temporary.replace(self.directory / _FILE)

    def load(self) -> tuple[dict[str, Histogram], list[str]] | None:
        """Return what was saved, or None where nothing was.

        Raises:
            ArtifactError: the file is damaged, or belongs to another model or recipe.
        """
        path = self.directory / _FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                counts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            scalars, digests = json.loads(metadata["scalars"]), json.loads(metadata["digests"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{path.name} of the interrupted run is damaged: {error}; start without resume"
            ) from error
        if metadata["key"] != self.key:
            raise ArtifactError(
                "the interrupted run was made with another model or recipe; start without resume, or repeat its options"
            )
        stats = {
            name: Histogram(int(count), float(low), float(high), exponent, counts[name])
            for name, (count, low, high, exponent) in scalars.items()
        }
        return stats, digests
