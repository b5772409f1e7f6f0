"""The examples run as they stand, in processes of their own, on models and images of the size of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptq.sources.torchvision_shim import define_torchvision_schemas

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def write_pictures(path: Path, size: int, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return path


def test_a_custom_module() -> None:
    text = run("custom_module")
    assert "blocks.0.query: query, 8 bits" in text
    share = float(text.partition("the integer program is ")[2].partition(" %")[0])
    assert 0 < share < 5


def test_a_data_loader() -> None:
    text = run("data_loader")
    assert "most of the error comes from" in text
    agreement = float(text.rpartition("same first choice as float on ")[2].partition(" %")[0])
    assert agreement > 90


def test_a_timm_model(tmp_path: Path) -> None:
    define_torchvision_schemas()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    data = write_pictures(tmp_path / "images.npz", 160)
    source = f"timm:test_vit@{tmp_path / 'weights.safetensors'}"
    text = run("timm_model", "--model", source, "--data", data, "--output", tmp_path / "out", "--images", 8)
    assert "same first choice as float" in text
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "out" / "bundle" / "manifest.json").is_file()


def test_a_transformers_model(tmp_path: Path) -> None:
    define_torchvision_schemas()
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    data = write_pictures(tmp_path / "images.npz", 32)
    text = run("transformers_model", "--model", f"hf:{tmp_path / 'model'}", "--data", data, "--method", "minmax")
    assert "0 float ones" in text
    assert "tvm: promises every bit, kept: True, equal: True" in text
    assert "simulate: promises float32 rounding, kept: True" in text
