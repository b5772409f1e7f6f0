"""The bars: milliseconds of each engine, a panel for each network, batch and number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparison import cell_title
from .engines import ENGINES, OURS

OURS_COLOUR, INTEGER_COLOUR, FLOAT_COLOUR = "#c0392b", "#2c6fad", "#a8b4bf"


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Args:
        results: what :file:`cpu.json` holds.
        path: the picture; one that exists is replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    networks = list(results["networks"].values())
    engines = list(reversed(results["settings"]["engines"]))
    columns = max(len(network["cells"]) for network in networks)
    height = 0.26 * len(engines) + 0.75
    # Not pyplot, which may look for a display.
    figure = Figure(figsize=(2.2 + 3.3 * columns, height * len(networks) + 0.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(networks), columns, squeeze=False, sharey=True)
    for row, network in zip(panels, networks, strict=True):
        for panel in row[len(network["cells"]) :]:
            panel.set_visible(False)
        for panel, cell in zip(row, network["cells"], strict=False):
            _bars(panel, cell, engines)
            panel.set_title(cell_title(network["title"], cell), fontsize=9)
    machine = results["machine"]
    figure.suptitle(
        f"Milliseconds a call, shorter is better; in brackets: times ours. {machine['processor']}, "
        f"{machine['usable_processors']} cores, {machine['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(path)


def _bars(panel: Any, cell: dict[str, Any], engines: list[str]) -> None:
    states = [cell["engines"][engine] for engine in engines]
    timed = [state["status"] == "timed" for state in states]
    medians = [state["ms"]["median"] if there else 0.0 for state, there in zip(states, timed, strict=True)]
    below = [m - state["ms"]["p10"] if there else 0.0 for m, state, there in zip(medians, states, timed, strict=True)]
    above = [state["ms"]["p90"] - m if there else 0.0 for m, state, there in zip(medians, states, timed, strict=True)]
    panel.barh(
        range(len(engines)),
        medians,
        xerr=[below, above],
        color=[_colour(engine) for engine in engines],
        error_kw={"elinewidth": 0.8},
    )
    panel.set_yticks(range(len(engines)), [ENGINES[engine].title for engine in engines], fontsize=8)
    panel.tick_params(axis="x", labelsize=7)
    longest = max([median + more for median, more in zip(medians, above, strict=True)] + [1e-6])
    panel.set_xlim(0, 1.4 * longest)
    for position, (state, median, there) in enumerate(zip(states, medians, timed, strict=True)):
        text = f" {median:.2f}" if there else f" {state['status']}"
        if there and "ratio" in state and engines[position] != OURS:
            text += f" ({state['ratio']['median']:.2f})"
        # Behind the whisker, not on it.
        panel.text(state["ms"]["p90"] if there else 0.0, position, text, va="center", fontsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _colour(engine: str) -> str:
    if engine == OURS:
        return OURS_COLOUR
    return INTEGER_COLOUR if "int8" in ENGINES[engine].title else FLOAT_COLOUR
