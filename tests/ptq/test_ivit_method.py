"""``--method ivit`` through the command line: quantize, verify against TVM, inspect, export, and recipes as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support.command_line import run
from support.embedded import write_images, write_model

import ptq
from calibration.rules import NONLINEAR, Recipe, Rule
from ptq.recipe import dump_recipe, parse_recipe
from ptq.recipes import RECIPES, named_recipe
from quantizers.errors import RecipeError
from quantizers.integer.regimes import REGIMES
from quantizers.spec import QuantSpec


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ivit")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    model, data = str(folder / "model"), str(folder / "data.npz")
    assert run("quantize", model, "--data", data, "-o", str(folder / "out"), "--method", "ivit") == 0
    assert run("quantize", model, "--data", data, "-o", str(folder / "corrected"), "--method", "minmax") == 0
    return folder


def inspected(workspace: Path, name: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert run("inspect", str(workspace / name), "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.tvm
def test_verify_finds_the_published_forms_equal(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through TVM and in the integer ONNX file in every bit; no QDQ file, which has no place for them, is asked for."""
    capsys.readouterr()
    assert run("verify", str(workspace / "out"), "--data", str(workspace / "data.npz"), "--json") == 0
    found = {entry["backend"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == {"simulate", "tvm", "onnx-integer"}
    assert found["tvm"]["equal"]
    assert found["onnx-integer"]["equal"]


@pytest.mark.parametrize("backend", ["simulate", "integer"])
def test_evaluate_agrees_with_float(workspace: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    capsys.readouterr()
    arguments = ("evaluate", str(workspace / "out"), "--data", str(workspace / "data.npz"), "--backend", backend)
    assert run(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["agreement"] >= 0.85


def test_the_artifact_knows_its_forms(workspace: Path) -> None:
    loaded = ptq.load(workspace / "out")
    assert loaded.calibrated.recipe == named_recipe("ivit", "w8a8")
    assert {"shiftmax", "shift_gelu", "i_layer_norm"} <= {node.op for node in loaded.program.nodes}


def test_inspect_measures_both_forms_of_every_operator(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Absolute and in steps of the result; the corrected forms err by the rounding of their result only."""
    for name, used in (("out", "published"), ("corrected", "corrected")):
        entries = inspected(workspace, name, capsys)["approximations"]
        assert [e["kind"] for e in entries[::2]] == ["layer_norm", "softmax", "layer_norm", "gelu", "layer_norm"]
        for one, other in zip(entries[::2], entries[1::2], strict=True):
            assert (one["nonlinear"], other["nonlinear"]) == NONLINEAR
            assert one["operation"] == other["operation"]
            assert [e["in_use"] for e in (one, other)] == [form == used for form in NONLINEAR]
            assert one["mean"] < other["mean"]
            for entry in (one, other):
                assert entry["largest"] == pytest.approx(entry["largest_steps"] * entry["step"])
                assert 0 < entry["mean"] <= entry["largest"]
            if one["kind"] != "softmax":
                assert one["largest_steps"] <= 0.51


def test_inspect_reports_regimes_with_advice(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes of the published program with their place; none in the corrected one."""
    assert inspected(workspace, "corrected", capsys)["regimes"] == []
    regimes = inspected(workspace, "out", capsys)["regimes"]
    squares = [regime for regime in regimes if regime["kind"] == "int32_squares"]
    assert [regime["source"] for regime in squares] == ["blocks.0.norm1", "blocks.0.norm2", "norm"]
    for regime in regimes:
        kind = REGIMES[regime["kind"]]
        assert (regime["summary"], regime["advice"], regime["changes_result"]) == (
            *(kind.summary, kind.advice, kind.changes_result),
        )


def test_inspect_prints_both(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("inspect", str(workspace / "out")) == 0
    text = capsys.readouterr().out
    assert "integer form" in text
    assert "int32_squares (results stay right; 3 nodes)" in text
    assert "  blocks.0.norm1, blocks.0.norm2, norm: for rows that deviate by more than" in text


def test_onnx_is_refused_with_advice(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ONNX has no operators for the published forms: wrong use, and what to do instead."""
    capsys.readouterr()
    target = workspace / "model.onnx"
    assert run("export", str(workspace / "out"), "--format", "onnx", "-o", str(target)) == 2
    message = capsys.readouterr().err
    assert "recipe ivit-w8a8 uses the published integer forms" in message
    assert "--format tvm" in message
    assert not target.exists()


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("bits", ["w8a8", "w4a6"])
def test_named_recipes_survive_yaml(method: str, bits: str) -> None:
    recipe = named_recipe(method, bits)
    assert parse_recipe(dump_recipe(recipe), "test") == recipe


@pytest.mark.parametrize("nonlinear", NONLINEAR)
def test_the_forms_survive_yaml(nonlinear: str) -> None:
    recipe = Recipe("x", (Rule(QuantSpec(8)),), nonlinear)
    assert parse_recipe(dump_recipe(recipe), "test") == recipe
    assert parse_recipe("name: x\nrules: [{bits: 8}]\n", "test") == dataclasses.replace(recipe, nonlinear="corrected")


@pytest.mark.parametrize("value", ["paper", "true", "[published]", "8"])
def test_unknown_forms_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe test: nonlinear is .*, expected one of corrected, published"):
        parse_recipe(f"name: x\nnonlinear: {value}\nrules: [{{bits: 8}}]\n", "test")
