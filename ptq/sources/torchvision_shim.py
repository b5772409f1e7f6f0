"""Let torchvision be imported beside a CPU build of torch.

torchvision from the registry is built for CUDA torch. Its operators cannot load then, and its import
stops at registering fake kernels for two of them. Defining their schemas first is enough, and nothing
here calls them.
"""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []


def define_torchvision_schemas() -> None:
    """Define the schemas unless torchvision's own, or these, are there."""
    for schema in _SCHEMAS:
        name = schema.split("(", maxsplit=1)[0]
        if not _defined(name):
            # A library is unregistered when it is collected, so it is kept.
            _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
            _libraries[-1].define(schema)  # type: ignore[no-untyped-call]


def _defined(name: str) -> bool:
    try:
        return bool(getattr(torch.ops.torchvision, name))
    except AttributeError:
        return False
