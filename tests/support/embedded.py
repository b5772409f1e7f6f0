"""A tiny model directory like the embedded one, with random weights: quick, and labelled by its own float answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ptq.vision_transformer import VisionTransformer

MODEL_ARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 4,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}


def write_model(directory: Path) -> Path:
    """Write config.json and model.safetensors."""
    torch.manual_seed(0)
    model = VisionTransformer(**MODEL_ARGS)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    directory.mkdir(parents=True)
    config = {
        "architecture": "vision_transformer",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]},
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), directory / "model.safetensors")
    return directory


def write_images(path: Path, count: int = 24, **changes: np.ndarray) -> Path:
    """Write a .npz of random uint8 images (count, 8, 8); ``changes`` replaces or adds arrays."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "images": rng.integers(0, 256, (count, 8, 8), dtype=np.uint8),
        "labels": rng.integers(0, 4, count),
    }
    np.savez(path, **{**arrays, **changes})
    return path
