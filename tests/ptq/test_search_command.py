"""``ptq search`` from end to end on a tiny network, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.command_line import run
from support.embedded import MODEL_ARGS, write_images, write_model
from torch import Tensor

import ptq
from calibration.integerize import integerize
from calibration.mixed_precision.candidates import assemble, weight_sites
from ptq import mixed_precision
from ptq.mixed_precision.costs import Costs, WidthCost, stored_width, useful_widths
from ptq.mixed_precision.networks import Networks
from ptq.recipe import load_recipe
from ptq.sources import load_model
from ptq.vision_transformer import VisionTransformer
from quantizers.errors import UsageError
from quantizers.integer.interpret import interpret
from quantizers.integer.serialize import program_to_bytes


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and images that are labelled by its own answers: float is always right."""
    folder = tmp_path_factory.mktemp("search")
    loaded = load_model(str(write_model(folder / "model")))
    write_images(folder / "plain.npz", 60)
    pixels = np.load(folder / "plain.npz")["images"]
    x = torch.stack([loaded.preprocessing.apply(image[:, :, None]) for image in pixels])
    with torch.no_grad():
        labels = loaded.module(x).argmax(1).numpy()
    np.savez(folder / "data.npz", images=pixels, labels=labels)
    np.savez(folder / "unlabelled.npz", images=pixels)
    return folder


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run what would be compiled, which has the same bits, and take a millisecond for each bit."""

    def run_widths(networks: Networks, widths: Mapping[str, int]) -> Callable[[Tensor], Tensor]:
        program = integerize(assemble(networks.calibrated, networks._candidates, widths))
        return lambda images: interpret(program, images)[0]

    def measure(networks: Networks, widths: Sequence[int], progress: object) -> Costs:
        del progress
        costs = {
            entry.site.name: {
                width: WidthCost(networks.calibrated.graph.constants[entry.site.value].numel() * width, 0, width)
                for width in widths
            }
            for entry in weight_sites(networks.calibrated)
        }
        return Costs(costs, 0.5, 1)

    def compile_nothing(network: ptq.Quantized, target: str, threads: int | None) -> Callable[..., Any]:
        del target, threads
        return network.integer

    monkeypatch.setattr(Networks, "run", run_widths)
    monkeypatch.setattr(mixed_precision, "measure_costs", measure)
    monkeypatch.setattr(ptq.Quantized, "compile", compile_nothing)


def search(folder: Path, *arguments: object, data: str = "data.npz") -> int:
    fixed = ("--num-samples", "8", "--threads", "1", "--method", "minmax", "--bits", "4,8")
    return run("search", folder / "model", "--data", folder / data, *fixed, *arguments)


@pytest.mark.tvm
def test_the_recipe_makes_the_network_that_was_measured(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled, as people run it: files, and what an artifact and a bundle of the recipe hold."""
    from tvm_backend.linear_costs import linears_of
    from tvm_backend.lower import lower
    from tvm_backend.targets import get_target

    out = tmp_path / "out"
    assert search(workspace, "--size-budget", "0.7", "-o", out, "--json") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert "8 images calibrate, 52 others measure" in captured.err
    written = json.loads((out / "search.json").read_text())
    assert printed == {"output": str(out), **written}
    assert sorted(path.name for path in out.iterdir()) == ["front.svg", "recipe.yaml", "search.json"]
    chosen = written["chosen"]
    assert chosen["bundle_bytes"] <= 0.7 * written["bytes_at_8_bits"]
    assert chosen["error"] > written["baseline"]["error"]
    assert set(chosen["widths"].values()) == {4, 8}
    assert chosen["final"]["images"] == written["measured_images"] == 52
    assert written["calibration_images"] == 8
    assert chosen["milliseconds"] > written["other_milliseconds"] > 0

    arguments = ("--num-samples", "8", "--recipe", out / "recipe.yaml", "-o", tmp_path / "again")
    assert run("quantize", workspace / "model", "--data", workspace / "data.npz", *arguments) == 0
    again = ptq.load(tmp_path / "again")
    assert {entry.site.name: entry.spec.bits for entry in weight_sites(again.calibrated)} == chosen["widths"]
    lowered = lower(again.program, get_target("native"))
    calls = [lowered.schedule.calls[at] for at in linears_of(again.program, lowered.schedule)]
    assert sum(lowered.constants[call.arguments[1].position].nbytes for call in calls) == chosen["bundle_bytes"]
    arrays = safetensors.numpy.load(program_to_bytes(again.program)[1])
    weights = {node.inputs[1] for node in again.program.nodes if node.op == "linear"}
    assert sum(arrays[name].nbytes for name in weights) == chosen["artifact_bytes"]


