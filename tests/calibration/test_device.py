"""Calibration, simulation and diagnosis on a device that is not the CPU: everything is where it has to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

ROOT = Path(__file__).resolve().parent.parent.parent
#: Every search, rewrite, correction and executor between them.
CASES = ("auto:w4a4", "repq:w4a4", "adalog:w3a3", "percentile:w8a8", "ivit:w8a8")


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)
def test_another_device_decides_the_same() -> None:
    """Tensors of a device that refuses to meet those of the CPU; its arithmetic is the CPU's, so all is equal."""
    command = [sys.executable, "-m", "support.on_pretended_device", *CASES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "compared\n"
