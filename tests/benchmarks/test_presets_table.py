"""The table of export presets: ratios to each runtime's own preset, and what has no time."""

from __future__ import annotations

from typing import Any

from cpu_comparison.engines import ENGINES
from cpu_comparison.presets import RUNTIMES, markdown


def state(*rounds: float) -> dict[str, Any]:
    return {"status": "timed", "turns": [{"ms": [ms], "foreign": 0.0, "starved": 0.0} for ms in rounds]}


def test_every_runtime_compares_its_own_preset_with_all_others() -> None:
    for name, runtime in RUNTIMES.items():
        assert ENGINES[runtime.own].step == f"preset:{name}"
        steps = [ENGINES[other].step for other in runtime.others]
        assert [step for step in steps if step.startswith("preset:")] == [
            f"preset:{target}" for target in ("onnxruntime", "openvino", "tensorrt", "portable") if target != name
        ]


def test_ratios_are_taken_within_a_round() -> None:
    engines = {name: state(3.0, 6.0, 9.0) for runtime in RUNTIMES.values() for name in runtime.engines}
    engines["onnxruntime-int8"] = state(2.0, 4.0, 6.0)
    engines["static-default"] = {"status": "skipped", "reason": "no such package"}
    engines["openvino-nncf"] = state(6.0, 6.0, 6.0)
    cell = {"batch": 1, "threads": 2, "engines": engines}
    text = markdown({"networks": {"n": {"title": "Net", "cells": [cell]}}})
    rows = [line for line in text.splitlines() if line.startswith("| Net")]
    assert rows[0] == "| Net | 1 | 2 | 4.00 | 1.50 | 1.50 | 1.50 | - | 1.50 | 1.50 |"
    assert rows[1] == "| Net | 1 | 2 | 6.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |"
    assert "no such package" in text
