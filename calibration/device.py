"""The device that calibration runs on where nobody says."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """Return a CUDA device where torch has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
