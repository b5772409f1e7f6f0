"""Imports go one way. The table is the one of the design; a breach fails with file and line.

That heavy packages load only when they are needed is tested in ``test_light_imports.py``, in fresh processes.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Package to the packages it may import besides itself and the standard library. The names of the house are
#: the table of the design; sympy holds the symbolic extents of torch.export, safetensors the arrays of files.
ALLOWED = {
    "quantizers": {"numpy", "torch", "safetensors"},
    "calibration": {"quantizers", "numpy", "torch", "scipy", "sympy", "safetensors"},
    "tvm_backend": {"quantizers", "numpy", "safetensors", "tvm", "tvm_ffi"},
    "ptq": {
        *("quantizers", "calibration", "tvm_backend"),
        *("click", "numpy", "onnx", "onnxruntime", "rich", "safetensors", "scipy", "torch", "yaml"),
        *("PIL", "huggingface_hub", "matplotlib", "openvino", "timm", "torchvision", "transformers"),
    },
}


def imported(source: str, package: str) -> list[tuple[int, str]]:
    """Return line and top package of every import, at module level or inside functions.

    Args:
        source: text of a module.
        package: the package that holds the module, for relative imports.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module if node.level == 0 else package]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        found.extend((node.lineno, str(name).partition(".")[0]) for name in names)
    return sorted(found)


def breaches(owner: str, path: str, source: str) -> list[str]:
    """Return one line for each import of a module that the table forbids."""
    return [
        f"{path}:{line}: {owner} may not import {name}"
        for line, name in imported(source, owner)
        if name != owner and name not in sys.stdlib_module_names and name not in ALLOWED[owner]
    ]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_of_a_package_follow_the_table(package: str) -> None:
    assert modules(package), f"{package} holds no module"
    found = [
        line
        for path in modules(package)
        for line in breaches(package, str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("owner", "source", "expected"),
    [
        ("calibration", "import tvm_backend.lower", "m.py:1: calibration may not import tvm_backend"),
        ("tvm_backend", "\nfrom calibration.graph import Graph", "m.py:2: tvm_backend may not import calibration"),
        ("tvm_backend", "def f():\n    import torch.export", "m.py:2: tvm_backend may not import torch"),
        ("quantizers", "from tvm import relax", "m.py:1: quantizers may not import tvm"),
        ("quantizers", "import importlib\nimportlib.import_module('ptq.api')", "m.py:2: quantizers may not import ptq"),
        ("calibration", "if True:\n  from ptq import api", "m.py:2: calibration may not import ptq"),
        ("ptq", "import requests", "m.py:1: ptq may not import requests"),
    ],
)
def test_a_breach_is_found_with_file_and_line(owner: str, source: str, expected: str) -> None:
    assert breaches(owner, "m.py", source) == [expected]


@pytest.mark.parametrize(
    ("owner", "source"),
    [
        (
            "calibration",
            "from __future__ import annotations\nimport json, numpy\nfrom quantizers import errors",
        ),
        ("ptq", "def f():\n    import onnx\n    from tvm_backend import build"),
        ("tvm_backend", "from . import build\nfrom .kernels import kernel"),
    ],
)
def test_allowed_imports_pass(owner: str, source: str) -> None:
    assert breaches(owner, "m.py", source) == []


def test_the_table_knows_every_package() -> None:
    """A fifth package beside the four has to be entered above before it is used."""
    outside = {"tests", "examples", "benchmarks"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - outside
    assert packages == set(ALLOWED)
