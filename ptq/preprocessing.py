"""What happens to an image before the network sees it: resize, centre crop, scale to 0..1, normalize.

The resize and the crop are those of timm's evaluation transform (and so of torchvision's): the shorter
side becomes ``floor(size / crop_pct)``, the longer one is truncated, the crop is centred.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantizers.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
CropMode = Literal["center", "squash"]

PILLOW_MISSING = "resizing and reading image files needs Pillow, which is not installed: pip install 'vit-ptq[images]'"
_PIL_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network input.

    Args:
        input_size: (channels, height, width) of the network input.
        mean: per channel, on the 0..1 scale, subtracted.
        std: per channel, on the 0..1 scale, divided by.
        interpolation: resampling filter of the resize.
        crop_pct: share of the resized shorter side that the crop keeps, in (0, 1].
        crop_mode: "center" resizes the shorter side and crops; "squash" resizes both sides to the target.

    Raises:
        UsageError: a field has a wrong length or a value outside its range.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or any(not isinstance(n, int) or n < 1 for n in self.input_size):
            raise UsageError(f"input_size must be (channels, height, width), positive, got {self.input_size}")
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels or not all(math.isfinite(v) for v in values):
                raise UsageError(f"{name} must hold {channels} finite numbers, one per channel, got {list(values)}")
        if min(self.std) <= 0:
            raise UsageError(f"std must be positive, got {list(self.std)}")
        if self.interpolation not in get_args(Interpolation):
            raise UsageError(
                f"unknown interpolation {self.interpolation!r}: expected one of {', '.join(get_args(Interpolation))}"
            )
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")
        if self.crop_mode not in get_args(CropMode):
            raise UsageError(f"unknown crop_mode {self.crop_mode!r}: expected one of {', '.join(get_args(CropMode))}")

    @classmethod
    def identity(cls, input_size: tuple[int, int, int]) -> Preprocessing:
        """Only scale to 0..1: for a model that says nothing about its preprocessing."""
        return cls(input_size, (0.0,) * input_size[0], (1.0,) * input_size[0])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read the keys of a timm ``pretrained_cfg``; keys this class does not know are ignored.

        Raises:
            UsageError: ``input_size`` is missing or a value is wrong.
        """
        known = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        if "input_size" not in known:
            raise UsageError("the preprocessing configuration lacks input_size (channels, height, width)")
        channels = int(known["input_size"][0])
        known.setdefault("mean", (0.0,) * channels)
        known.setdefault("std", (1.0,) * channels)
        return cls(**_typed(known))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Preprocessing:
        """Rebuild what :meth:`to_dict` wrote.

        Raises:
            UsageError: a key is missing or unknown, or a value is wrong.
        """
        expected = {field.name for field in fields(cls)}
        if set(document) != expected:
            raise UsageError(
                f"preprocessing needs exactly the keys {sorted(expected)}: "
                f"missing {sorted(expected - set(document))}, unknown {sorted(set(document) - expected)}"
            )
        return cls(**_typed(document))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of all fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def describe(self) -> str:
        """One line for people."""
        size = "x".join(map(str, self.input_size))
        mean, std = (",".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        resize = "squash" if self.crop_mode == "squash" else f"crop {self.crop_pct:g}"
        return f"input {size}, mean {mean}, std {std}, {self.interpolation}, {resize}"

    def override(self, **values: Any) -> Preprocessing:
        """Replace the fields that are not None; one mean or std number is repeated for every channel.

        Args:
            values: fields by name. ``input_size`` may also be one number, height and width.

        Raises:
            UsageError: a value is wrong.
        """
        given = {name: value for name, value in values.items() if value is not None}
        if "input_size" in given:
            given["input_size"] = full_size(given["input_size"], self.input_size[0])
        channels = given.get("input_size", self.input_size)[0]
        for name in ("mean", "std"):
            numbers = tuple(given.get(name, getattr(self, name)))
            # A configuration with equal channels says what to do with another number of channels too.
            repeats = len(numbers) == 1 or (name not in given and len(set(numbers)) == 1)
            given[name] = numbers[:1] * channels if repeats else numbers
        return replace(self, **given)

    def apply(self, image: npt.NDArray[np.uint8] | Image) -> Tensor:
        """Turn one image into a network input.

        Args:
            image: uint8 array (H, W) or (H, W, C), whose channel count must be the model's; or a PIL
                image, which is converted to it.

        Returns:
            float32 (channels, height, width).

        Raises:
            DataError: the channel count does not fit.
            UsageError: a resize is needed and Pillow is not installed.
        """
        channels, height, width = self.input_size
        if not isinstance(image, np.ndarray):
            if channels not in _PIL_MODES:
                raise DataError(f"image files have 1 or 3 channels, the model takes {channels}: use a .npz instead")
            image = np.asarray(image.convert(_PIL_MODES[channels]))
        pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
            raise DataError(
                f"expected a uint8 image (H, W, {channels}), got {image.dtype} {image.shape}: "
                f"convert the images to {channels} channel(s)"
            )
        if pixels.shape[:2] != (height, width):
            pixels = self._resample(pixels)
        # A copy, because PIL hands out read-only memory.
        scaled = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32)) / 255
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return (scaled - mean) / std

    def _resample(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        try:
            from PIL import Image
        except ImportError:
            raise UsageError(PILLOW_MISSING) from None
        _, height, width = self.input_size
        new_height, new_width = self._resized(pixels.shape[0], pixels.shape[1])
        method = Image.Resampling[self.interpolation.upper()]
        planes = [
            np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, c])).resize((new_width, new_height), method))
            for c in range(pixels.shape[2])
        ]
        resized = np.stack(planes, axis=2)
        # Half-integers round to even, as in torchvision's centre crop.
        top, left = round((new_height - height) / 2), round((new_width - width) / 2)
        return resized[top : top + height, left : left + width]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        if self.crop_mode == "squash":
            return self.input_size[1], self.input_size[2]
        target_height, target_width = (math.floor(n / self.crop_pct) for n in self.input_size[1:])
        if target_height * width >= target_width * height:
            return target_height, max(int(target_height * width / height), target_width)
        return max(int(target_width * height / width), target_height), target_width


def full_size(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    """Complete a size given as one number, (height, width) or (channels, height, width).

    Raises:
        UsageError: ``size`` is none of these.
    """
    numbers = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    if len(numbers) == 1:
        return channels, numbers[0], numbers[0]
    if len(numbers) == 2:
        return channels, numbers[0], numbers[1]
    if len(numbers) == 3:
        return numbers[0], numbers[1], numbers[2]
    raise UsageError(f"an input size is H, H,W or C,H,W, got {list(numbers)}")


def _typed(document: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists and may hold whole numbers where fields are tuples of floats."""
    typed = dict(document)
    try:
        typed["input_size"] = tuple(int(n) for n in document["input_size"])
        typed["mean"] = tuple(float(v) for v in document["mean"])
        typed["std"] = tuple(float(v) for v in document["std"])
        typed["crop_pct"] = float(document.get("crop_pct", 1.0))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the preprocessing configuration holds a wrong value: {error}") from error
    return typed
