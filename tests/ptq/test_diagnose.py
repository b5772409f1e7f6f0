"""``ptq diagnose`` and its report, which is looked at in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import run
from support.embedded import write_images, write_model

import ptq
from calibration.rules import assign_specs
from ptq.diagnosis import diagnose
from ptq.diagnosis.document import document
from ptq.diagnosis.report import report_text
from ptq.recipe import dump_recipe, load_recipe
from quantizers.errors import DataError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    run("quantize", folder / "model", "--data", folder / "data.npz", "-o", folder / "out", "--method", "minmax")
    out, data = folder / "out", folder / "data.npz"
    assert run("diagnose", out, "--data", data, "--html", folder / "report.html", "--limit", "16") == 0
    return folder


def test_json_is_one_document_with_everything(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("diagnose", workspace / "out", "--data", workspace / "data.npz", "--limit", "16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 16
    layers = found["layers"]
    assert all(layer["fits"] for layer in layers)
    assert [layer["share"] for layer in layers] == sorted((layer["share"] for layer in layers), reverse=True)
    assert sum(layer["share"] for layer in layers) == pytest.approx(1.0)
    assert sorted(layer["depth"] for layer in layers) == list(range(len(layers)))
    assert len({layer["name"] for layer in layers if layer["op"] in ("linear", "conv2d", "matmul", "softmax")}) == sum(
        layer["op"] in ("linear", "conv2d", "matmul", "softmax") for layer in layers
    )
    sites = {site["name"] for site in found["sites"]}
    assert sites >= {name for layer in layers for name in layer["sites"]}
    assert sites == {site["name"] for site in ptq.load(workspace / "out").describe()["sites"]}
    for layer in layers:
        assert (layer["snr_db"]["weight"] is None) == (layer["op"] not in ("linear", "conv2d"))


def test_people_see_layers_suggestions_and_the_result(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    arguments = ("--data", workspace / "data.npz", "--limit", "16", "--suggestions", "2")
    assert run("diagnose", workspace / "out", *arguments) == 0
    text = capsys.readouterr().out
    for expected in ("share of the error", "inherited", "blocks.0.attn.qkv", "16 images", "dB", "and "):
        assert expected in text
    assert run("diagnose", workspace / "out", *arguments[:4], "--suggestions", "0") == 0
    assert "no change that was tried" in capsys.readouterr().out


def test_a_suggested_rule_is_one_that_a_recipe_takes(workspace: Path, tmp_path: Path) -> None:
    """At the top of the recipe it gives its site, and no other, the suggested spec."""
    quantized = ptq.load(workspace / "out")
    images = torch.randn(8, *quantized.calibrated.graph.inputs[0][1], generator=torch.Generator().manual_seed(0))
    found = diagnose(quantized, images, suggestions=12)
    assert found.suggestions
    text = dump_recipe(quantized.calibrated.recipe)
    sites = [entry.site for entry in quantized.calibrated.sites]
    before = {entry.site.name: entry.spec for entry in quantized.calibrated.sites}
    for entry, rule in zip(found.suggestions, document(found)["suggestions"], strict=True):
        written = "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in rule["rule"].items()) + "}"
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("rules:\n", f"rules:\n- {written}\n", 1))
        specs = assign_specs(sites, load_recipe(path))
        assert specs == {**before, entry.change.site: entry.change.after}


def test_accuracies_need_labels(workspace: Path) -> None:
    quantized = ptq.load(workspace / "out")
    images = torch.randn(8, *quantized.calibrated.graph.inputs[0][1], generator=torch.Generator().manual_seed(0))
    labels = quantized.float(images).argmax(1)  # type: ignore[union-attr]
    with_labels = document(diagnose(quantized, images, labels, suggestions=1))
    assert with_labels["output"]["float_top1"] == 100.0
    assert with_labels["output"]["top1"] == pytest.approx(100 * with_labels["output"]["agreement"])
    assert document(diagnose(quantized, images, suggestions=0))["output"]["top1"] is None
    with pytest.raises(DataError, match="at least one image"):
        diagnose(quantized, images[:0])


def test_the_report_holds_all_that_it_needs(workspace: Path) -> None:
    """One file, no address to load from, and no text of the model's ends its data."""
    text = (workspace / "report.html").read_text()
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"""(src|href)\s*=\s*["']|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert {timing["backend"] for timing in data["timings"]} == {"float", "tvm"}
    assert set(data["histograms"]) == {site["name"] for site in data["sites"] if site["kind"] != "weight"}
    assert all(len(norm["traced"][0]) == len(norm["rewritten"][1]) for norm in data["channels"])
    assert data["recipe_yaml"].startswith("name: minmax-w8a8")
    assert not [path.name for path in workspace.iterdir() if path.name.startswith(".")]


def test_the_same_diagnosis_writes_the_same_report(workspace: Path) -> None:
    quantized = ptq.load(workspace / "out")
    images = torch.randn(8, *quantized.calibrated.graph.inputs[0][1], generator=torch.Generator().manual_seed(0))
    texts = []
    for _ in range(2):
        found = diagnose(quantized, images, suggestions=2)
        texts.append(report_text(found, document(found)))
    assert texts[0] == texts[1]


def test_a_report_is_not_written_over(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (workspace / "report.html").read_bytes()
    arguments = ("--data", workspace / "data.npz", "--html", workspace / "report.html")
    assert run("diagnose", workspace / "out", *arguments) == 2
    assert "report.html" in capsys.readouterr().err
    assert (workspace / "report.html").read_bytes() == before


def test_texts_of_a_model_cannot_leave_the_data(workspace: Path) -> None:
    quantized = ptq.load(workspace / "out")
    images = torch.randn(4, *quantized.calibrated.graph.inputs[0][1], generator=torch.Generator().manual_seed(0))
    found = diagnose(quantized, images, suggestions=0)
    described: dict[str, Any] = {**document(found), "notes": ["</script><script>alert(1)</script>"]}
    described["recipe"] = {**described["recipe"], "name": "<b>bold</b>"}
    text = report_text(found, described)
    assert "alert(1)</script>" not in text
    assert "<title>Diagnosis of &lt;b&gt;bold&lt;/b&gt;</title>" in text


def browser(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000")
    return subprocess.run([BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: the report is not looked at")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_report(workspace: Path, tmp_path: Path, width: int) -> None:
    """Without an error of its script, every plot there, the page no wider than the window, and ink on paper."""
    text = (workspace / "report.html").read_text()
    watch = "<script>window.onerror = (m) => { document.documentElement.dataset.error = m; };</script>"
    probe = (
        "<script>const s = document.documentElement; s.dataset.widths = s.scrollWidth + ' ' + window.innerWidth;"
        " document.querySelectorAll('tr.row')[3].click();"
        " s.dataset.open = document.querySelectorAll('tr.inside').length;"
        " document.querySelectorAll('th button')[0].click(); document.getElementById('rest').click();"
        " s.dataset.rows = document.querySelectorAll('tr.row').length;</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(text.replace("<head>", f"<head>{watch}").replace("</body>", f"{probe}</body>"))
    dom = browser(f"--window-size={width},2000", "--dump-dom", page.as_uri()).stdout
    assert "data-error" not in dom
    assert 'data-open="1"' in dom
    layers = len(json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["layers"])  # type: ignore[index]
    assert f'data-rows="{layers}"' in dom
    needed, given = map(int, re.search(r'data-widths="(\d+) (\d+)"', dom).groups())  # type: ignore[union-attr]
    assert needed <= given
    body = dom[: dom.index('<script type="application/json"')]
    assert body.count("<svg") >= 4
    shot = tmp_path / "shot.png"
    browser(f"--window-size={width},2000", f"--screenshot={shot}", page.as_uri())
    with Image.open(shot) as image:
        assert image.size == (width, 2000)
        grey = np.asarray(image.convert("L"))
    assert 0.01 < float((grey < 128).mean()) < 0.5
