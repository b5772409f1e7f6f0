"""Options that several verbs share, and what MODEL, OUT and DATA arguments turn into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantizers.errors import UsageError

if TYPE_CHECKING:
    from ptq.api import Quantized
    from ptq.data import ImageData
    from ptq.preprocessing import Preprocessing
    from ptq.sources import LoadedModel

Function = TypeVar("Function", bound=Callable[..., Any])

DATA_HELP = "Folder of images, a .npz with images and labels, or package.module:callable."
BANK_HELP = "Labelled images whose 10 nearest float features vote, for models without classes."
BACKENDS = ("float", "simulate", "integer", "tvm", "onnxruntime", "onnx-integer")


def json_option(function: Function) -> Function:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(function)


def batch_option(function: Function) -> Function:
    """Add ``--batch-size``."""
    return click.option(
        "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images run together."
    )(function)


def preprocessing_options(function: Function) -> Function:
    """Add the flags that override the model's own preprocessing."""
    for option in reversed(
        (
            click.option("--input-size", callback=_numbers(int), help="H or H,W or C,H,W, pixels."),
            click.option("--mean", callback=_numbers(float), help="One number, or one for each channel."),
            click.option("--std", callback=_numbers(float), help="One number, or one for each channel."),
            click.option("--interpolation", help="bilinear, bicubic, nearest or lanczos."),
            click.option("--crop-pct", type=float, help="Share of the resized side that the crop keeps."),
            click.option("--resize", is_flag=True, help="Let a .npz hold images of another size."),
        )
    ):
        function = option(function)
    return function


def _numbers(kind: type) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def parse(_: click.Context, parameter: click.Parameter, text: str | None) -> Any:
        if text is None:
            return None
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise click.BadParameter(
                f"{text!r} is not a list of numbers such as 0.5,0.5,0.5", param=parameter
            ) from error

    return parse


@dataclass(frozen=True, eq=False)
class Target:
    """A TARGET argument: a quantized model, or a float one."""

    quantized: Quantized | None
    loaded: LoadedModel | None

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing that the model or the artifact carries."""
        if self.loaded is not None:
            return self.loaded.preprocessing
        assert self.quantized is not None
        if self.quantized.preprocessing is not None:
            return self.quantized.preprocessing
        from ptq.preprocessing import Preprocessing

        channels, height, width = self.quantized.calibrated.graph.inputs[0][1]
        return Preprocessing.identity((channels, height, width))

    def float_run(self) -> Callable[..., Any]:
        """Return the float model as a function of preprocessed images."""
        if self.quantized is not None:
            return self.quantized.float
        assert self.loaded is not None
        import torch

        module = self.loaded.module

        def run(images: Any) -> Any:
            with torch.no_grad():
                return module(images)

        return run


def open_target(spec: str, overrides: Mapping[str, Any] | None = None) -> Target:
    """Open OUT (a directory with a manifest) or MODEL.

    Args:
        spec: the argument.
        overrides: preprocessing flags; a model may adapt to another input size.
    """
    from ptq.artifact import MANIFEST

    if (Path(spec) / MANIFEST).is_file():
        from ptq.api import load

        return Target(load(spec), None)
    from ptq.sources import load_model

    return Target(None, load_model(spec, overrides))


def open_artifact(path: Path) -> Quantized:
    """Open OUT.

    Raises:
        UsageError: nothing is there.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected the directory that 'ptq quantize' wrote")
    from ptq.api import load

    return load(path)


def open_images(
    spec: str, target: Target, limit: int | None, resize: bool, overrides: dict[str, Any], *, features: bool = False
) -> ImageData:
    """Open DATA for a target, with labels checked against its classes, unless its results are features.

    Raises:
        UsageError: another input size than the one a quantized model is made for.
    """
    from ptq.data import open_data

    own = target.preprocessing()
    preprocessing = own.override(**overrides)
    if target.quantized is not None and preprocessing.input_size != own.input_size:
        raise UsageError(
            f"--input-size is {preprocessing.input_size}, the quantized model takes {own.input_size} "
            "(channels, height, width); quantize the model at the other size"
        )
    classes = None
    if not features:
        classes = target.loaded.num_classes if target.loaded is not None else _num_outputs(target.quantized)
    names = target.loaded.label_names if target.loaded is not None else None
    return open_data(spec, preprocessing, limit=limit, resize=resize, num_classes=classes, label_names=names)


def _num_outputs(quantized: Quantized | None) -> int | None:
    assert quantized is not None
    shape = quantized.calibrated.graph.shapes()[quantized.calibrated.graph.outputs[0][1]]
    return shape[0] if len(shape) == 1 else None
