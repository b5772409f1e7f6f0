"""From a calibrated graph to an IntegerProgram."""

from calibration.integerize.lowering import integerize

__all__ = ["integerize"]
