"""Bundles survive the disk unchanged, and damage is found and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.programs import random_images

from quantizers.errors import ArtifactError, TargetError, UsageError
from tvm_backend.bundle import load_bundle, save_bundle
from tvm_backend.runtime import CompiledProgram, load
from tvm_backend.schedule import CONSTANT, to_json

pytestmark = pytest.mark.tvm


@pytest.fixture
def saved(small_bundle, tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_bundle(small_bundle, directory)
    return directory


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def test_round_trip_keeps_everything(saved, small_bundle, small_program):
    again = load_bundle(saved)
    for name in ("target", "arch", "cpu_features", "program_sha256", "inputs", "outputs", "tvm_version", "library"):
        assert getattr(again, name) == getattr(small_bundle, name), name
    for one, other in zip(again.constants, small_bundle.constants, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    images = random_images(small_program, 3, seed=0)
    for one, other in zip(load(saved, 1)(images), CompiledProgram(small_bundle)(images), strict=True):
        assert one.tobytes() == other.tobytes()


def test_manifest_says_what_the_bundle_is(saved, small_program):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["inputs"] == [{"name": "image", "dtype": "float32", "shape": [3, 2, 8]}]
    assert [entry["name"] for entry in manifest["outputs"]] == [name for name, _ in small_program.outputs]
    assert {path.name for path in saved.iterdir()} == {"manifest.json", "model.so", "constants.safetensors"}
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_an_existing_directory_is_kept(saved, small_bundle):
    with pytest.raises(UsageError, match=r"model exists; choose another name or remove it first"):
        save_bundle(small_bundle, saved)


def test_a_missing_parent_is_named(small_bundle, tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not a directory; create it first"):
        save_bundle(small_bundle, tmp_path / "nowhere" / "model")


@pytest.mark.parametrize("name", ["model.so", "constants.safetensors"])
def test_truncated_or_missing_files(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name} is damaged: its SHA-256 .* copy it again or build the bundle"):
        load(saved)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{name} cannot be read \(No such file or directory\); build the bundle"):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"manifest\.json: format version 1, this version reads 2; build the bundle again"),
        ({"compressed": True}, r"manifest\.json: unknown keys compressed; build the bundle again"),
        ({"target": None}, r"manifest\.json: no target; build the bundle again"),
        ({"inputs": [{"name": "image"}]}, r"manifest\.json: inputs has a value of the wrong form"),
        ({"cpu_features": "avx2"}, r"manifest\.json: cpu_features has a value of the wrong form, 'avx2'"),
        ({"tvm_version": "0.1"}, r"compiled with TVM 0\.1, installed is .*; build the bundle again, or install"),
        ({"schedule": {"calls": []}}, r"manifest\.json: schedule has a value of the wrong form"),
        ({"library_sha256": "0" * 64}, r"model\.so is damaged"),
    ],
)
def test_bad_manifests(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(saved)


def test_a_schedule_that_takes_constants_of_another_bundle(saved, small_bundle):
    schedule = to_json(small_bundle.schedule)
    count = len(small_bundle.constants)
    argument = next(a for call in schedule["calls"] for a in call[-1] if a[0] == CONSTANT)
    argument[1] = count
    edit(saved, schedule=schedule)
    message = rf"manifest\.json: schedule does not fit the bundle: .* constant {count}, there are {count} .*; build the"
    with pytest.raises(ArtifactError, match=message):
        load(saved)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "expected an object, found list")])
def test_manifests_that_are_no_object(saved, text, message):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        load(saved)


def test_an_instruction_set_that_this_cpu_lacks(saved):
    edit(saved, cpu_features=["sse2", "amx_tile_2099"])
    with pytest.raises(TargetError, match=r"an instruction set that this CPU lacks .*missing amx_tile_2099; build it"):
        load(saved)


def test_another_architecture(small_bundle):
    with pytest.raises(TargetError, match=r"built for riscv64 .* this machine is"):
        CompiledProgram(replace(small_bundle, arch="riscv64"))
