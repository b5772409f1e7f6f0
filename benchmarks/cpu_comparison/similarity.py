"""How like two answers are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cosine(answer: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Return the mean similarity of rows (batch, outputs), 1 where they are equal but for their length."""
    norms = np.linalg.norm(answer, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.mean(np.sum(answer * expected, axis=1) / np.maximum(norms, 1e-30)))
