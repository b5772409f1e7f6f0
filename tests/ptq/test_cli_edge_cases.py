"""Unusual but right uses of the command line, and how it ends when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.embedded import write_images, write_model

import ptq

ALL_KEPT = dict.fromkeys(("simulate", "tvm", "onnx-integer", "onnxruntime"), True)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_images(tmp_path / "data.npz")
    return tmp_path


def quantized(workspace: Path, *extra: object, data: str = "data.npz") -> Path:
    assert run("quantize", workspace / "model", "--data", workspace / data, "-o", workspace / "out", *extra) == 0
    return workspace / "out"


def test_one_calibration_image(workspace: Path) -> None:
    assert ptq.load(quantized(workspace, "--num-samples", 1)).describe()["provenance"]["calibration_images"] == "1"


def test_constant_images(workspace: Path) -> None:
    """Black images leave the image site without a range."""
    write_images(workspace / "black.npz", images=np.zeros((24, 8, 8), np.uint8))
    assert ptq.load(quantized(workspace, data="black.npz")).describe()["float_ops"] == 0


@pytest.mark.parametrize("dead", [False, True])
def test_scales_of_heads(workspace: Path, capsys: pytest.CaptureFixture[str], dead: bool) -> None:
    """A recipe file with ``granularity: head``, through calibration, artifact and native code; a head may be dead."""
    if dead:
        weights = load_file(workspace / "model" / "model.safetensors")
        width = weights["blocks.0.attn.qkv.weight"].shape[0] // 3
        for kind in ("weight", "bias"):
            weights[f"blocks.0.attn.qkv.{kind}"].unflatten(0, (3, 2, width // 2))[:, 0] = 0
        save_file(weights, workspace / "model" / "model.safetensors")
    (workspace / "heads.yaml").write_text(
        "name: heads\n"
        "rules:\n"
        "  - {kind: query, bits: 8, granularity: head}\n"
        "  - {kind: key, bits: 8, granularity: head, search: mse}\n"
        "  - {kind: value, bits: 4, granularity: head, symmetric: false, search: percentile}\n"
        "  - {kind: weight, bits: 8, granularity: channel}\n"
        "  - {kind: residual, bits: 16}\n"
        "  - {kind: constant, bits: 16}\n"
        "  - {bits: 8}\n"
    )
    out = quantized(workspace, "--recipe", workspace / "heads.yaml")
    sites = {site["kind"]: site["granularity"] for site in ptq.load(out).describe()["sites"]}
    assert [sites[kind] for kind in ("query", "key", "value", "scores")] == ["head", "head", "head", "tensor"]
    capsys.readouterr()
    assert run("verify", out, "--data", workspace / "data.npz", "--json") == 0
    assert {entry["backend"]: entry["kept"] for entry in json.loads(capsys.readouterr().out)} == ALL_KEPT


@pytest.mark.parametrize("part", ["channel", "tensor"])
def test_dead_weights(workspace: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """A dead output channel, and a linear of zeros, quantize and give finite results equal on both sides."""
    weights = load_file(workspace / "model" / "model.safetensors")
    for name in ("blocks.0.mlp.fc1", "blocks.0.attn.proj"):
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"][0 if part == "channel" else slice(None)] = 0
    save_file(weights, workspace / "model" / "model.safetensors")
    out = quantized(workspace)
    capsys.readouterr()
    assert run("verify", out, "--data", workspace / "data.npz", "--json") == 0
    assert {entry["backend"]: entry["kept"] for entry in json.loads(capsys.readouterr().out)} == ALL_KEPT


def test_preprocessing_is_printed_and_overridden(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quantized(workspace, "--mean", "0.25")
    assert "preprocessing: input 1x8x8, mean 0.25, std 0.25, bicubic, crop 1" in capsys.readouterr().err
    settings = ptq.load(out).preprocessing
    assert settings is not None
    assert settings.mean == (0.25,)
    assert run("evaluate", out, "--data", workspace / "data.npz", "--backend", "float", "--input-size", "9") == 2
    assert "quantize the model at the other size" in capsys.readouterr().err
    assert run("evaluate", out, "--data", workspace / "data.npz", "--mean", "a,b") == 2
    assert "not a list of numbers" in capsys.readouterr().err


def test_image_folder_and_resize(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of classes gives top-1; arrays of another size need --resize."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 11, 9), dtype=np.uint8)
    for index in range(4):
        (workspace / "photos" / str(index)).mkdir(parents=True)
        image.fromarray(pixels[index]).save(workspace / "photos" / str(index) / "x.png")
    assert run("evaluate", workspace / "model", "--data", workspace / "photos", "--backend", "float", "--json") == 0
    assert json.loads(capsys.readouterr().out)["top1"] is not None
    write_images(workspace / "large.npz", images=pixels, labels=np.arange(4))
    arguments = ("evaluate", workspace / "model", "--data", workspace / "large.npz", "--backend", "float")
    assert run(*arguments) == 1
    assert "pass --resize" in capsys.readouterr().err
    assert run(*arguments, "--resize") == 0


def test_labels_are_optional(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(workspace / "plain.npz", images=np.zeros((2, 8, 8), np.uint8))
    arguments = ("evaluate", workspace / "model", "--data", workspace / "plain.npz", "--backend", "float", "--json")
    assert run(*arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["top1"], result["float_top1"]) == (2, None, None)


def test_a_failed_run_is_resumed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run left is used by --resume, and OUT is what an undisturbed run writes."""
    out = quantized(workspace)
    expected = {file.name: file.read_bytes() for file in out.iterdir()}
    out.rename(workspace / "undisturbed")
    monkeypatch.setattr("ptq.api.integerize", lambda _: 1 / 0)
    assert run("quantize", workspace / "model", "--data", workspace / "data.npz", "-o", out) == 1
    assert not out.exists()
    assert list((workspace / ".out.partial").iterdir())
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in quantized(workspace, "--resume").iterdir()} == expected
    assert not (workspace / ".out.partial").exists()


def test_what_nobody_foresaw_is_one_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptq.api.integerize", lambda _: 1 / 0)
    arguments = ("quantize", workspace / "model", "--data", workspace / "data.npz", "-o", workspace / "out")
    assert run(*arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: ZeroDivisionError: division by zero; repeat with 'ptq --traceback ...' to see where"
    assert run("--traceback", *arguments) == 1
    assert "in quantize" in capsys.readouterr().err


def test_exit_codes_of_the_program(workspace: Path) -> None:
    """The module runs as a program: 2 for wrong use, 1 for failure, nothing on stdout and no traceback."""
    for arguments, code in (
        (["quantize"], 2),
        (["no-such-verb"], 2),
        (["inspect", str(workspace / "model")], 1),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "ptq", *arguments, *(["--json"] if code == 1 else [])],
            capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert "Traceback" not in result.stderr
