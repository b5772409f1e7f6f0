"""A calibration that is killed without warning goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.embedded import write_images, write_model

import ptq.api
from ptq.cli import main


def command(folder: Path, output: str, *options: str) -> list[str]:
    model, data = str(folder / "model"), str(folder / "data.npz")
    return ["quantize", model, "--data", data, "-o", str(folder / output), "--bits", "w4a4", *options]


def run(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    write_model(folder / "model")
    write_images(folder / "data.npz", 16)
    assert run(command(folder, "unbroken")) == 0
    return folder


def killed(folder: Path, output: str, files: int) -> set[str]:
    """Start a run, kill it once it has written some files, and return the names of those that it left."""
    partial = folder / f".{output}.partial"
    # All activations in files, so that there are some of these to be left behind as well.
    arguments = command(folder, output, "--resume", "--memory-limit", "0")
    process = subprocess.Popen(
        [sys.executable, "-m", "ptq", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(list(partial.glob("operation-*.safetensors"))) < files:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote nothing to go on from"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (folder / output).exists()
    return {path.name for path in partial.iterdir()}


def test_a_killed_run_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the middle: every byte of the artifact is that of an unbroken run, and nothing is decided twice."""
    left = killed(workspace, "killed", 3)
    operations = {name for name in left if name.endswith(".safetensors")}
    assert len(operations) >= 3
    assert "images.json" in left
    before = {name: (workspace / ".killed.partial" / name).stat().st_mtime_ns for name in operations}
    seen: dict[str, int] = {}

    def look_and_stop(_: object) -> None:
        seen.update({path.name: path.stat().st_mtime_ns for path in (workspace / ".killed.partial").iterdir()})
        raise KeyboardInterrupt

    # A first attempt to go on is interrupted too, after calibration.
    with monkeypatch.context() as patch:
        patch.setattr(ptq.api, "integerize", look_and_stop)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main(command(workspace, "killed", "--resume"))
    assert {name: seen[name] for name in operations} == before
    assert len([name for name in seen if name.endswith(".safetensors")]) > len(operations)
    assert not [name for name in seen if name.startswith("activations-")]
    assert run(command(workspace, "killed", "--resume")) == 0
    assert contents(workspace / "killed") == contents(workspace / "unbroken")
    assert not (workspace / ".killed.partial").exists()


@pytest.fixture(scope="module")
def partial(workspace: Path) -> Path:
    """Return what a killed run left, at a name that no test writes to."""
    killed(workspace, "other", 2)
    return (workspace / ".other.partial").rename(workspace / "left")


def test_files_of_activations_that_were_left_are_no_obstacle(workspace: Path, partial: Path) -> None:
    """Files that were being written when the run was killed are not read."""
    target = workspace / ".cut.partial"
    shutil.copytree(partial, target)
    (target / "operation-00099.safetensors.tmp").write_bytes(b"half")
    (target / "images.json.tmp").write_bytes(b"{")
    assert run(command(workspace, "cut", "--resume")) == 0
    assert contents(workspace / "cut") == contents(workspace / "unbroken")


def test_without_resume_nothing_that_was_left_is_used(workspace: Path, partial: Path) -> None:
    target = workspace / ".fresh.partial"
    shutil.copytree(partial, target)
    for path in target.glob("operation-*"):
        path.write_bytes(b"damaged")
    assert run(command(workspace, "fresh")) == 0
    assert contents(workspace / "fresh") == contents(workspace / "unbroken")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "w8a8"), "the interrupted run was made with another model or recipe"),
        (("--method", "mse"), "the interrupted run was made with another model or recipe"),
        (("--num-samples", "8"), "the images differ from those of the interrupted run"),
    ],
)
def test_another_run_is_not_mixed_in(
    workspace: Path, partial: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    """Another model, recipe or set of images is refused; nothing is written."""
    target = workspace / ".mixed.partial"
    shutil.copytree(partial, target)
    assert run([*command(workspace, "mixed", "--resume"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (workspace / "mixed").exists()
    shutil.rmtree(target)


@pytest.mark.parametrize("damage", ["cut", "empty", "renamed"])
def test_damage_is_told_with_the_file(
    workspace: Path, partial: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """A file that is not whole, or not that operation's, stops the run, which says what to do."""
    target = workspace / ".damaged.partial"
    shutil.copytree(partial, target)
    first, second = sorted(target.glob("operation-*.safetensors"))[:2]
    first.write_bytes({"cut": first.read_bytes()[:-3], "empty": b"", "renamed": second.read_bytes()}[damage])
    assert run(command(workspace, "damaged", "--resume")) == 1
    told = capsys.readouterr().err
    assert f"{first.name} of the interrupted run is damaged" in told
    assert "start without resume" in told
    shutil.rmtree(target)
