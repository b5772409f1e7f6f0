"""Imports go one way. The table is the one of the design; a breach fails with file and line."""

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
        *("PIL", "huggingface_hub", "matplotlib", "timm", "torchvision", "transformers"),
    },
}

#: The heavy ones of ``ptq`` and the extras: inside functions only, so that ``import ptq`` stays light.
LOCAL_ONLY = {
    "ptq": {
        *("tvm_backend", "onnx", "onnxruntime"),
        *("PIL", "huggingface_hub", "matplotlib", "timm", "torchvision", "transformers"),
    }
}


def imported(source: str, package: tuple[str, ...] = ()) -> list[tuple[int, str, bool]]:
    """Return line, top package and whether it is at module level, of every import for other than type checking.

    Args:
        source: text of a module.
        package: the package that holds the module, for relative imports.
    """
    found: list[tuple[int, str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name.partition(".")[0], top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = (node.module or "").partition(".")[0] if node.level == 0 else package[0]
            found.append((node.lineno, name, top))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            found.extend((node.lineno, str(name).partition(".")[0], top) for name in names)
        if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
            for child in [*node.body, *node.orelse]:
                visit(child, False)
            return
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(source), True)
    return found


def breaches(owner: str, path: str, source: str) -> list[str]:
    """Return one line for each import of a module that the table forbids."""
    lines = []
    for line, name, top in imported(source, (owner,)):
        if name in (owner, "__future__") or name in sys.stdlib_module_names:
            continue
        if name not in ALLOWED[owner]:
            lines.append(f"{path}:{line}: {owner} may not import {name}")
        elif top and name in LOCAL_ONLY.get(owner, ()):
            lines.append(f"{path}:{line}: {owner} imports {name} at module level; import it where it is used")
    return lines


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
        ("ptq", "import onnx", "m.py:1: ptq imports onnx at module level; import it where it is used"),
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
        ("ptq", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import onnx"),
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
