"""Post-training quantization of Vision Transformers that ends in integers.

>>> import ptq
>>> q = ptq.quantize(model, images, method="mse", bits="w8a8")  # doctest: +SKIP
>>> q.save("out")  # doctest: +SKIP
"""

from ptq.api import Quantized as Quantized
from ptq.api import load as load
from ptq.api import quantize as quantize
from ptq.preprocessing import Preprocessing as Preprocessing

__all__ = ["Preprocessing", "Quantized", "load", "quantize"]
