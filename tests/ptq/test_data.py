"""Every kind of DATA, read and refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ptq.data import iterate_images, open_data
from ptq.preprocessing import Preprocessing
from quantizers.errors import DataError

GREY = Preprocessing((1, 4, 4), (0.0,), (1.0,))


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def pixels(count: int) -> np.ndarray:
    """Images whose every pixel is the image's index."""
    return np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)


def indices(data: object) -> list[int]:
    return [round(float(image[0, 0, 0]) * 255) for image in data]  # type: ignore[attr-defined]


def test_npz_with_labels(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "x.npz", images=pixels(5), labels=np.arange(5)), GREY)
    assert (len(data), data.name) == (5, "x.npz")
    batches = list(data.batches(2))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 1, 4, 4), (2, 1, 4, 4), (1, 1, 4, 4)]
    assert torch.cat([labels for _, labels in batches if labels is not None]).tolist() == [0, 1, 2, 3, 4]
    assert len(data.batches(2)) == 3


def test_float_npz_is_used_as_it_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)
    data = open_data(save(tmp_path / "x.npz", images=images), GREY)
    assert data.labels is None
    assert torch.equal(torch.stack(list(data)), torch.from_numpy(images))


def test_choice_depends_on_the_seed_only(tmp_path: Path) -> None:
    spec = save(tmp_path / "x.npz", images=pixels(50), labels=np.arange(50))
    first, again, other = (open_data(spec, GREY, limit=7, seed=seed) for seed in (1, 1, 2))
    assert indices(first) == indices(again) == sorted(indices(first))
    assert indices(first) != indices(other)
    assert first.labels is not None
    assert first.labels.tolist() == indices(first)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(open_data(spec, GREY, limit=500)) == 50


def test_others_are_those_that_a_limit_leaves_out(tmp_path: Path) -> None:
    spec = save(tmp_path / "x.npz", images=pixels(50), labels=np.arange(50))
    chosen, others = open_data(spec, GREY, limit=7, seed=3), open_data(spec, GREY, besides=7, seed=3)
    assert sorted(indices(chosen) + indices(others)) == list(range(50))
    assert indices(others) == sorted(indices(others))
    few = open_data(spec, GREY, besides=7, limit=5, seed=3)
    assert len(few) == 5
    assert set(indices(few)) < set(indices(others))
    assert few.labels is not None
    assert few.labels.tolist() == indices(few)
    with pytest.raises(DataError, match="50 images, 50 of them are set aside: none is left"):
        open_data(spec, GREY, besides=50)


def test_folder_of_classes(tmp_path: Path) -> None:
    """Sorted sub-folders are the labels; the model's class names, where they match, count instead."""
    image = pytest.importorskip("PIL.Image")
    for index, name in enumerate(["b", "a", "c"]):
        (tmp_path / name).mkdir()
        image.fromarray(pixels(3)[index]).save(tmp_path / name / "x.png")
    data = open_data(str(tmp_path), GREY)
    assert data.labels is not None
    assert (indices(data), data.labels.tolist()) == ([1, 0, 2], [0, 1, 2])
    named = open_data(str(tmp_path), GREY, label_names=("z", "c", "b", "a"))
    assert named.labels is not None
    assert named.labels.tolist() == [3, 2, 1]
    with pytest.raises(DataError, match=r"label 2 of image 2 is out of range 0\.\.1 .*the model has 2 classes"):
        open_data(str(tmp_path), GREY, num_classes=2)


