"""The bars: milliseconds of each engine, a panel for each network, batch and number of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .comparison import cell_title
from .engines import ENGINES, OURS

OURS_COLOUR, INTEGER_COLOUR, FLOAT_COLOUR = "#c0392b", "#2c6fad", "#a8b4bf"


@dataclass(frozen=True, slots=True)
class Bar:
    """An engine in all panels.

    Args:
        title: for people.
        colour: of its bar.
        reference: whether others' ratios are to its time.
    """

    title: str
    colour: str
    reference: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """A cell.

    Args:
        title: for people.
        states: of its engines, as :func:`.comparison.compare_cell` returns them.
    """

    title: str
    states: Mapping[str, Mapping[str, Any]]


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Args:
        results: what :file:`cpu.json` holds.
        path: the picture; one that exists is replaced.
    """
    bars = {name: Bar(ENGINES[name].title, _colour(name), name == OURS) for name in results["settings"]["engines"]}
    rows = [
        [Panel(cell_title(network["title"], cell), cell["engines"]) for cell in network["cells"]]
        for network in results["networks"].values()
    ]
    machine = results["machine"]
    where = f"{machine['processor']}, {machine['usable_processors']} cores, {machine['date'][:10]}"
    draw(rows, bars, where, path)


def draw(rows: Sequence[Sequence[Panel]], bars: Mapping[str, Bar], where: str, path: Path, digits: int = 2) -> None:
    """Write a PNG with a row of panels for each network.

    Args:
        rows: at least one, of at least one panel.
        bars: engines, from top to bottom.
        where: machine and date.
        path: the picture; one that exists is replaced.
        digits: of milliseconds, behind the point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    columns = max(len(row) for row in rows)
    height = 0.26 * len(bars) + 0.75
    # Not pyplot, which may look for a display.
    figure = Figure(figsize=(2.2 + 3.3 * columns, height * len(rows) + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for places, row in zip(panels, rows, strict=True):
        for place in places[len(row) :]:
            place.set_visible(False)
        for place, panel in zip(places, row, strict=False):
            _bars(place, panel, bars, digits)
            place.set_title(panel.title, fontsize=9)
    figure.suptitle(f"Milliseconds a call, shorter is better; in brackets: times ours. {where}", fontsize=9)
    figure.savefig(path)


def _bars(place: Any, panel: Panel, bars: Mapping[str, Bar], digits: int) -> None:
    engines = list(reversed(bars))
    states = [panel.states[engine] for engine in engines]
    timed = [state["status"] == "timed" for state in states]
    medians = [state["ms"]["median"] if there else 0.0 for state, there in zip(states, timed, strict=True)]
    below = [m - state["ms"]["p10"] if there else 0.0 for m, state, there in zip(medians, states, timed, strict=True)]
    above = [state["ms"]["p90"] - m if there else 0.0 for m, state, there in zip(medians, states, timed, strict=True)]
    place.barh(
        range(len(engines)),
        medians,
        xerr=[below, above],
        color=[bars[engine].colour for engine in engines],
        error_kw={"elinewidth": 0.8},
    )
    place.set_yticks(range(len(engines)), [bars[engine].title for engine in engines], fontsize=8)
    place.tick_params(axis="x", labelsize=7)
    longest = max([median + more for median, more in zip(medians, above, strict=True)] + [1e-6])
    place.set_xlim(0, 1.4 * longest)
    for position, (state, median, there) in enumerate(zip(states, medians, timed, strict=True)):
        text = f" {median:.{digits}f}" if there else f" {state['status']}"
        if there and "ratio" in state and not bars[engines[position]].reference:
            text += f" ({state['ratio']['median']:.2f})"
        # Behind the whisker, not on it.
        place.text(state["ms"]["p90"] if there else 0.0, position, text, va="center", fontsize=7)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)


def _colour(engine: str) -> str:
    if engine == OURS:
        return OURS_COLOUR
    return INTEGER_COLOUR if "int8" in ENGINES[engine].title else FLOAT_COLOUR
