"""What a search is to reach: an accuracy, a size, or a time."""

from __future__ import annotations

from dataclasses import dataclass

from quantizers.errors import UsageError

#: Where the bytes of weights are counted: in compiled bundles (3, 4 or 8 bits a code), or in artifacts (2 to 6 or 8).
STORES = ("bundle", "artifact")


@dataclass(frozen=True, slots=True)
class Goal:
    """Exactly one of three.

    Args:
        max_drop: points of top-1 that may be lost against float, not negative: the smallest weights that keep to it.
        size_budget: share, between 0 and 1, of the bytes that the weights take at 8 bits: the least error within it.
        latency_budget: milliseconds of the network at batch 1, above 0: the least error within it.

    Raises:
        UsageError: none or several of them, or a number outside its range.
    """

    max_drop: float | None = None
    size_budget: float | None = None
    latency_budget: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("max_drop", "size_budget", "latency_budget") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none of them"
            raise UsageError(
                f"a search has exactly one goal: --max-drop POINTS, --size-budget SHARE or --latency-budget MS; "
                f"found {found}"
            )
        # A negated comparison, so that NaN is refused as well.
        if self.max_drop is not None and not self.max_drop >= 0:
            raise UsageError(f"--max-drop is {self.max_drop:g}, expected points of top-1, 0 or more")
        if self.size_budget is not None and not 0 < self.size_budget < 1:
            raise UsageError(
                f"--size-budget is {self.size_budget:g}, expected a share of the bytes at 8 bits, between 0 and 1"
            )
        if self.latency_budget is not None and not self.latency_budget > 0:
            raise UsageError(f"--latency-budget is {self.latency_budget:g}, expected milliseconds, more than 0")

    def describe(self) -> str:
        """Return the goal for people."""
        if self.max_drop is not None:
            return f"at most {self.max_drop:g} points below float"
        if self.size_budget is not None:
            return f"at most {self.size_budget:g} of the bytes of weights of 8 bits"
        return f"at most {self.latency_budget:g} ms"
