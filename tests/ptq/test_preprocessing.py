"""Preprocessing does what timm's evaluation transform does, and says what is wrong with a configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.preprocessing import Preprocessing
from quantizers.errors import DataError, UsageError

RGB = Preprocessing((3, 8, 6), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9)
GREY = Preprocessing((1, 4, 4), (0.25,), (0.5,))


def test_exact_size_is_only_scaled_and_normalized() -> None:
    image = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    expected = (torch.from_numpy(image).float() / 255 - torch.tensor(RGB.mean)) / torch.tensor(RGB.std)
    result = RGB.apply(image)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected.permute(2, 0, 1))


def test_grey_images_need_no_channel_axis() -> None:
    image = np.full((4, 4), 255, np.uint8)
    assert torch.equal(GREY.apply(image), torch.full((1, 4, 4), 1.5))
    assert torch.equal(GREY.apply(image[..., None]), GREY.apply(image))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (31, 17), (8, 9), (5, 100)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_and_crop_equal_timm(shape: tuple[int, int], interpolation: str) -> None:
    """Pixel for pixel the transform that a timm checkpoint was measured with."""
    image_module = pytest.importorskip("PIL.Image")
    from ptq.sources.torchvision_shim import define_torchvision_schemas

    define_torchvision_schemas()
    pytest.importorskip("timm")
    from timm.data import create_transform

    ours = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, interpolation, 0.875)  # type: ignore[arg-type]
    theirs = create_transform(
        (3, 16, 16), interpolation=interpolation, mean=ours.mean, std=ours.std, crop_pct=0.875, is_training=False
    )
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = image_module.fromarray(pixels)
    torch.testing.assert_close(ours.apply(image), theirs(image), rtol=0, atol=1e-6)
    assert torch.equal(ours.apply(pixels), ours.apply(image))


def test_squash_keeps_no_ratio() -> None:
    pytest.importorskip("PIL")
    squash = Preprocessing((1, 4, 4), (0.0,), (1.0,), "nearest", crop_mode="squash")
    image = np.repeat(np.arange(4, dtype=np.uint8), 8)[None].repeat(4, 0)
    assert torch.equal(squash.apply(image)[0, 0] * 255, torch.arange(4.0))


@given(height=st.integers(1, 60), width=st.integers(1, 60), crop=st.floats(0.3, 1.0))
@settings(max_examples=60, deadline=None)
def test_every_image_becomes_the_input_size(height: int, width: int, crop: float) -> None:
    pytest.importorskip("PIL")
    result = Preprocessing((1, 9, 7), (0.0,), (1.0,), "bilinear", crop).apply(np.full((height, width), 51, np.uint8))
    assert result.shape == (1, 9, 7)
    assert torch.allclose(result, torch.tensor(0.2))


def test_files_are_converted_to_the_channels_of_the_model() -> None:
    image_module = pytest.importorskip("PIL.Image")
    grey = image_module.fromarray(np.full((8, 6), 7, np.uint8))
    assert RGB.apply(grey).shape == (3, 8, 6)
    assert GREY.apply(image_module.new("RGBA", (4, 4))).shape == (1, 4, 4)


def test_arrays_of_another_channel_count_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected a uint8 image \(H, W, 3\), got uint8 \(8, 6\): convert"):
        RGB.apply(np.zeros((8, 6), np.uint8))


def test_round_trip() -> None:
    assert Preprocessing.from_dict(RGB.to_dict()) == RGB
    with pytest.raises(UsageError, match=r"missing \['std'\], unknown \['sdt'\]"):
        Preprocessing.from_dict({("sdt" if k == "std" else k): v for k, v in RGB.to_dict().items()})


def test_config_of_timm() -> None:
    config = {"input_size": [1, 28, 28], "mean": [0.5], "std": [0.25], "crop_pct": 1, "classifier": "head"}
    assert Preprocessing.from_config(config) == Preprocessing((1, 28, 28), (0.5,), (0.25,))
    with pytest.raises(UsageError, match="lacks input_size"):
        Preprocessing.from_config({"mean": [0.5]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": (0.0, 1.0, 1.0)}, "std must be positive"),
        ({"mean": (0.5, 0.5)}, "mean must hold 3 finite numbers, one per channel"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "mean must hold 3 finite"),
        ({"interpolation": "magic"}, "unknown interpolation 'magic': expected one of bilinear"),
        ({"crop_pct": 1.5}, r"crop_pct must lie in \(0, 1\]"),
        ({"crop_mode": "border"}, "unknown crop_mode 'border'"),
        ({"input_size": (3, 0, 8)}, "input_size must be"),
        ({"input_size": (1, 2, 3, 4)}, "an input size is H, H,W or C,H,W"),
    ],
)
def test_wrong_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RGB.override(**change)


def test_override() -> None:
    assert RGB.override(mean=None) == RGB
    assert RGB.override(input_size=(32,)).input_size == (3, 32, 32)
    assert RGB.override(std=(0.5,)).std == (0.5, 0.5, 0.5)
    assert RGB.describe() == "input 3x8x6, mean 0.5,0.4,0.3, std 0.2,0.3,0.4, bilinear, crop 0.9"
