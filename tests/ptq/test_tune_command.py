"""``ptq tune`` and ``ptq serve``: what they write, and what they say where they cannot run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.command_line import run
from support.cuda_emulated import emulate_for, emulated_driver
from support.embedded import write_images, write_model
from support.machine_code import needs_no_driver
from support.programs import random_block

import ptq.tuning
import tvm_backend.build
from quantizers.errors import ArtifactError, UsageError
from tvm_backend.gpu.machines import LocalMachine
from tvm_backend.gpu.tile_database import TileDatabase, default_path

pytestmark = pytest.mark.tvm


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tune")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    run(
        "quantize",
        str(folder / "model"),
        "--data",
        str(folder / "data.npz"),
        "-o",
        str(folder / "out"),
        "--method",
        "minmax",
    )
    return str(folder / "out")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def tune(program: object, database: Path | None = None, rpc: str | None = None) -> ptq.tuning.Tuned:
    return ptq.tuning.tune_quantized(SimpleNamespace(program=program), (1,), 0, rpc, database, lambda _: None)


def test_what_is_found_is_added_to_the_default_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that the CPU emulates, whose times mean nothing: an entry for each shape, twice the same keys."""
    monkeypatch.setattr(ptq.tuning, "_machine", lambda _: LocalMachine(emulated_driver()))
    monkeypatch.setattr(tvm_backend.build, "build_for", lambda program, target: emulate_for(program, target).bundle)
    program = random_block(0)
    for _ in range(2):
        found = tune(program)
        assert found.path == default_path()
        assert {(e.architecture, e.device) for e in found.entries} == {("sm_90", "emulated device")}
        assert [e.shape for e in TileDatabase.read(default_path()).entries] == [e.shape for e in found.entries]


def test_a_damaged_database_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text("{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        tune(random_block(0), tmp_path / "tiles.json")


@pytest.mark.parametrize("text", ["board", "board:", ":9090", "board:port"])
def test_addresses_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT, as board:9090"):
        tune(random_block(0), rpc=text)


@needs_no_driver
def test_a_missing_gpu_is_said(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("tune", out), ("serve",)):
        assert run(*command) == 1
        assert "this machine has no NVIDIA driver" in capsys.readouterr().err


def test_a_machine_that_does_not_answer_is_said(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", out, "--rpc", "127.0.0.1:9") == 1
    assert "no machine answers at 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("--format", "onnx"), ("--format", "tvm"), ("--format", "tvm", "--target", "cpu")]
)
def test_tiles_are_for_gpus(out: str, tmp_path: Path, arguments: tuple[str, ...], capsys) -> None:
    (tmp_path / "tiles.json").write_text("{}")
    code = run("export", out, *arguments, "-o", str(tmp_path / "x"), "--tiles", str(tmp_path / "tiles.json"))
    assert code == 2
    assert "--tiles is for --format tvm with --target cuda" in capsys.readouterr().err


def test_a_damaged_file_of_tiles_is_said(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiles.json").write_text("{}")
    arguments = ("--format", "tvm", "--target", "cuda", "-o", str(tmp_path / "x"))
    assert run("export", out, *arguments, "--tiles", str(tmp_path / "tiles.json")) == 1
    assert "format version None, this version reads 1" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
