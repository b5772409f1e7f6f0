"""What people see: progress with an ETA on a terminal, plain lines otherwise, always on stderr; results on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

#: Seconds between plain progress lines.
_LINE_INTERVAL = 10.0


class Reporter(Protocol):
    """Called with a stage, what is done and what there is to do."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report progress."""


@contextlib.contextmanager
def progress() -> Iterator[Reporter]:
    """Show progress while the block runs."""
    if not sys.stderr.isatty():
        yield _PlainLines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


class _PlainLines:
    """A line when a stage begins, ends, and every ten seconds between, with the time that is left."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._shown: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        first = stage not in self._started
        started = self._started.setdefault(stage, now)
        if first or done >= total or now - self._shown[stage] >= _LINE_INTERVAL:
            self._shown[stage] = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if 0 < done < total else ""
            click.echo(f"{stage}: {done}/{total}{left}", err=True)


def note(message: str) -> None:
    """Print a line for people on stderr."""
    click.echo(message, err=True)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(document, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout."""
    table = Table(*headers)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Wide enough that a file or a pipe gets every column unbroken.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)
