"""The command line from end to end, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.codebooks import GELU_LOW, with_codebooks
from support.command_line import run
from support.embedded import write_images, write_model

import ptq
import ptq.commands.backends
from calibration.integerize import integerize
from ptq.commands.options import Target
from ptq.recipes import DEFAULT_METHOD, RECIPES
from quantizers.adalog import adalog
from quantizers.logarithm import log_sqrt2


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    run("quantize", str(folder / "model"), "--data", str(folder / "data.npz"), "-o", str(folder / "out"))
    return folder


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    """Run a command with --json; nothing but one document may be on stdout."""
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_quantize_writes_what_load_reads(workspace: Path) -> None:
    """OUT holds the artifact, no temporary remains, and the description counts no float operator."""
    assert ptq.load(workspace / "out").describe()["float_ops"] == 0
    assert not [path.name for path in workspace.iterdir() if path.name.startswith(".")]


def test_the_same_run_writes_the_same_bytes_at_any_batch_size(workspace: Path) -> None:
    """Batch size changes how images are read, never the result."""
    model, data = str(workspace / "model"), str(workspace / "data.npz")
    assert run("quantize", model, "--data", data, "-o", str(workspace / "again"), "--batch-size", "5") == 0
    for name in ("manifest.json", "program.json", "program.safetensors", "model.json", "model.safetensors"):
        assert (workspace / "again" / name).read_bytes() == (workspace / "out" / name).read_bytes(), name


@pytest.mark.parametrize("backend", ["float", "simulate", "integer", "tvm", "onnxruntime", "onnx-integer"])
def test_evaluate_reports_every_backend(workspace: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    """The JSON holds the documented keys, and integers agree with float on nearly all images."""
    result = json_of(
        capsys, "evaluate", str(workspace / "out"), "--data", str(workspace / "data.npz"), "--backend", backend
    )
    assert isinstance(result, dict)
    assert {"backend", "n", "top1", "float_top1", "agreement"} <= set(result)
    assert result["backend"] == backend
    assert result["n"] == 24
    assert 0.85 <= result["agreement"] <= 1


def test_verify_compares_every_backend(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TVM and the integer ONNX file give the interpreter's bits, the simulation its numbers, QDQ about the same."""
    found = json_of(capsys, "verify", str(workspace / "out"), "--data", str(workspace / "data.npz"))
    assert isinstance(found, list)
    entries = {entry["backend"]: entry for entry in found}
    assert list(entries) == ["simulate", "tvm", "onnx-integer", "onnxruntime"]
    assert all(entry["kept"] and entry["n"] == 24 for entry in found)
    for backend in ("tvm", "onnx-integer"):
        assert (entries[backend]["equal"], entries[backend]["max_abs_diff"]) == (True, 0.0)
    assert entries["simulate"]["max_steps"] < 1e-3
    assert 0 < entries["onnxruntime"]["max_steps"] < 20
    assert run("verify", str(workspace / "out"), "--data", str(workspace / "data.npz"), "--backend", "simulate") == 0
    text = capsys.readouterr().out
    assert "float32 rounding" in text
    assert "tvm" not in text


def test_verify_fails_where_a_promise_is_broken(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit in one result is told, and is the exit code."""
    honest = ptq.commands.backends.open_backend

    def flawed(target: Target, backend: str) -> Callable[[torch.Tensor], torch.Tensor]:
        run_backend = honest(target, backend)
        if backend != "tvm":
            return run_backend
        return lambda images: torch.nextafter(run_backend(images), torch.tensor(torch.inf))

    monkeypatch.setattr(ptq.commands.backends, "open_backend", flawed)
    arguments = ("--data", str(workspace / "data.npz"), "--backend", "tvm", "--backend", "simulate")
    assert run("verify", str(workspace / "out"), *arguments) == 1
    assert "NO" in capsys.readouterr().out


def test_inspect_names_codebooks(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their parameters, for people; files keep one key for each kind of format."""
    plain = ptq.load(workspace / "out")
    formats = {"probability": log_sqrt2(4), r".*fc2\.input": adalog(4, 20)}
    changed = with_codebooks(plain.calibrated, formats, low=GELU_LOW)
    replace(plain, calibrated=changed, program=integerize(changed)).save(workspace / "codebooks")
    result = json_of(capsys, "inspect", str(workspace / "codebooks"))
    assert isinstance(result, dict)
    shown = {site["name"]: site["format"] for site in result["sites"]}
    assert {shown[name] for name in shown if name.endswith("fc2.input")} == {"adalog(q=20)"}
    assert {shown[name] for name in shown if name.endswith("probability")} == {"row_relative log_sqrt2"}
    kinds = {"uniform", "row_relative", "codebook"}
    for name in ("manifest.json", "model.json"):
        stored = json.loads((workspace / "codebooks" / name).read_text())
        assert {site["format"] for site in stored["sites"]} == kinds
    assert run("inspect", str(workspace / "codebooks")) == 0
    assert "adalog(q=20)" in capsys.readouterr().out


def test_inspect_lists_sites_and_sizes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every documented key is there, and the integers are smaller than the floats."""
    result = json_of(capsys, "inspect", str(workspace / "out"))
    assert isinstance(result, dict)
    assert {"integer_ops", "float_ops", "sites", "size_bytes", "float_size_bytes"} <= set(result)
    assert result["float_ops"] == 0
    assert {"name", "format", "bits", "granularity"} <= set(result["sites"][0])


def test_benchmark_lists_timings(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One entry for each backend and batch size."""
    arguments = ("benchmark", str(workspace / "out"), "--backend", "float", "--backend", "simulate", "--batch", "1")
    result = json_of(capsys, *arguments, "--batch", "3", "--rounds", "2", "--threads", "1")
    assert isinstance(result, list)
    assert [(entry["backend"], entry["batch"], entry["threads"]) for entry in result] == [
        ("float", 1, 1),
        ("simulate", 1, 1),
        ("float", 3, 1),
        ("simulate", 3, 1),
    ]
    assert {"median_ms", "p10_ms", "p90_ms"} <= set(result[0])


def test_recipes_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from the table."""
    result = json_of(capsys, "recipes")
    assert isinstance(result, dict)
    names = ["auto", "minmax", "percentile", "mse", "repq", "dopq", "adalog", "ias", "ivit"]
    assert [entry["name"] for entry in result["recipes"]] == names


def test_the_page_of_methods_holds_the_table() -> None:
    """A row for each method, and the default marked."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`( \(default\))? \|", page, re.MULTILINE)
    assert {name for name, _ in rows} == set(RECIPES)
    assert [name for name, default in rows if default] == [DEFAULT_METHOD]


@pytest.mark.parametrize(
    ("format_name", "name"), [("onnx", "model.onnx"), ("onnx-integer", "integer.onnx"), ("tvm", "bundle")]
)
def test_export_writes_once(workspace: Path, capsys: pytest.CaptureFixture[str], format_name: str, name: str) -> None:
    """An export is written, and never over something that exists."""
    output = workspace / name
    assert run("export", str(workspace / "out"), "--format", format_name, "-o", str(output)) == 0
    assert output.exists()
    assert run("export", str(workspace / "out"), "--format", format_name, "-o", str(output)) == 2
    assert "exists" in capsys.readouterr().err


def test_help_needs_no_heavy_import() -> None:
    """``ptq --help`` loads neither torch nor TVM nor onnx nor onnxruntime."""
    code = (
        "import sys\nfrom ptq.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('torch', 'numpy', 'tvm', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")
