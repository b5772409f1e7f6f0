"""Along the front to the smallest weights whose accuracy is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

from ptq.mixed_precision.accuracy import Drop
from ptq.mixed_precision.front import Point
from quantizers.errors import UsageError

Network = TypeVar("Network")


def smallest_within(
    max_drop: float,
    front: Sequence[Point],
    measure: Callable[[Point], Drop],
    rerun: Callable[[Point], tuple[Network, Drop]],
) -> tuple[Point, Network, tuple[Point, ...]]:
    """Return the smallest point whose recipe, run anew, loses little enough.

    Points are bisected by what ``measure`` finds, for accuracy falls with size up to noise. Here a point is out only if
    it loses too much even with the standard error in its favour: weights of the search lose more than those of a recipe
    that is run anew, where later layers make up for earlier ones, and an unlucky measurement would rule out all that is
    smaller. The point that this finds is run anew, and after it the next larger ones until one is enough, with the
    standard error against it.

    Args:
        max_drop: points of top-1, one standard error included where a recipe was run anew.
        front: smallest first.
        measure: measures a point with the weights that the search has, quick.
        rerun: calibrates anew with a point's recipe and measures that, slow.

    Returns:
        The point, the network of its recipe, and the front with all that was measured.

    Raises:
        UsageError: not even the last point is enough; says what it loses.
    """
    measured = list(front)
    low, high = -1, len(front)
    while high - low > 1:
        middle = (low + high) // 2
        drop = measure(front[middle])
        measured[middle] = dataclasses.replace(front[middle], drop=drop)
        low, high = (low, middle) if not drop.beyond(max_drop) else (middle, high)
    # The last one is run anew in any case: its weights make up for more than those of the search.
    final: Drop | None = None
    for index in range(min(high, len(front) - 1), len(front)):
        network, final = rerun(front[index])
        measured[index] = dataclasses.replace(measured[index], final=final)
        if final.within(max_drop):
            return measured[index], network, tuple(measured)
    assert final is not None
    raise UsageError(
        f"--max-drop {max_drop:g} cannot be kept: the widest weights lose {final.points:.2f} points with a standard "
        f"error of {final.standard_error:.2f} on {final.images} images, and both together count; allow more points, "
        "measure on more images, or take another method or more activation bits"
    )
