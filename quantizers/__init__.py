"""Number formats, rounding, and the IntegerProgram: numbers only, no traced graphs and no compiler."""
