"""What each width of each weight costs: bytes where it is stored, and time in this project's own kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.calibrated import Calibrated
from calibration.engine import Progress
from calibration.integerize import sums_of
from calibration.mixed_precision.candidates import weight_sites
from ptq.mixed_precision.networks import Networks
from quantizers.integer.bit_packing import NARROW_BITS

#: Runs of each network; medians count.
_ROUNDS = 30
_SEED = 0


@dataclass(frozen=True, slots=True)
class WidthCost:
    """A weight at a width.

    Args:
        bundle_bytes: of its codes as a compiled bundle stores them, padding included.
        artifact_bytes: of its codes as an artifact stores them.
        milliseconds: of the kernels that multiply with it, and what is fused into them, at batch 1.
    """

    bundle_bytes: int
    artifact_bytes: int
    milliseconds: float

    def stored(self, store: str) -> int:
        """Return the bytes in a member of :data:`ptq.mixed_precision.goal.STORES`."""
        return self.bundle_bytes if store == "bundle" else self.artifact_bytes


@dataclass(frozen=True, slots=True)
class Costs:
    """All of them.

    Args:
        weights: by site and width.
        other_milliseconds: of all kernels that multiply with no weight.
        threads: with which times were measured.
    """

    weights: Mapping[str, Mapping[int, WidthCost]]
    other_milliseconds: float
    threads: int


def stored_width(bits: int, store: str) -> int:
    """Return the bits that a code of a width takes in a bundle (3, 4 or 8) or in an artifact (2 to 6, or 8)."""
    if store == "artifact":
        return next((width for width in NARROW_BITS if bits <= width), 8)
    from tvm_backend.linear_costs import stored_width as in_bundle

    return in_bundle(bits)


def useful_widths(widths: Sequence[int], store: str) -> tuple[int, ...]:
    """Return, narrowest first, the widest of those that are stored alike: it errs least, at no cost."""
    best: dict[int, int] = {}
    for width in sorted(set(widths)):
        best[stored_width(width, store)] = width
    return tuple(sorted(best.values()))


def measure_costs(networks: Networks, widths: Sequence[int], progress: Progress | None = None) -> Costs:
    """Compile the network at one width after the other, and time its kernels.

    Widths that a bundle stores alike run the same kernels and are measured once.

    Args:
        networks: with candidates of every weight, at every width.
        widths: to measure.
        progress: called with a stage, what is done and what there is to do.
    """
    from tvm_backend.linear_costs import measure_costs as measure

    calibrated = networks.calibrated
    representatives = {stored_width(width, "bundle"): width for width in sorted(widths)}
    programs = []
    for done, width in enumerate(representatives.values(), 1):
        programs.append(networks.compiled(networks.uniform(width)))
        if progress is not None:
            progress("compile for costs", done, len(representatives))
    measured = measure(programs, *_example_inputs(calibrated), rounds=_ROUNDS)
    found = dict(zip(representatives, measured, strict=True))
    weights: dict[str, dict[int, WidthCost]] = {}
    for entry in weight_sites(calibrated):
        size = int(calibrated.graph.constants[entry.site.value].numel())
        # A weight that several layers share is stored once and read by each.
        nodes = [sums_of(calibrated.graph.producers()[name]) for name, _ in entry.site.edges]
        weights[entry.site.name] = {}
        for width in widths:
            linears = [found[stored_width(width, "bundle")].linears[node] for node in nodes]
            weights[entry.site.name][width] = WidthCost(
                linears[0].weight_bytes,
                -(-size * stored_width(width, "artifact") // 8),
                sum(linear.milliseconds for linear in linears),
            )
    # The same kernels in all of them.
    others = float(np.median([cost.other_milliseconds for cost in measured]))
    return Costs(weights, others, programs[0][1].threads)


def _example_inputs(calibrated: Calibrated) -> list[npt.NDArray[np.float32]]:
    rng = np.random.default_rng(_SEED)
    return [rng.standard_normal((1, *shape), np.float32) for _, shape in calibrated.graph.inputs]
