"""Heavy packages load only when they are needed, proved in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("tvm", "tvm_ffi", "onnx", "onnxruntime", "timm", "transformers", "matplotlib")


def loaded_by(statement: str, *, among: tuple[str, ...]) -> list[str]:
    """Return which of the packages are loaded after the statement ran in a new process."""
    check = f"{statement}\nimport sys\nprint(*(name for name in {among!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("ptq", HEAVY),
        ("ptq.cli", HEAVY),
        ("calibration", HEAVY),
        ("quantizers.errors", (*HEAVY, "torch", "numpy")),
        ("quantizers.integer.program", (*HEAVY, "torch")),
        ("quantizers.integer.verify", (*HEAVY, "torch")),
        ("quantizers.integer.serialize", (*HEAVY, "torch")),
        ("tvm_backend.runtime", ("torch", "onnx", "onnxruntime")),
    ],
)
def test_import_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    assert loaded_by(f"import {module}", among=unwanted) == []


def test_every_module_of_calibration_loads_without_tvm() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "calibration").rglob("*.py"))
        if path.stem != "__init__"
    ]
    assert loaded_by("import " + ", ".join(names), among=HEAVY) == []


def test_the_check_can_fail() -> None:
    assert loaded_by("import quantizers.integer.interpret", among=("torch", "tvm")) == ["torch"]
