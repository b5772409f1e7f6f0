"""Write an ONNX file: checked, beside its place, then renamed there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from ptq.artifact import refuse_existing, write_file


def write_model(build: Callable[[], onnx.ModelProto], path: Path) -> None:
    """Build a model and write it; equal models give equal bytes.

    Args:
        build: makes the model, once it is known that the file can be written.
        path: the file; its directory is made if absent.

    Raises:
        UsageError: the path exists.
    """
    refuse_existing(path)
    model = build()
    onnx.checker.check_model(model, full_check=True)
    write_file(path, model.SerializeToString(deterministic=True))
