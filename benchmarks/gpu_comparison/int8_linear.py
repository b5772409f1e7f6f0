"""Linear layers as users of plain torch quantize them: ``torch._int_mm`` between a fixed scale and float16."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LARGEST = 127
#: What ``torch._int_mm`` asks for on CUDA: more than 16 rows, other extents multiples of 8.
_ROWS, _UNIT = 32, 8
_FEWEST_ROWS = 17
_SMALLEST_RANGE = 1e-8


class Int8Linear(nn.Module):
    """A linear layer, weights int8 for each output, activations int8 with one scale.

    Args:
        linear: float32.
        largest: absolute value of its inputs that becomes 127.
        dtype: of inputs and outputs.
    """

    codes: Tensor
    factors: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, largest: float, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self._count, depth = weight.shape
        scales = weight.abs().amax(1, keepdim=True).clamp_min(_SMALLEST_RANGE) / _LARGEST
        codes = torch.round(weight / scales).to(torch.int8)
        self._pad = -depth % _UNIT
        codes = functional.pad(codes, (0, self._pad, 0, -self._count % _UNIT))
        scale = max(largest, _SMALLEST_RANGE) / _LARGEST
        self._inverse, self._dtype = 1 / scale, dtype
        # Kept by output, so that the product reads both operands along their depth.
        self.register_buffer("codes", codes.contiguous())
        # float16 holds neither the sums nor products of two scales.
        self.register_buffer("factors", scale * scales[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's outputs for ``(..., inputs)``."""
        rows = torch.clamp(torch.round(x * self._inverse), -_LARGEST, _LARGEST).to(torch.int8).flatten(0, -2)
        count = rows.shape[0]
        missing = _ROWS - count if count < _FEWEST_ROWS else 0
        if missing or self._pad:
            rows = functional.pad(rows, (0, self._pad, 0, missing))
        sums = torch._int_mm(rows, self.codes.t())[:count, : self._count]  # noqa: SLF001 - it has no public name
        result = (sums * self.factors).to(self._dtype)
        if self.bias is not None:
            result += self.bias
        return result.unflatten(0, x.shape[:-1])


def with_int8_linears(module: nn.Module, calibration: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a copy with all linear layers quantized, and everything else in a float type.

    Args:
        module: float32; on the device of ``calibration``.
        calibration: float32 images, whose largest values fix the scales.
        dtype: float type of the rest.
    """
    largest: dict[str, float] = {}
    hooks = []

    def watch(name: str) -> Any:
        def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return note

    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            hooks.append(part.register_forward_pre_hook(watch(name)))
    with torch.inference_mode():
        module(calibration)
    for hook in hooks:
        hook.remove()
    made = copy.deepcopy(module)
    made = made.to(dtype)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            made.set_submodule(name, Int8Linear(part, largest[name], dtype))
    return made.eval()
