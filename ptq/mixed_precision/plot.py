"""The front as a picture: an SVG that needs no library to write and none to look at."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 70, 46, 56
_ERROR, _DROP, _CHOSEN = "#2c6fad", "#c0392b", "#1e8449"

Place = Callable[[float], float]


def front_svg(described: Mapping[str, Any]) -> str:
    """Return the front: signal-to-noise ratio that is predicted, and drops that were measured, over what has a budget.

    Args:
        described: what :func:`ptq.mixed_precision.document.document` returns.
    """
    by_time = "latency_budget" in described["goal"]
    key, unit = ("milliseconds", 1.0) if by_time else (f"{described['store']}_bytes", 1e6)
    label = "all kernels at batch 1, ms" if by_time else f"weights in the {described['store']}, MB"
    points = [*described["front"], described["chosen"], described["baseline"]]
    x = _scale([point[key] / unit for point in points], _LEFT, _WIDTH - _RIGHT)
    y = _scale([point["snr_db"] for point in points], _HEIGHT - _BOTTOM, _TOP)
    front = [(x[1](point[key] / unit), y[1](point["snr_db"])) for point in described["front"]]
    chosen = described["chosen"]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in front)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, f"{described['recipe']['name']}: {chosen['ratio']:.2f} times smaller than 8 bits", size=14),
        *_axis(x, horizontal=True),
        *_axis(y, horizontal=False),
        _text(_WIDTH / 2, _HEIGHT - 14, label, anchor="middle"),
        _text(16, _TOP - 10, "predicted signal to noise, dB", colour=_ERROR),
        f'<polyline fill="none" stroke="{_ERROR}" stroke-width="1.5" points="{line}"/>',
        *(_dot(a, b, 3, _ERROR, _ERROR) for a, b in front),
        *_drops(described, key, lambda value: x[1](value / unit)),
        _dot(x[1](chosen[key] / unit), y[1](chosen["snr_db"]), 7, "none", _CHOSEN),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _drops(described: Mapping[str, Any], key: str, x: Place) -> list[str]:
    """Draw measured drops, placed by a key, with one standard error either way, on an axis of their own."""
    found = {
        (point[key], kind): point[kind]
        for point in [*described["front"], described["baseline"], described["chosen"]]
        for kind in ("drop", "final")
        if point[kind] is not None
    }
    if not found:
        return []
    ends = [drop["points"] + sign * drop["standard_error"] for drop in found.values() for sign in (-1, 1)]
    goal = described["goal"].get("max_drop")
    ticks, y = _scale([*ends, 0.0, *([] if goal is None else [goal])], _TOP, _HEIGHT - _BOTTOM)
    parts = [_text(_WIDTH - 10, _TOP - 10, "measured drop, points", anchor="end", colour=_DROP)]
    parts += [_text(_WIDTH - _RIGHT + 8, y(tick) + 4, f"{tick:g}", colour=_DROP) for tick in ticks]
    if goal is not None:
        parts.append(_line(_LEFT, _WIDTH - _RIGHT, y(goal), y(goal), _DROP, "5 4"))
    for (size, kind), drop in sorted(found.items()):
        a = x(size)
        low, high = (y(drop["points"] + sign * drop["standard_error"]) for sign in (-1, 1))
        fill = _DROP if kind == "final" else "white"
        parts.append(_line(a, a, low, high, _DROP))
        parts.append(_dot(a, y(drop["points"]), 4, fill, _DROP))
    return parts


def _scale(values: Sequence[float], start: float, end: float) -> tuple[list[float], Place]:
    """Return round numbers that enclose values, and where a number lies between two ends."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    ticks = [round(number * step, 10) for number in range(first, last + 1)]
    return ticks, lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _axis(scale: tuple[list[float], Place], *, horizontal: bool) -> list[str]:
    ticks, place = scale
    parts = []
    for tick in ticks:
        at = place(tick)
        if horizontal:
            parts.append(_line(at, at, _TOP, _HEIGHT - _BOTTOM))
            parts.append(_text(at, _HEIGHT - _BOTTOM + 18, f"{tick:g}", "middle"))
        else:
            parts.append(_line(_LEFT, _WIDTH - _RIGHT, at, at))
            parts.append(_text(_LEFT - 8, at + 4, f"{tick:g}", "end"))
    return parts


def _line(x1: float, x2: float, y1: float, y2: float, colour: str = "#e4e8ec", dashes: str = "none") -> str:
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-dasharray="{dashes}"/>'


def _dot(x: float, y: float, radius: int, fill: str, stroke: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12, colour: str = "#222") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{html.escape(text)}</text>"
    )
