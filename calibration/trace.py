"""Trace any module with torch.export and bring it to the normal form of :mod:`calibration.graph`."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from calibration.aten.converter import Converter
from calibration.graph import Graph, execute
from calibration.normalize import normalize
from quantizers.errors import ModelError

#: Largest difference between the graph and the module, relative to the largest output.
_TRACE_TOLERANCE = 1e-4


def trace(module: nn.Module, example_inputs: Sequence[Tensor]) -> Graph:
    """Trace a module in eval mode with a dynamic batch size.

    Args:
        module: takes and returns tensors whose first axis is the batch; set to eval mode. Where it lies on another
            device, a copy is traced on the CPU.
        example_inputs: float32 tensors ``(batch, ...)``; the batch is raised to 2 where it is smaller.

    Returns:
        The normalized graph: fused attention decomposed, dropout removed, BatchNorm and layer scales
        folded. It was run beside the module on other inputs, and agreed.

    Raises:
        ModelError: torch.export refuses the module, the batch axis is lost, or the graph disagrees.
        UnsupportedOperatorError: operators outside the normal form, all of them with node names.
    """
    inputs = tuple(_at_least_two(x.cpu()) for x in example_inputs)
    if not inputs:
        raise ModelError("trace needs example inputs, for example (torch.zeros(2, 3, 224, 224),)")
    module = _on_cpu(module.eval())
    graph = normalize(_export(module, inputs))
    _check_agreement(module, graph, inputs)
    return graph


def _on_cpu(module: nn.Module) -> nn.Module:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(tensor.device.type == "cpu" for tensor in tensors) else copy.deepcopy(module).cpu()


def _at_least_two(x: Tensor) -> Tensor:
    # torch.export specializes an axis of extent 1, so a batch of one would be burnt into the graph.
    return x if x.shape[0] > 1 else torch.cat([x, x])


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    shapes = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, inputs, dynamic_shapes=_in_signature(module, shapes), strict=False)
            program = program.run_decompositions({})
    except Exception as error:  # torch.export raises many unrelated types; the cause is kept and shown
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"torch.export cannot trace {type(module).__name__} with inputs of shapes "
            f"{[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {reason}"
            "; check that the module runs on these inputs at batch sizes 2 and 3"
        ) from error
    return Converter(program).convert()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch.export warns, logs and prints; what matters of it is in the error it raises."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _in_signature(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    # A module whose forward is (*args) wants its dynamic shapes nested once more.
    import inspect

    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (shapes,)
    return shapes


@torch.no_grad()
def _check_agreement(module: nn.Module, graph: Graph, inputs: tuple[Tensor, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    fresh = tuple(torch.randn((3, *x.shape[1:]), generator=generator) for x in inputs)
    expected = _flatten(module(*fresh))
    found = execute(graph, fresh)
    for (name, _), want, got in zip(graph.outputs, expected, found, strict=True):
        if want.shape != got.shape:
            raise ModelError(f"output {name}: the graph gives shape {tuple(got.shape)}, the model {tuple(want.shape)}")
        # Where a damaged model gives NaN or infinity, so must the graph; calibration then names the site.
        exact, traced = torch.nan_to_num(want), torch.nan_to_num(got)
        difference = float((exact - traced).abs().max())
        if not difference <= _TRACE_TOLERANCE * max(float(exact.abs().max()), 1.0):
            raise ModelError(
                f"output {name}: the traced graph differs from the model by {difference:g}; "
                "does the model mix samples of a batch, or hold randomness in eval mode?"
            )


def _flatten(result: object) -> list[Tensor]:
    leaves = tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
