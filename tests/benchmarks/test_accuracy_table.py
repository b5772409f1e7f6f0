"""Tables of the accuracy benchmark: means over seeds, spreads, and what is missing."""

from __future__ import annotations

from accuracy_table import Row, summary, table


def row(network: str, method: str, bits: str, seed: int, integer: float, simulate: float | None) -> Row:
    extra = (3000, 89.0, integer - 1, 0.5) if network == "dinov2" else (None,) * 4
    return Row(
        network, method, bits, seed, 90.0, simulate, integer, simulate, *extra, 10.0 + seed, 500.0 + seed, 16, "c"
    )


ROWS = [
    row("dinov2", "auto", "w4a4", 0, 70.0, 69.0),
    row("dinov2", "auto", "w4a4", 1, 72.0, None),
    row("dinov2", "mse", "w8a8", 0, 80.0, 80.0),
    row("fashion", "mse", "w4a4", 0, 60.0, 60.0),
]


def test_summary_has_a_row_a_method_and_a_column_a_width() -> None:
    lines = summary(ROWS).splitlines()
    assert "dinov2: float 90.0; seeds 0, 1" in lines
    assert "| method | w8a8 | w4a4 |" in lines
    assert "| auto | - | 71.0 (2.0) |" in lines
    assert "| mse | 80.0 | - |" in lines
    start = lines.index("dinov2, all 3,000 queries: float 89.0; seeds 0, 1")
    assert "| auto | - | 70.0 (2.0) |" in lines[start:]
    assert not any(line.startswith("fashion, all") for line in lines)
    assert lines.index("fashion: float 90.0; seeds 0") < lines.index("dinov2: float 90.0; seeds 0, 1")


def test_table_tells_simulation_and_program_apart() -> None:
    lines = table(ROWS).splitlines()
    assert "| auto | w4a4 | 16 | 2 | 69.0 | 69.0 | 71.0 (2.0) | 70.0 (2.0) | 0.500 (0.000) | 10 (1) | 501 |" in lines
    assert "| mse | w4a4 | 16 | 1 | 60.0 | 60.0 | 60.0 | 10 | 500 |" in lines