def test_flat_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index in range(3):
        image.fromarray(np.full((9, 6), index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = open_data(str(tmp_path), GREY)
    assert data.labels is None
    assert indices(data) == [0, 1, 2]
    (tmp_path / "class").mkdir()
    image.fromarray(pixels(1)[0]).save(tmp_path / "class" / "x.png")
    with pytest.raises(DataError, match="images both directly"):
        open_data(str(tmp_path), GREY)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_damaged_image_file_is_named(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.png: cannot be read as an image"):
        list(open_data(str(tmp_path), GREY))


def test_truncated_image_file_is_named(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "half.png"
    image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"half\.png"):
        list(open_data(str(tmp_path), GREY))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pixels(2)}, r"expected an array named 'images' \(and 'labels'\), found \['pictures'\]"),
        ({"images": pixels(0)}, "'images' is empty"),
        ({"images": pixels(2)[:, :3]}, "expected images of 1x4x4 .* got 1x3x4: pass --resize"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "got 3x4x4: convert the images to 1 channel"),
        ({"images": np.zeros((2, 3, 4, 4), np.float32)}, "got 3x4x4: float32 images are network inputs"),
        ({"images": np.zeros((2, 1, 5, 4), np.float32)}, "got 1x5x4: float32 images are network inputs"),
        ({"images": np.zeros((2, 4, 4), np.float64)}, r"must be uint8 \(N,H,W\).*got float64 \(2, 4, 4\)"),
        ({"images": np.full((2, 1, 4, 4), np.inf, np.float32)}, "image 0 holds NaN or infinity"),
        ({"images": pixels(2), "labels": np.arange(3)}, "2 images but 3 labels"),
        ({"images": pixels(2), "labels": np.ones(2)}, r"'labels' must be whole numbers \(N,\), got float64"),
        ({"images": pixels(2), "labels": np.array([0, 10])}, r"label 10 of image 1 is out of range 0\.\.9"),
        ({"images": pixels(2), "labels": np.array([-1, 0])}, r"label -1 of image 0 is out of range"),
        ({"images": np.array([object()])}, "would need pickle"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_data(save(tmp_path / "x.npz", **arrays), GREY, num_classes=10)
    assert "x.npz" in str(caught.value)


def test_resize_is_on_request(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    spec = save(tmp_path / "x.npz", images=np.full((2, 9, 7), 51, np.uint8))
    assert torch.allclose(torch.stack(list(open_data(spec, GREY, resize=True))), torch.tensor(0.2))


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    spec = save(tmp_path / "x.npz", images=pixels(50))
    whole = Path(spec).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes(50) + whole[250:]):
        Path(spec).write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz"):
            open_data(spec, GREY)
    with Path(spec).open("wb") as file:
        np.save(file, pixels(2))
    with pytest.raises(DataError, match="is a single array"):
        open_data(spec, GREY)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"ending in '\.csv'"):
        open_data(str(tmp_path / "x.csv"), GREY)


CALLABLES = """
import torch
image = torch.zeros(2, 1, 4, 4)
def pairs(): return [(image, torch.tensor([0, 1])), (image[:1], torch.tensor([2]))]
def dicts(): return iter([{"pixel_values": image, "labels": [0, 1]}])
def nothing(): return []
def number(): return 7
def partly(): return [(image[0], 1), image[1]]
def large(): return [torch.zeros(1, 5, 5)]
def endless():
    while True:
        yield image
text = "no function"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the working directory, under a name that no other test has imported."""
    name = f"given_data_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(CALLABLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_callables(module: str) -> None:
    data = open_data(f"{module}:pairs", GREY)
    assert data.labels is not None
    assert (len(data), data.labels.tolist()) == (3, [0, 1, 2])
    assert [len(images) for images, _ in data.batches(2)] == [2, 1]
    assert len(open_data(f"{module}:dicts", GREY)) == 2
    assert len(open_data(f"{module}:endless", GREY, limit=5)) == 5
    rest = open_data(f"{module}:pairs", GREY, besides=1, limit=5)
    assert rest.labels is not None
    assert (len(rest), rest.labels.tolist()) == (2, [1, 2])
    with pytest.raises(DataError, match="yielded no image after the first 3"):
        open_data(f"{module}:pairs", GREY, besides=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "yielded no image"),
        ("number", "must return an iterable of images, returned int"),
        ("partly", "2 images but 1 labels"),
        ("large", r"image 0 has shape \(1, 5, 5\), the model takes \(1, 4, 4\)"),
        ("text", "has no callable 'text'; it has pairs"),
        ("absent", "has no callable 'absent'"),
    ],
)
def test_callables_that_do_not_fit(module: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(f"{module}:{name}", GREY)


def test_missing_data() -> None:
    with pytest.raises(DataError, match="no such data: nowhere: expected a folder of images"):
        open_data("nowhere", GREY)
    with pytest.raises(DataError, match="importing no_such_module failed: ModuleNotFoundError"):
        open_data("no_such_module:x", GREY)


IMAGE = torch.arange(16.0).reshape(1, 4, 4)


@pytest.mark.parametrize(
    "items",
    [
        [IMAGE, IMAGE],
        IMAGE.repeat(2, 1, 1, 1),
        [IMAGE.repeat(2, 1, 1, 1).numpy()],
        [(IMAGE, 3), [IMAGE, "a name"]],
        [{"images": IMAGE[None], "labels": torch.tensor([1])}, {"other": IMAGE.double()}],
    ],
)
def test_any_iterable(items: object) -> None:
    result = list(iterate_images(items))  # type: ignore[arg-type]
    assert [image.dtype for image in result] == [torch.float32] * 2
    assert all(torch.equal(image, IMAGE) for image in result)


def test_iteration_is_lazy() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield IMAGE

    assert torch.equal(next(iterate_images(endless())), IMAGE)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([IMAGE, IMAGE * float("nan")], "image 1: holds NaN or infinity"),
        ([IMAGE, IMAGE[:, :3]], r"image 1: shape \(1, 3, 4\), the first image has \(1, 4, 4\)"),
        ([IMAGE.to(torch.uint8)], r"image 0: expected preprocessed floating-point pixels, got torch\.uint8"),
        (["a path"], "image 0: expected a tensor .* got str"),
        ([IMAGE[0]], r"got a tensor of shape \(4, 4\)"),
        ([{"label": 3}], "one of the keys images, pixel_values"),
        ([(IMAGE.repeat(2, 1, 1, 1), torch.tensor([1]))], "a batch of 2 images came with 1 labels"),
    ],
)
def test_items_that_are_no_images(items: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iterate_images(items))
