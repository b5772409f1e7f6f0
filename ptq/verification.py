"""How close each backend is to the interpreter, on the same images, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ptq.console import Reporter
from ptq.data import ImageData

#: What a backend promises: the interpreter's bits; its numbers to the rounding of float32; or nothing, because it
#: computes some operators otherwise.
PROMISES: Mapping[str, str] = MappingProxyType(
    {"tvm": "every bit", "onnx-integer": "every bit", "simulate": "float32 rounding", "onnxruntime": "none"}
)
#: Largest difference, as a share of the largest result, that is float32 rounding of a sum of several terms.
_ROUNDING = 2.0**-20
#: Steps of an 8-bit format whose largest code is the largest result.
_STEPS = 127


@dataclass(frozen=True, slots=True)
class Verification:
    """A backend beside the interpreter.

    Args:
        backend: what was compared.
        promise: a value of :data:`PROMISES`.
        kept: whether it keeps what it promises.
        n: number of images.
        equal: whether every bit of every result is the same.
        max_abs_diff: largest difference.
        max_steps: the same in 8-bit steps, of which the largest result of the interpreter has 127.
        agreement: share of images, 0 to 1, with the same first choice.
    """

    backend: str
    promise: str
    kept: bool
    n: int
    equal: bool
    max_abs_diff: float
    max_steps: float
    agreement: float


class _Tally:
    """What has been seen of one backend."""

    def __init__(self, backend: str) -> None:
        self.backend, self.equal, self.difference, self.agreed = backend, True, 0.0, 0

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.equal = self.equal and torch.equal(expected, found)
        self.difference = max(self.difference, float((expected - found).abs().max()))
        self.agreed += int((expected.flatten(1).argmax(-1) == found.flatten(1).argmax(-1)).sum())

    def result(self, seen: int, largest: float) -> Verification:
        promise = PROMISES[self.backend]
        kept = {
            "every bit": self.equal,
            "float32 rounding": self.difference <= _ROUNDING * largest,
            "none": True,
        }[promise]
        steps = _STEPS * self.difference / largest if largest else 0.0
        return Verification(self.backend, promise, kept, seen, self.equal, self.difference, steps, self.agreed / seen)


def verify_backends(
    runs: Mapping[str, Callable[[Tensor], Tensor]],
    reference: Callable[[Tensor], Tensor],
    data: ImageData,
    batch_size: int,
    progress: Reporter | None = None,
) -> list[Verification]:
    """Run the interpreter and the backends on all images, and compare.

    Args:
        runs: by name, keys of :data:`PROMISES`; each maps float32 images (batch, C, H, W) to results (batch, ...).
        reference: the interpreter.
        data: images.
        batch_size: images run together.
        progress: called with what is done.

    Returns:
        One entry for each backend, in their order.
    """
    tallies = [_Tally(backend) for backend in runs]
    seen, largest = 0, 0.0
    for images, _ in data.batches(batch_size):
        expected = reference(images)
        largest = max(largest, float(expected.abs().max()))
        for tally in tallies:
            tally.add(expected, runs[tally.backend](images))
        seen += len(images)
        if progress is not None:
            progress("verify", seen, len(data))
    return [tally.result(seen, largest) for tally in tallies]
