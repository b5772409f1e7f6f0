"""Where a runtime put the products of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SEED = 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a runtime runs.

    Args:
        name: the runtime's name for it.
        integer: whether it multiplies integers.
        milliseconds: of one call; None where the runtime tells no time.
    """

    name: str
    integer: bool
    milliseconds: float | None


@dataclass(frozen=True, slots=True)
class Placement:
    """A file as a runtime runs it.

    Args:
        version: of the runtime.
        kernels: by the name of the product in the file.
        others: milliseconds and number of all other kernels, by kind.
    """

    version: str
    kernels: Mapping[str, Kernel]
    others: Mapping[str, tuple[float, int]]


def random_input(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return values of normal distribution, the same for every run."""
    return np.random.default_rng(_SEED).standard_normal(shape).astype(np.float32)


def add_other(others: dict[str, tuple[float, int]], kind: str, milliseconds: float) -> None:
    """Count a kernel."""
    known = others.get(kind, (0.0, 0))
    others[kind] = known[0] + milliseconds, known[1] + 1
