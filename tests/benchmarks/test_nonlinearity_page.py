"""The tables of docs/integer-nonlinearities.md are those that the script makes."""

from __future__ import annotations

import math
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


def last_digit(number: float) -> float:
    """What one more or less in the last of three significant digits is worth."""
    return 10.0 ** (math.floor(math.log10(abs(number))) - 2) if number else 0.0


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_the_page_shows_what_the_script_prints(table: Callable[[], Iterator[nonlinearity_errors.Row]]) -> None:
    """To the printed digits; the last may differ by one, as exp and its like do in their last bit between machines."""
    rows = list(table())
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if cells(line) == list(rows[0]))
    for row, line in zip(rows, lines[start + 2 : start + 2 + len(rows)], strict=True):
        for value, shown in zip(row.values(), cells(line), strict=True):
            if isinstance(value, float):
                # Where two forms agree in every bit here, those last bits may be an error elsewhere.
                allowed = max(last_digit(float(shown)), 1e-9)
                assert float(shown) == pytest.approx(float(f"{value:.3g}"), rel=1e-9, abs=allowed), line
            else:
                assert shown == str(value), line
