"""Train the embedded Vision Transformer from scratch on Fashion-MNIST and write its directory.

    python examples/train_fashion_mnist.py --data /usr/share/datasets/fashion-mnist --output examples/fashion_mnist_vit

``--data`` is a folder with the four ``*-ubyte.gz`` files of Fashion-MNIST (Debian's package
``dataset-fashion-mnist``, or the project's own site). The output directory gets ``config.json``,
``model.safetensors``, ``calibration.npz`` (256 unlabelled training images) and ``test.npz`` (2,000
labelled test images). The weights of the last epoch are kept: the test set chooses nothing.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ptq.vision_transformer import VisionTransformer

MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "mlp_ratio": 4.0,
}
MEAN, STD = 0.2860, 0.3530
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


def read_idx(path: Path) -> np.ndarray:
    """Read one gzip-compressed IDX file of uint8: labels (N,) or images (N, 28, 28)."""
    data = gzip.decompress(path.read_bytes())
    dims = data[3]
    shape = np.frombuffer(data, ">u4", dims, offset=4).astype(int)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images (N, 28, 28) and labels (N,), both uint8, of ``train`` or ``t10k``."""
    return (
        read_idx(folder / f"{split}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{split}-labels-idx1-ubyte.gz"),
    )


def normalize(images: Tensor) -> Tensor:
    """Scale uint8 (N, 1, 28, 28) to float32 with the training set's mean and deviation."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to one pixel and mirror half of the images.

    Args:
        images: float32 (N, 1, 28, 28), normalized.
        generator: source of randomness, on the device of ``images``.
    """
    count, device = images.shape[0], images.device

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count, 1), generator=generator, device=device)

    black = -MEAN / STD
    padded = functional.pad(images, (1, 1, 1, 1), value=black)[:, 0]
    index = torch.arange(28, device=device)[None]
    rows = draw(0, 3) + index
    columns = torch.where(draw(0, 2) == 1, 27 - index, index) + draw(0, 3)
    picked = padded[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked[:, None]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent over uint8 images (N, 1, 28, 28) and labels (N,)."""
    model.eval()
    correct = sum(
        int((model(normalize(batch)).argmax(1) == target).sum())
        for batch, target in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return 100.0 * correct / len(labels)


def train(images: Tensor, labels: Tensor, epochs: int, batch_size: int, seed: int) -> VisionTransformer:
    """Train on uint8 images (N, 1, 28, 28) and int64 labels (N,) on the device they lie on."""
    torch.manual_seed(seed)
    device = images.device
    generator = torch.Generator(device).manual_seed(seed)
    model = VisionTransformer(**MODEL_ARGS).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=2e-3
    )
    steps = len(images) // batch_size
    warmup, total = 2 * steps, epochs * steps

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(epochs):
        started, losses = time.perf_counter(), torch.zeros((), device=device)
        model.train()
        order = torch.randperm(len(images), generator=generator, device=device)
        for batch in order[: steps * batch_size].split(batch_size):
            inputs = augment(normalize(images[batch]), generator)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(inputs)
            loss = functional.cross_entropy(logits.float(), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses += loss.detach()
        seconds = time.perf_counter() - started
        click.echo(f"epoch {epoch + 1}/{epochs} loss {losses.item() / steps:.4f} {seconds:.1f} s", err=True)
    return model


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of *-ubyte.gz files.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--epochs", default=32, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(data: Path, output: Path, epochs: int, batch_size: int, seed: int, device: str) -> None:
    """Train, print the top-1 on all 10,000 test images and write the model directory."""
    train_images, train_labels = read_split(data, "train")
    test_images, test_labels = read_split(data, "t10k")

    def on_device(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images.copy())[:, None].to(device), torch.from_numpy(labels.astype(np.int64)).to(device)

    model = train(*on_device(train_images, train_labels), epochs, batch_size, seed)
    top1 = accuracy(model, *on_device(test_images, test_labels))
    click.echo(f"float top-1 on {len(test_labels)} test images: {top1:.2f} %")

    output.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "vision_transformer",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "mean": [MEAN],
            "std": [STD],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "label_names": CLASSES,
        },
    }
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, output / "model.safetensors")
    sample = np.random.default_rng(seed)
    calibration = np.sort(sample.choice(len(train_images), 256, replace=False))
    held_out = np.sort(sample.choice(len(test_images), 2000, replace=False))
    np.savez_compressed(output / "calibration.npz", images=train_images[calibration])
    np.savez_compressed(output / "test.npz", images=test_images[held_out], labels=test_labels[held_out])


if __name__ == "__main__":
    main()
