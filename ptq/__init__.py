"""Post-training quantization of Vision Transformers that ends in integers.

>>> import ptq
>>> q = ptq.quantize(model, images, bits="w8a8")  # doctest: +SKIP
>>> q.save("out")  # doctest: +SKIP

Names are loaded when they are first used, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptq.api import Quantized as Quantized
    from ptq.api import load as load
    from ptq.api import quantize as quantize
    from ptq.mixed_precision import search as search
    from ptq.preprocessing import Preprocessing as Preprocessing

_HOMES = {
    "Preprocessing": "ptq.preprocessing",
    "Quantized": "ptq.api",
    "load": "ptq.api",
    "quantize": "ptq.api",
    "search": "ptq.mixed_precision",
}
__all__ = ["Preprocessing", "Quantized", "load", "quantize", "search"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
