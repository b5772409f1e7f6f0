"""The tables of docs/integer-nonlinearities.md are those that the script makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import nonlinearity_errors
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integer-nonlinearities.md"
TABLES: list[Callable[[], Iterator[nonlinearity_errors.Row]]] = [
    nonlinearity_errors.softmax_table,
    nonlinearity_errors.gelu_table,
    nonlinearity_errors.layer_norm_table,
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_page_shows_what_the_script_prints(table: Callable[[], Iterator[nonlinearity_errors.Row]]) -> None:
    """To the printed digits, of which the last may differ between machines."""
    rows = list(table())
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if cells(line) == list(rows[0]))
    for row, line in zip(rows, lines[start + 2 : start + 2 + len(rows)], strict=True):
        for value, shown in zip(row.values(), cells(line), strict=True):
            if isinstance(value, float):
                assert float(shown) == pytest.approx(value, rel=0.02, abs=1e-9), line
            else:
                assert shown == str(value), line
