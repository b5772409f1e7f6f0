"""``--memory-limit``: how it is spelled, where it goes, and that it changes nothing but memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.embedded import write_images, write_model

import ptq.api
from ptq.cli import cli, main


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_model(folder / "model")
    write_images(folder / "data.npz", 8)
    return folder


def quantize(workspace: Path, output: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(workspace / "model"), "--data", str(workspace / "data.npz"), "-o", str(output), *options])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("17b", 17),
        ("500MB", 5 * 10**8),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("1.5 GB", 15 * 10**8),
        ("0.1kB", 100),
        ("1TB", 10**12),
        (None, 2**27),
    ],
)
def test_sizes_reach_calibration_as_bytes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, count: int
) -> None:
    class ReachedError(Exception):
        """Calibration would begin here."""

    def quantize_nothing(*_: Any, memory_limit: int, **__: Any) -> None:
        assert memory_limit == count
        raise ReachedError

    monkeypatch.setattr(ptq.api, "quantize", quantize_nothing)
    options = () if text is None else ("--memory-limit", text)
    paths = [str(workspace / "model"), "--data", str(workspace / "data.npz"), "-o", str(tmp_path / "out")]
    with pytest.raises(ReachedError):
        cli.main(["quantize", *paths, *options], standalone_mode=False)


@pytest.mark.parametrize(
    "text", ["much", "2XB", "-1", "-1GB", "1e9", "2 0GB", "GB", "", "1,5GB", "0x10", "\u0663MB", "nan"]
)
def test_what_is_no_size_is_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Wrong use, told with examples; nothing is written."""
    assert quantize(workspace, tmp_path / "out", f"--memory-limit={text}") == 2
    told = capsys.readouterr().err
    assert "Invalid value for '--memory-limit'" in told
    assert f"{text!r} is no number of bytes; expected one such as 500MB, 2GB or 1000000" in " ".join(told.split())
    assert not list(tmp_path.iterdir())


def test_the_limit_changes_no_byte(workspace: Path, tmp_path: Path) -> None:
    """All activations in files, or all in memory."""
    outputs = {limit: tmp_path / limit for limit in ("0", "1GB")}
    for limit, output in outputs.items():
        assert quantize(workspace, output, "--memory-limit", limit) == 0
    files = {limit: {path.name: path.read_bytes() for path in output.iterdir()} for limit, output in outputs.items()}
    assert files["0"] == files["1GB"]
    assert set(tmp_path.iterdir()) == set(outputs.values())
