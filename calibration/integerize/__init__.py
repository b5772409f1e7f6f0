"""From a calibrated graph to an IntegerProgram."""

from calibration.integerize.lowering import integerize, multipliers_of, sums_of

__all__ = ["integerize", "multipliers_of", "sums_of"]