@pytest.mark.usefixtures("interpreted")
def test_a_drop_is_kept_and_people_see_the_front(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert search(workspace, "--max-drop", "100", "-o", out) == 0
    text = capsys.readouterr().out
    for expected in ("chosen", "8 bits", "predicted", "at most 100 points below float", "ptq quantize"):
        assert expected in text
    assert {rule.spec.bits for rule in load_recipe(out / "recipe.yaml").rules if rule.kind == "weight"} == {4}
    found = json.loads((out / "search.json").read_text())
    sizes, errors = ([point[key] for point in found["front"]] for key in ("bundle_bytes", "error"))
    assert sizes == sorted(set(sizes))
    assert errors == sorted(errors, reverse=True)
    ET.fromstring((out / "front.svg").read_text())


@pytest.mark.usefixtures("interpreted")
def test_a_drop_that_cannot_be_kept_says_so(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With activations of 2 bits no width of the weights helps."""
    arguments = ("--max-drop", "0", "--activation-bits", "2", "-o", tmp_path / "out")
    assert search(workspace, *arguments) == 2
    assert "--max-drop 0 cannot be kept: the widest weights lose" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interpreted")
def test_budgets_need_no_labels_and_say_what_is_possible(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert search(workspace, "--size-budget", "0.2", "-o", out, data="unlabelled.npz") == 2
    message = capsys.readouterr().err
    assert "--size-budget is 0.2 of the bytes at 8 bits, the least that these widths reach is 0.5" in message
    assert search(workspace, "--latency-budget", "24", "-o", out, data="unlabelled.npz") == 2
    assert "--latency-budget is 24 ms, the least that these widths reach is 24.5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert search(workspace, "--latency-budget", "30", "-o", out, "--json", data="unlabelled.npz") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured_images"] == 0
    assert found["chosen"]["final"] is None
    # Six weights of 4 ms and half a millisecond besides: there is room for one of 8, that which errs most.
    assert found["chosen"]["milliseconds"] == 28.5
    assert sorted(found["chosen"]["widths"].values()) == [4, 4, 4, 4, 4, 8]
    gains = {entry["name"]: entry["choices"][0]["error"] - entry["choices"][1]["error"] for entry in found["weights"]}
    assert found["chosen"]["widths"][max(gains, key=gains.__getitem__)] == 8


@pytest.mark.usefixtures("interpreted")
def test_few_labelled_images_are_no_reason_to_refuse_a_budget(workspace: Path, tmp_path: Path) -> None:
    assert search(workspace, "--size-budget", "0.7", "-o", tmp_path / "out", "--num-samples", "60") == 0
    assert json.loads((tmp_path / "out" / "search.json").read_text())["measured_images"] == 0


@pytest.mark.usefixtures("interpreted")
def test_features_are_judged_by_a_bank() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(**{**MODEL_ARGS, "num_classes": 6}).eval()
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 20
    settings: dict[str, Any] = {"max_drop": 100.0, "method": "minmax", "bits": (4, 8), "threads": 1}
    found = ptq.search(model, x[:8], [(x, labels)], bank=[(x, labels)], **settings)
    assert found.chosen.final is not None
    assert found.chosen.final.images == 40
    assert found.quantized is not None
    assert found.chosen.widths == dict.fromkeys(found.chosen.widths, 4)
    with pytest.raises(UsageError, match="max_drop needs labelled images"):
        ptq.search(model, x[:8], **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one goal: .* found none of them"),
        (("--max-drop", "1", "--size-budget", "0.5"), "found --max-drop and --size-budget"),
        (("--max-drop", "-1"), "--max-drop is -1"),
        (("--size-budget", "1.5"), "--size-budget is 1.5"),
        (("--size-budget", "0.5", "--bits", "4,9"), "bits are widths of 2 to 8, got 4, 9"),
        (("--size-budget", "0.5", "--bits", "4;8"), "no list of widths such as 3,4,6,8"),
        (("--size-budget", "0.5", "--method", "best"), "unknown method 'best'"),
    ],
)
def test_wrong_use_is_refused_before_any_work(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert search(workspace, *arguments, "-o", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "read images" not in captured.err
    assert not list(tmp_path.iterdir())


def test_accuracy_needs_labels(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(workspace, "--max-drop", "1", "-o", tmp_path / "out", data="unlabelled.npz") == 2
    message = capsys.readouterr().err
    assert "unlabelled.npz has no labels: use a folder with a sub-folder for each class" in message
    assert "--size-budget or --latency-budget" in message
    arguments = ("--max-drop", "1", "-o", tmp_path / "out", "--num-samples", "60")
    assert search(workspace, *arguments) == 1
    assert "60 images, 60 of them are set aside: none is left" in capsys.readouterr().err


def test_what_exists_is_not_written_over(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert search(workspace, "--size-budget", "0.5", "-o", tmp_path / "out") == 2
    assert "out exists" in capsys.readouterr().err


def test_widths_that_are_stored_alike_are_one() -> None:
    assert [stored_width(bits, "bundle") for bits in range(2, 9)] == [3, 3, 4, 8, 8, 8, 8]
    assert [stored_width(bits, "artifact") for bits in range(2, 9)] == [2, 3, 4, 5, 6, 8, 8]
    assert useful_widths((8, 6, 4, 3), "bundle") == (3, 4, 8)
    assert useful_widths((6, 4, 2, 3), "bundle") == (3, 4, 6)
    assert useful_widths((3, 4, 6, 8), "artifact") == (3, 4, 6, 8)
