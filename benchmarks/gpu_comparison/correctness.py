"""Whether a program on the device equals the interpreter in every bit, whatever its memory held before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.tensors import DeviceArray

Array = npt.NDArray[np.generic]
#: As a float32 it is finite and far outside of what a network answers.
POISON = 0x5A
#: Images that the interpreter takes at once: it holds all values of a layer in int64.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """Answers that are not the interpreter's.

    Args:
        form: of the program.
        batch: images of the run.
        call: how it was run, ``arrays`` or ``device tensors``.
        differing: values that are not equal.
        total: values that were compared.
    """

    form: str
    batch: int
    call: str
    differing: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.form}, batch {self.batch}, called with {self.call}: "
            f"{self.differing} of {self.total} values differ from the interpreter's"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def interpreted(program: IntegerProgram, images: npt.NDArray[np.float32]) -> list[Array]:
    """Return the interpreter's outputs (images, *shape) for float32 (images, channels, height, width)."""
    parts = [torch.from_numpy(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)]
    answers = [[output.numpy() for output in interpret(program, part)] for part in parts]
    return [np.concatenate(outputs) for outputs in zip(*answers, strict=True)]


def check(
    form: str,
    program: CudaProgram,
    driver: Driver,
    images: npt.NDArray[np.float32],
    expected: Sequence[Array],
    batches: Sequence[int],
) -> list[Difference]:
    """Compare the first images of each batch size, called in each way; memory is poisoned before each run.

    Args:
        form: for what is said of differences.
        program: on the device.
        driver: of the device.
        images: float32 (images, channels, height, width), as many as the largest batch.
        expected: outputs of the interpreter for all of them.
        batches: numbers of images.

    Returns:
        One entry for each run that differs.
    """
    found = []
    ways: dict[str, Callable[[npt.NDArray[np.float32]], Sequence[Array]]] = {
        "arrays": program,
        "device tensors": lambda chosen: _on_the_device(program, driver, chosen),
    }
    for batch in batches:
        for call, run in ways.items():
            program.poison(batch, POISON)
            answers = run(np.ascontiguousarray(images[:batch]))
            pairs = [(one, other[:batch]) for one, other in zip(answers, expected, strict=True)]
            differing = sum(differing_values(*pair) for pair in pairs)
            if differing:
                found.append(Difference(form, batch, call, differing, sum(other.size for _, other in pairs)))
    return found


def differing_values(found: Array, expected: Array) -> int:
    """Return how many values are not equal in every bit; all of them where type or shape is another."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return max(expected.size, 1)
    bits = f"u{expected.dtype.itemsize}"
    pair = [np.ascontiguousarray(array).view(bits) for array in (found, expected)]
    return int(np.count_nonzero(pair[0] != pair[1]))


def _on_the_device(program: CudaProgram, driver: Driver, images: npt.NDArray[np.float32]) -> list[Array]:
    """Run on tensors of the device, the outputs poisoned."""
    with ExitStack() as stack:

        def place(shape: Sequence[int], dtype: str) -> tuple[int, DeviceArray]:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            address = driver.allocate(size)
            stack.callback(driver.free, address)
            driver.fill(address, POISON, size, driver.stream)
            return address, DeviceArray(address, shape, dtype)

        address, given = place(images.shape, images.dtype.name)
        driver.upload(address, images)
        wanted = [((len(images), *kind.shape), kind.dtype) for _, kind in program.bundle.outputs]
        places = [place(shape, dtype) for shape, dtype in wanted]
        program.enqueue([given], [tensor for _, tensor in places], driver.stream).wait()
        return [driver.download(place[0], *kind) for place, kind in zip(places, wanted, strict=True)]
