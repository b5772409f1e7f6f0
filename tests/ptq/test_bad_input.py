"""Every mistake gets a message that names the thing, the right exit code, no traceback and no half-written OUT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.embedded import write_images, write_model

from ptq.cli import main


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_images(tmp_path / "data.npz")
    return tmp_path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    arguments = ["quantize", str(folder / "model"), "--data", str(folder / "data.npz"), "-o", str(folder / "out")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must fail; return its message."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert "Traceback" not in error
    return " ".join(error.split())


def quantize(workspace: Path, capsys: pytest.CaptureFixture[str], code: int, *extra: str, **replaced: str) -> str:
    """Run quantize with one thing wrong; OUT must not appear."""
    model = replaced.get("model", str(workspace / "model"))
    data = replaced.get("data", str(workspace / "data.npz"))
    message = fails(capsys, code, "quantize", model, "--data", data, "-o", str(workspace / "out"), *extra)
    assert not (workspace / "out").exists()
    return message


def test_missing_data(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is not there is named."""
    assert "nowhere.npz" in quantize(workspace, capsys, 1, data=str(workspace / "nowhere.npz"))


def test_empty_data(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No image is not a calibration set; nor is an empty folder."""
    empty = write_images(workspace / "empty.npz", count=0)
    assert "empty.npz" in quantize(workspace, capsys, 1, data=str(empty))
    (workspace / "folder").mkdir()
    assert "folder" in quantize(workspace, capsys, 1, data=str(workspace / "folder"))


def test_unreadable_data(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not what its name says is named."""
    (workspace / "broken.npz").write_bytes(b"not a zip")
    assert "broken.npz" in quantize(workspace, capsys, 1, data=str(workspace / "broken.npz"))


def test_images_of_another_size_or_channel_count(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes and channels are compared with the model's."""
    larger = write_images(workspace / "larger.npz", images=np.zeros((24, 9, 9), np.uint8))
    assert "9" in quantize(workspace, capsys, 1, data=str(larger))
    coloured = write_images(workspace / "rgb.npz", images=np.zeros((24, 8, 8, 3), np.uint8))
    assert "channel" in quantize(workspace, capsys, 1, data=str(coloured))


def test_nan_images(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not-a-number in an image is found before it poisons a range."""
    images = np.zeros((24, 1, 8, 8), np.float32)
    images[2, 0, 0, 0] = np.nan
    message = quantize(workspace, capsys, 1, data=str(write_images(workspace / "nan.npz", images=images)))
    assert "NaN" in message or "finite" in message


def test_labels_out_of_range(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label beyond the model's classes is an error, not a wrong accuracy."""
    data = write_images(artifact / "labels.npz", labels=np.full(24, 9))
    message = fails(capsys, 1, "evaluate", str(artifact / "out"), "--data", str(data))
    assert "label" in message


def test_nan_weights(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged tensor is named."""
    weights = load_file(workspace / "model" / "model.safetensors")
    weights["head.weight"][0, 0] = float("nan")
    save_file(weights, workspace / "model" / "model.safetensors")
    assert "head.weight" in quantize(workspace, capsys, 1)


def test_checkpoint_that_does_not_fit(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, unexpected and mis-shaped tensors are listed."""
    weights = load_file(workspace / "model" / "model.safetensors")
    weights["extra.weight"] = weights.pop("norm.weight")
    weights["head.bias"] = torch.zeros(9)
    save_file(weights, workspace / "model" / "model.safetensors")
    message = quantize(workspace, capsys, 1)
    assert "norm.weight" in message
    assert "extra.weight" in message
    assert "head.bias (checkpoint (9,), model (4,))" in message


def test_pickled_checkpoint(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pth is refused, with the way out."""
    (workspace / "model.pth").write_bytes(b"")
    message = quantize(workspace, capsys, 1, model=str(workspace / "model.pth"))
    assert "pickle" in message
    assert "save_file" in message


def test_unknown_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What MODEL can be is said."""
    assert "timm:NAME" in quantize(workspace, capsys, 1, model="nothing-like-it")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (("--method", "magic"), "known methods: auto, minmax, percentile, mse, repq, dopq, adalog, ias, ivit"),
        (("--bits", "w9a8"), "9 is outside 2 to 8"),
        (("--bits", "w1a8"), "1 is outside 2 to 8"),
        (("--bits", "int8"), "expected the form w8a8"),
        (("--num-samples", "0"), "--num-samples"),
    ],
)
def test_wrong_options(
    workspace: Path, capsys: pytest.CaptureFixture[str], extra: tuple[str, ...], expected: str
) -> None:
    """Wrong use is exit code 2 and names the value."""
    assert expected in quantize(workspace, capsys, 2, *extra)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\nrules:\n  - {bits: 8, colour: red}\n", "unknown key colour"),
        (
            "name: x\nrules:\n  - {kind: weight, bits: 8, granularity: channel}\n  - {name: 'block.0*', bits: 8}\n",
            "no rule",
        ),
        (
            "name: x\nrules: [{name: 'blocks.7.*', bits: 8}, {kind: weight, bits: 8, granularity: channel}, {bits: 8}]",
            "rule 1",
        ),
        ("name: x\nrules:\n  - {bits: eight}\n", "bits is 'eight', expected int"),
        ("rules: [", "is not YAML"),
        ("name: x\n", "expected the keys name and rules"),
        ("name: x\nnonlinear: paper\nrules: [{bits: 8}]", "nonlinear is 'paper', expected one of corrected, published"),
    ],
)
def test_wrong_recipes(workspace: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    """An unknown key, a rule that matches nothing, a site without a rule, and bad YAML are wrong use."""
    (workspace / "recipe.yaml").write_text(text)
    assert expected in quantize(workspace, capsys, 2, "--recipe", str(workspace / "recipe.yaml"))


def test_existing_output(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written over."""
    (workspace / "out").mkdir()
    (workspace / "out" / "mine.txt").write_text("keep")
    arguments = ("quantize", str(workspace / "model"), "--data", str(workspace / "data.npz"))
    assert "exists" in fails(capsys, 2, *arguments, "-o", str(workspace / "out"))
    assert (workspace / "out" / "mine.txt").read_text() == "keep"


def test_operators_without_an_integer_form(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them are listed at once, with the names of the nodes."""
    (workspace / "strange.py").write_text(
        "import torch\n"
        "class Strange(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.cumsum(torch.sin(x), 1).flatten(1)\n"
        "def make():\n"
        "    return Strange(), torch.zeros(2, 1, 8, 8), None\n"
    )
    monkeypatch.chdir(workspace)
    message = quantize(workspace, capsys, 1, model="strange:make")
    assert "aten.sin.default (1): sin" in message
    assert "aten.cumsum.default (1): cumsum" in message


@pytest.mark.parametrize("name", ["program.safetensors", "model.json", "manifest.json"])
def test_edited_or_truncated_artifact(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A hash that does not match is named with its file."""
    for file in (artifact / "out").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "manifest.json":
        manifest = json.loads((tmp_path / name).read_text())
        manifest["provenance"]["source"] = "another"
        (tmp_path / name).write_text(json.dumps(manifest))
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-7])
    message = fails(capsys, 1, "inspect", str(tmp_path))
    assert name in message
    assert "edited" in message


def test_not_an_artifact(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory without a manifest, and one that is not there."""
    assert "manifest.json" in fails(capsys, 1, "inspect", str(workspace / "model"))
    assert "does not exist" in fails(capsys, 2, "inspect", str(workspace / "nothing"))


def test_integer_backend_of_a_float_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only a quantized model has integers."""
    arguments = ("evaluate", str(workspace / "model"), "--data", str(workspace / "data.npz"), "--backend", "integer")
    assert "ptq quantize" in fails(capsys, 2, *arguments)


def test_a_compiled_bundle_is_no_quantized_model(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(artifact / "out"), "--format", "tvm", "-o", str(tmp_path / "bundle")])
    assert stop.value.code == 0
    capsys.readouterr()
    message = fails(capsys, 1, "inspect", str(tmp_path / "bundle"))
    assert "is a compiled bundle: it runs by tvm_backend.runtime.load" in message
