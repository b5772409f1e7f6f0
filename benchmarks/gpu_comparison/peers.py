"""What a user of torch would run otherwise: float32, float16, compiled, and int8 through ``torch._int_mm``.

All of them are recorded as a CUDA graph, as ours is: eager torch is limited by the processor that launches it, which
would say little about the GPU. TF32 is off, so that float32 is float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from cpu_comparison.engines import CLOSE_COSINE, ENGINES, FLOAT_COSINE, SkipEngineError
from torch import Tensor, nn

from .int8_linear import with_int8_linears

Floats = npt.NDArray[np.float32]
#: Runs before one is recorded: libraries choose their algorithms and allocate in them.
_WARM_UPS = 3
_COMPILE_MODE = "max-autotune-no-cudagraphs"


class Running(Protocol):
    """A loaded peer."""

    def answer(self) -> Floats:
        """Return its answers (batch, outputs) to the images that it was loaded with."""
        ...

    def time(self, count: int) -> float:
        """Return the device's milliseconds for a run, of ``count`` in a row."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of the table of peers.

    Args:
        title: for tables and plots.
        least_cosine: similarity with float32 below which it is not the same network.
        load: network (float32, on the CPU), calibration images and the images to run on.
        integer: whether its linears multiply integers.
    """

    title: str
    least_cosine: float
    load: Callable[[nn.Module, Floats, Floats], Running]
    integer: bool = False


class Captured:
    """A function of device tensors, recorded as a graph.

    Args:
        run: the function.
        images: its argument, which every run reads again.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # What runs before a recording has to be on another stream than the default one.
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run(images)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph):
            self._output = run(images)
        self._held = run, images
        self._clock = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))

    def answer(self) -> Floats:
        """Return the output of a run."""
        self._graph.replay()
        answer: Floats = self._output.float().cpu().numpy()
        return answer

    def time(self, count: int) -> float:
        """Return the device's milliseconds for a run, of ``count`` in a row."""
        start, end = self._clock
        # As ours: the first launch costs more.
        self._graph.replay()
        start.record()
        for _ in range(count):
            self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise SkipEngineError("torch has no CUDA here")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _captured(module: nn.Module, images: Floats, dtype: torch.dtype, *, compiled: bool) -> Running:
    run: Callable[[Tensor], Tensor] = module
    if compiled:
        # Of other networks and batches: there is a limit to what is compiled anew for one function.
        torch.compiler.reset()
        run = torch.compile(module, mode=_COMPILE_MODE, dynamic=False)
    return Captured(run, torch.from_numpy(images).to("cuda", dtype))


def load_float(dtype: torch.dtype, compiled: bool, module: nn.Module, _calibration: Floats, images: Floats) -> Running:
    """Run the network in a float type."""
    _need_cuda()
    return _captured(copy.deepcopy(module).to("cuda", dtype), images, dtype, compiled=compiled)


def load_int8(compiled: bool, module: nn.Module, calibration: Floats, images: Floats) -> Running:
    """Run the linear layers in int8, and the rest in float16."""
    _need_cuda()
    half = torch.float16
    made = with_int8_linears(copy.deepcopy(module).cuda(), torch.from_numpy(calibration).cuda(), half)
    return _captured(made, images, half, compiled=compiled)


def release() -> None:
    """Give the memory of peers that are gone back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_INT8_COSINE = ENGINES["torch-int8"].least_cosine

#: In the order of tables and plots.
PEERS: dict[str, Peer] = {
    "torch-fp32": Peer("torch float32", FLOAT_COSINE, lambda *task: load_float(torch.float32, False, *task)),
    "torch-fp16": Peer("torch float16", CLOSE_COSINE, lambda *task: load_float(torch.float16, False, *task)),
    "torch-fp16-compile": Peer(
        "torch.compile float16", CLOSE_COSINE, lambda *task: load_float(torch.float16, True, *task)
    ),
    "torch-int8": Peer("torch int8 (_int_mm)", _INT8_COSINE, lambda *task: load_int8(False, *task), integer=True),
    "torch-int8-compile": Peer(
        "torch.compile int8 (_int_mm)", _INT8_COSINE, lambda *task: load_int8(True, *task), integer=True
    ),
}
