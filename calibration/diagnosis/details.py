"""What plots need beside the readings: channels of LayerNorms, and heads of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.diagnosis.gradients import FloatRun
from calibration.graph import Operation
from quantizers.uniform import HEAD_AXIS


@dataclass(frozen=True, slots=True)
class NormChannels:
    """Ranges of the channels behind a LayerNorm, as traced and as the quantized network has them.

    Args:
        module: its path.
        traced: lowest and highest value of each channel, C each.
        rewritten: the same after the recipe's rewrites.
    """

    module: str
    traced: tuple[tuple[float, ...], tuple[float, ...]]
    rewritten: tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    """Probabilities of an attention, head by head.

    Args:
        module: its path.
        entropy: mean entropy of a row, as a share of that of equal probabilities: 0 to 1.
        error: squared error of the probabilities in their format, as a share of their squares.
    """

    module: str
    entropy: tuple[float, ...]
    error: tuple[float, ...]


class DetailsMeter:
    """Collects details from float runs of the rewritten graph.

    Args:
        calibrated: the network.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        self._calibrated = calibrated
        operations = calibrated.graph.operations
        self._norms = [operation for operation in operations if operation.op == "layer_norm"]
        entries = {edge: entry for entry in calibrated.sites for edge in entry.site.edges}
        self._attention: list[tuple[Operation, CalibratedSite]] = [
            (operation, entries[operation.name, 0])
            for operation in operations
            if operation.op == "matmul"
            and (operation.name, 0) in entries
            and entries[operation.name, 0].site.kind == "probability"
        ]
        self._ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self._heads: dict[str, list[Tensor]] = {}
        self._rows: dict[str, int] = {}

    def add(self, run: FloatRun) -> None:
        """Take a micro-batch."""
        for norm in self._norms:
            rows = run.values[norm.name].flatten(0, -2)
            low, high = rows.amin(0), rows.amax(0)
            if norm.name in self._ranges:
                known = self._ranges[norm.name]
                low, high = torch.minimum(low, known[0]), torch.maximum(high, known[1])
            self._ranges[norm.name] = low, high
        for operation, entry in self._attention:
            p = run.values[operation.inputs[0]]
            if p.ndim < -HEAD_AXIS + 1:
                continue
            error = apply(entry.qparams, p).to(torch.float32) - p
            entropy = -torch.special.xlogy(p, p).sum(-1) / math.log(max(p.shape[-1], 2))
            by_head = [x.movedim(HEAD_AXIS, 0).flatten(1) for x in (error.square(), p.square(), entropy[..., None])]
            sums = [x.to(torch.float64).sum(1) for x in by_head]
            known_sums = self._heads.get(operation.name)
            self._heads[operation.name] = (
                sums if known_sums is None else [a + b for a, b in zip(known_sums, sums, strict=True)]
            )
            self._rows[operation.name] = self._rows.get(operation.name, 0) + by_head[2].shape[1]

    def channels(self) -> tuple[NormChannels, ...]:
        """Return the LayerNorms in execution order."""
        constants = self._calibrated.graph.constants
        traced = {**constants, **self._calibrated.float_constants}
        made = []
        for norm in self._norms:
            if norm.name not in self._ranges:
                continue
            now, before = ([table[name] for name in norm.inputs[1:]] for table in (constants, traced))
            # Both are the same normalized values times a weight plus a bias; a weight of zero holds one value only.
            unit = torch.where(now[0] == 0, torch.ones_like(now[0]), now[0])
            ends = [(end - now[1]) / unit * before[0] + before[1] for end in self._ranges[norm.name]]
            low, high = torch.minimum(*ends), torch.maximum(*ends)
            made.append(NormChannels(norm.module, (_numbers(low), _numbers(high)), _pair(self._ranges[norm.name])))
        return tuple(made)

    def heads(self) -> tuple[AttentionHeads, ...]:
        """Return the attentions in execution order."""
        made = []
        for operation, _ in self._attention:
            if operation.name in self._heads:
                error, signal, entropy = self._heads[operation.name]
                made.append(
                    AttentionHeads(
                        operation.module,
                        _numbers(entropy / self._rows[operation.name]),
                        _numbers(error / signal.clamp(min=1e-30)),
                    )
                )
        return tuple(made)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _pair(ends: tuple[Tensor, Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return _numbers(ends[0]), _numbers(ends[1])
