"""Rewrites of a graph's constants that leave its float output as it is and make its tensors easier to quantize.

A rewrite is a pure function of a :class:`~calibration.graph.Graph` and a group that was found in it by structure. It
returns new values of constants that the graph has already, by name, float32 and computed in float64. Operations, names
and shapes stay. The law of every rewrite: with the new constants in place of the old ones, the graph computes the same
outputs up to float32 rounding.

A group whose change another reader would see, or whose constants another operation reads too, carries a refusal: the
reason, for people. A rewrite starts from the constants of the graph it is given, and rewrites of one layer share
constants; so the result of one is put in place before the next is computed.
"""
