"""The errors this project raises for people.

Every message says what was expected, what came, where, and what to do. The command line maps
:class:`UsageError` to exit code 2 and every other :class:`PtqError` to exit code 1.
"""

from __future__ import annotations


class PtqError(Exception):
    """Base of all errors that are meant for the user."""


class UsageError(PtqError):
    """The request itself is wrong: an unknown name, a value outside its range, a path that exists."""


class RecipeError(UsageError):
    """A recipe with an unknown key, a wrong value, or a rule that matched no site."""


class DataError(PtqError):
    """Images or labels that cannot be used: missing, empty, of another shape, not finite, out of range."""


class ModelError(PtqError):
    """A model or checkpoint that cannot be loaded or traced."""


class UnsupportedOperatorError(ModelError):
    """The graph holds operators without the form that was asked for.

    Args:
        purpose: what was being done, for example "integerize".
        nodes: operator name to the names of the graph nodes that use it.
    """

    def __init__(self, purpose: str, nodes: dict[str, list[str]]) -> None:
        self.nodes = nodes
        lines = [f"  {op} ({len(names)}): {', '.join(names)}" for op, names in sorted(nodes.items())]
        count = sum(len(names) for names in nodes.values())
        super().__init__(
            f"cannot {purpose}: {count} graph nodes use {len(nodes)} operators that have no integer form:\n"
            + "\n".join(lines)
            + "\nReplace them in the model."
        )


class ProgramError(PtqError):
    """An IntegerProgram that breaks a rule of the contract, or could overflow."""


class ArtifactError(PtqError):
    """An artifact or bundle that is missing, truncated, edited, or of another format version."""


class TargetError(PtqError):
    """A compiled bundle that this machine cannot run, or a target that cannot be compiled for."""


class UnknownTargetError(TargetError, UsageError):
    """A target name that does not exist: wrong use, not a failure of this machine."""
