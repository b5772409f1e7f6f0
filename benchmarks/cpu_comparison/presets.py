"""The table of export presets: each file in each runtime, beside what others make for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .engines import ENGINES
from .files import STATIC, TARGETS
from .ratios import ratios, round_values, spread
from .report import disturbances, left_out, table


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime that presets are compared in.

    Args:
        title: for tables.
        own: engine that runs the preset made for it; others are given as ratios to it.
        others: engines beside it.
    """

    title: str
    own: str
    others: tuple[str, ...]

    @property
    def engines(self) -> tuple[str, ...]:
        """All of them."""
        return (self.own, *self.others)


RUNTIMES = {
    "onnxruntime": Runtime(
        "ONNX Runtime",
        "onnxruntime-int8",
        (
            *(f"onnxruntime-{target}" for target in TARGETS if target != "onnxruntime"),
            *(f"static-{settings}" for settings in STATIC),
            "onnxruntime-fp32",
        ),
    ),
    "openvino": Runtime(
        "OpenVINO",
        "openvino-int8",
        (
            *(f"openvino-{target}" for target in TARGETS if target != "openvino"),
            *("openvino-nncf", "openvino-bf16", "openvino-fp32"),
        ),
    ),
}


def markdown(results: dict[str, Any]) -> str:
    """Return a table for each runtime.

    Args:
        results: what :file:`presets.json` holds.
    """
    networks: dict[str, dict[str, Any]] = results["networks"]
    parts = [
        "Milliseconds a call of the runtime's own preset, then the median ratio of others to it in the same round."
    ]
    for runtime in RUNTIMES.values():
        rows = [
            [network["title"], str(cell["batch"]), str(cell["threads"]), *_cells(runtime, cell["engines"])]
            for network in networks.values()
            for cell in network["cells"]
        ]
        titles = [ENGINES[name].title for name in runtime.others]
        head = ["network", "batch", "threads", f"{runtime.title}, its preset", *titles]
        parts += [f"In {runtime.title}:", table(head, rows)]
    parts += [text for text in (disturbances(networks), left_out(networks)) if text]
    return "\n\n".join(parts) + "\n"


def _cells(runtime: Runtime, engines: dict[str, Any]) -> list[str]:
    own = engines[runtime.own]
    if own["status"] != "timed":
        return ["-"] * len(runtime.engines)
    base = round_values(own["turns"])
    cells = [f"{spread(base).median:.2f}"]
    for name in runtime.others:
        state = engines[name]
        timed = state["status"] == "timed"
        cells.append(f"{spread(ratios(round_values(state['turns']), base)).median:.2f}" if timed else "-")
    return cells
