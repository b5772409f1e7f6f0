"""The command line inside a test's process."""

from __future__ import annotations

import pytest

from ptq.cli import main


def run(*arguments: object) -> int:
    """Run ``ptq`` with arguments, each as its text, and return the exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)
