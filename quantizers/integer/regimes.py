"""Where the published operators of I-ViT leave the range in which they approximate, or int32 as the paper has it.

The constants of a program say what its calibrated scales allow: nothing is run. Each regime stands with its numbers in
``docs/integer-nonlinearities.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from quantizers.integer.bounds import Interval
from quantizers.integer.ivit import (
    NORMALIZED_BITS,
    RECIPROCAL,
    SIGMOID_SLOPE,
    newton_root,
    shift_exponential,
)
from quantizers.integer.program import IntegerProgram, Node, TensorType
from quantizers.integer.verify import verify

#: Share of the right value below which a flat row of probabilities, or the sigmoid of a large value, is reported.
REPORTED_SHARE = 0.95
#: Inverse scales up to which exponents can be a quarter too small.
_COARSE_INVERSE = 4
#: Error of the sigmoid of a row's lowest code from which it is reported: four of its codes.
_SIGMOID_TOLERANCE = 1 / 32
#: Relative error of a square root from which it is reported.
_ROOT_TOLERANCE = 1.02


@dataclass(frozen=True, slots=True)
class RegimeKind:
    """A way for a published form to fail.

    Args:
        summary: what happens.
        advice: what to do.
        changes_result: whether this program's results are wrong by it; if not, only int32 arithmetic as published would
            overflow, and the program, which computes in int64, stays right.
    """

    summary: str
    advice: str
    changes_result: bool


REGIMES: Mapping[str, RegimeKind] = MappingProxyType(
    {
        "softmax_mass": RegimeKind(
            "probabilities of a flat row, cut off below, do not sum to one",
            "give sites of kind probability 16 bits, or use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "softmax_slope": RegimeKind(
            "the inverse of a coarse scale is rounded up to a small integer, which flattens the softmax",
            "search a narrower range for sites of kind scores, or use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "gelu_maximum": RegimeKind(
            "beside a large row maximum, elements far below it get a sigmoid that is not small, in the end one half",
            "use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "gelu_resolution": RegimeKind(
            "at a fine scale the reciprocal of ShiftGELU has few bits, and large values are not passed on whole",
            "use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "newton_start": RegimeKind(
            "the square root of a small variance has not converged when the iteration ends",
            "start from the variance's own bits (start -1), or use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "int32_exponentials": RegimeKind(
            "the sum of a row's exponentials leaves int32 and is clipped",
            "use 'nonlinear: corrected'",
            changes_result=True,
        ),
        "int32_bias": RegimeKind(
            "beta / gamma leaves int32 in I-LayerNorm; it is held in 64 bits here",
            "no change is needed here; implementations in int32 need 'nonlinear: corrected'",
            changes_result=False,
        ),
        "int32_squares": RegimeKind(
            "the sum of squares can leave int32 in I-LayerNorm; it is computed in 64 bits here",
            "no change is needed here; implementations in int32 need wider sums",
            changes_result=False,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Regime:
    """A node that can enter a regime.

    Args:
        kind: a key of :data:`REGIMES`.
        node: name of the node.
        source: its place in the model.
        detail: the numbers that say so.
    """

    kind: str
    node: str
    source: str
    detail: str


def find_regimes(program: IntegerProgram) -> tuple[Regime, ...]:
    """Return every regime that a node's constants and bounds allow, in execution order.

    Raises:
        ProgramError: the program breaks a rule of the contract.
    """
    bounds, types = verify(program), program.types()
    found = []
    for node in program.nodes:
        if node.op in _FINDERS:
            facts = _FINDERS[node.op](node, program, types[node.inputs[0]], bounds[node.inputs[0]])
            found += [Regime(kind, node.name, node.source, detail) for kind, detail in facts.items()]
    return tuple(found)


def _shiftmax(node: Node, _program: IntegerProgram, x: TensorType, _interval: Interval) -> dict[str, str]:
    keys, bits = x.shape[-1], node.integer("bits")
    exponential = node.integer("inverse_scale") << node.integer("window")
    total = keys * exponential
    probability = (exponential * (RECIPROCAL // min(total, RECIPROCAL))) >> (32 - bits)
    mass = keys * probability / 2 ** (bits - 1)
    found = {}
    if not REPORTED_SHARE <= mass <= 1 / REPORTED_SHARE:
        found["softmax_mass"] = f"{keys} equal scores get probabilities that sum to {mass:.3f} at {bits} bits"
    inverse = node.integer("inverse_scale")
    if inverse == 1:
        found["softmax_slope"] = "I0 is 1 for a scale of 1 or more: exponents are divided by the scale"
    elif inverse <= _COARSE_INVERSE:
        found["softmax_slope"] = (
            f"I0 is {inverse} for a scale between {1 / inverse:.3f} and {1 / (inverse - 1):.3f}: "
            f"exponents are up to {1 / inverse:.0%} too small"
        )
    if total > RECIPROCAL:
        found["int32_exponentials"] = f"{keys} equal scores sum to {total}, int32 holds {RECIPROCAL}"
    return found


def _shift_gelu(node: Node, _program: IntegerProgram, _x: TensorType, interval: Interval) -> dict[str, str]:
    inverse, window = node.integer("inverse_scale"), node.integer("window")
    zero_point, cut = node.integer("input_zero_point"), 32 - node.integer("bits")
    top, bottom = interval.high - zero_point, interval.low - zero_point
    one = 1 << (node.integer("bits") - 1)

    def sigmoid(code: int, largest: int) -> float:
        above = shift_exponential(code - largest, inverse, window)
        rest = min(shift_exponential(-largest, inverse, window), RECIPROCAL)
        return ((above * (RECIPROCAL // min(above + rest, RECIPROCAL))) >> cut) / one

    found = {}
    lowest = _sigmoid(bottom / inverse)
    limit = next((m for m in range(max(bottom, 0), top + 1) if sigmoid(bottom, m) > lowest + _SIGMOID_TOLERANCE), None)
    if limit is not None:
        value = limit / (SIGMOID_SLOPE * inverse)
        found["gelu_maximum"] = (
            f"from a row maximum of {limit} (about {value:.1f}) on, and codes reach {top}: "
            f"the sigmoid of {bottom} is then up to {sigmoid(bottom, top):.3f}, not {lowest:.3f}"
        )
    if top > 0 and sigmoid(top, top) < REPORTED_SHARE * _sigmoid(top / inverse):
        found["gelu_resolution"] = (
            f"the sigmoid of the largest code is {sigmoid(top, top):.3f}, not {_sigmoid(top / inverse):.3f}"
        )
    if inverse << window > RECIPROCAL // 2:
        found["int32_exponentials"] = (
            f"two exponentials sum to up to {2 * (inverse << window)}, int32 holds {RECIPROCAL}; "
            f"the sigmoid of the largest code is {sigmoid(top, top):.3f}"
        )
    return found


def _sigmoid(value: float) -> float:
    """Return ``1 / (1 + exp(-value))``."""
    return 1 / (1 + math.exp(-value))


def _i_layer_norm(node: Node, program: IntegerProgram, x: TensorType, interval: Interval) -> dict[str, str]:
    width, bias = x.shape[-1], np.abs(program.constants[node.inputs[2]].astype(np.int64))
    start, iterations = node.integer("start"), node.integer("iterations")
    found = {}
    # A root that is late is late for every smaller value.
    late = [v for v in (1 << bit for bit in range(62)) if newton_root(v, start, iterations) > _tolerated(v)]
    if late:
        least = newton_root(0, start, iterations)
        found["newton_start"] = (
            f"from 2^{start} in {iterations} steps: rows whose squares sum to less than {2 * late[-1]} "
            f"are divided by too much, at least by {least}"
        )
    far = int((bias + (1 << NORMALIZED_BITS) > RECIPROCAL).sum())
    if far:
        ratio = float(bias.max()) * math.sqrt(width) / 2**NORMALIZED_BITS
        found["int32_bias"] = (
            f"{far} of {width} channels, |beta / gamma| up to {ratio:.4g}; "
            f"int32 holds less than {2 * math.sqrt(width):.1f}"
        )
    squares = width * (interval.high - interval.low) ** 2
    if squares > RECIPROCAL:
        rms = math.sqrt(RECIPROCAL / width)
        found["int32_squares"] = f"for rows that deviate by more than {rms:.0f} codes, of {interval.magnitude}"
    return found


def _tolerated(value: int) -> float:
    # One unit is what the floor costs; the paper's start stays within it.
    return _ROOT_TOLERANCE * (math.isqrt(value) + 1)


_FINDERS: Mapping[str, Callable[[Node, IntegerProgram, TensorType, Interval], dict[str, str]]] = MappingProxyType(
    {"shiftmax": _shiftmax, "shift_gelu": _shift_gelu, "i_layer_norm": _i_layer_norm}
)
