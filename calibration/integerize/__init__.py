"""From a calibrated graph to an IntegerProgram."""

from calibration.integerize.lowering import integerize, multiplier_factors

__all__ = ["integerize", "multiplier_factors"]
