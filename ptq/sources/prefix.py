"""What stands before the names of a checkpoint where its model was traced inside of another module."""

from __future__ import annotations

from pathlib import PurePath

from ptq.sources.exported import WRAPPED as EXPORTED
from ptq.sources.transformers_models import WRAPPED as TRANSFORMERS


def checkpoint_prefix(source: str) -> str:
    """Return the prefix for a MODEL argument, empty for most of them."""
    if source.startswith("hf:"):
        return f"{TRANSFORMERS}."
    return f"{EXPORTED}." if PurePath(source).suffix == ".pt2" else ""
