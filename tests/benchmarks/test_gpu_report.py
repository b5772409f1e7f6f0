"""The tables and the plot, from made-up results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from gpu_comparison.ceilings import Ceilings, by_kind
from gpu_comparison.comparison import failures
from gpu_comparison.forms import BASELINE, DEFAULT_FORMS, baseline_of, form_title
from gpu_comparison.report import markdown, write_plot

#: At 1 T multiply-adds and 1 GB a second: 0.5 ms of products; 1 ms of memory; 0.25 ms of memory.
KERNELS = [
    {"kernel": "linear", "shape": "a", "calls": 2, "macs": 500_000_000, "size": 100_000, "median_ms": 1.0},
    {"kernel": "linear", "shape": "b", "calls": 1, "macs": 100_000_000, "size": 1_000_000, "median_ms": 2.0},
    {"kernel": "layer_norm", "shape": "c", "calls": 4, "macs": 0, "size": 250_000, "median_ms": 1.0},
]
CEILINGS = {"macs": 1e12, "bandwidth": 1e9}


def timed(ms: float, ratio: float) -> dict[str, Any]:
    spread = {"median": ratio, "p10": ratio - 0.01, "p90": ratio + 0.01}
    return {"status": "timed", "ms": {"median": ms, "p10": ms - 0.01, "p90": ms + 0.01}, "ratio": spread, "cosine": 1.0}


RESULTS: dict[str, Any] = {
    "device": {
        "name": "Some GPU",
        "architecture": "sm_90",
        "multiprocessors": 132,
        "driver": "12.4",
        "toolkit": "release 13.0, V13.0.88",
        "versions": {"torch": "1", "apache-tvm": "2"},
    },
    "machine": {"date": "2030-01-02T03:04:05+00:00"},
    "settings": {
        "rounds": 7,
        "forms": ["minmax w8a8", "minmax w4a4"],
        "engines": ["torch-fp16", "torch-int8"],
        "integer_engines": ["torch-int8"],
        "baseline": "minmax w8a8",
    },
    "titles": {
        "minmax w8a8": "vit-ptq minmax w8a8",
        "minmax w4a4": "vit-ptq minmax w4a4",
        "torch-fp16": "torch float16",
        "torch-int8": "torch int8 (_int_mm)",
    },
    "networks": {
        "deit-s": {
            "title": "DeiT-S",
            "checked": [1, 97],
            "problems": {},
            "differences": [],
            "ceilings": CEILINGS,
            "kernels": [
                {"batch": 8, "form": "minmax w8a8", "kernels": KERNELS},
                {"batch": 8, "form": "minmax w4a4", "kernels": KERNELS},
            ],
            "cells": [
                {
                    "batch": 8,
                    "engines": {
                        "minmax w8a8": timed(0.5, 1.0),
                        "minmax w4a4": timed(0.4, 0.8),
                        "torch-fp16": timed(0.45, 0.9),
                        "torch-int8": {"status": "skipped", "reason": "torch has no CUDA here"},
                    },
                }
            ],
        }
    },
    "problems": {},
}
DIFFERENCE = {"form": "minmax w4a4", "batch": 97, "call": "arrays", "differing": 3, "total": 970}


def test_the_machine_comes_first_and_times_are_a_row_for_each_cell() -> None:
    text = markdown(RESULTS)
    assert text.startswith(
        "Some GPU (sm_90, 132 multiprocessors), driver for CUDA 12.4, nvcc release 13.0, V13.0.88, 2030-01-02, "
        "7 interleaved rounds; torch 1, apache-tvm 2.\n"
    )
    assert "| in every bit | batches | minmax w8a8 | minmax w4a4 |" in text
    assert "| DeiT-S | 1, 97 | equal | equal |" in text
    assert "| network | batch | vit-ptq minmax w8a8 | vit-ptq minmax w4a4 | torch float16 | torch int8" in text
    assert "| DeiT-S | 8 | **0.500** | 0.400 (0.80) | 0.450 (0.90) | skipped |" in text
    assert "Wrong" not in text


def test_peers_that_are_faster_are_listed_and_those_without_a_time() -> None:
    text = markdown(RESULTS)
    assert "A peer is faster; its time over ours:\n\n- DeiT-S, batch 8: torch float16 0.90 (0.89 to 0.91)\n" in text
    assert "- torch int8 (_int_mm): skipped: torch has no CUDA here (DeiT-S 8)\n" in text
    results = copy.deepcopy(RESULTS)
    engines = results["networks"]["deit-s"]["cells"][0]["engines"]
    engines["torch-fp16"], engines["torch-int8"] = timed(1.0, 2.0), timed(1.5, 3.0)
    text = markdown(results)
    assert "A peer is faster" not in text
    assert "Without a time" not in text


def test_kernels_beside_what_the_ceilings_allow() -> None:
    linear, norm = by_kind(KERNELS, Ceilings(**CEILINGS))
    assert (linear.kernel, linear.calls, linear.ms, linear.share) == ("linear", 3, 3.0, 0.75)
    assert linear.of_roofline == pytest.approx((0.5 + 1.0) / 3.0)
    assert norm.of_roofline == pytest.approx(0.25)
    text = markdown(RESULTS)
    assert "| linear | 3 | 3.0000 | 75.0 % | 600 | 1.10 | 50 % |" in text
    assert "| layer_norm | 4 | 1.0000 | 25.0 % |  | 0.25 | 25 % |" in text
    assert "kernels alone 4.000 ms, the roofline allows 1.750 ms: 1.0 T multiply-adds a second" in text
    # Of the form that all ratios are taken to.
    assert text.count("kernels alone") == 1
    assert "fits the cache" not in text


def test_a_kernel_above_the_roofline_is_explained() -> None:
    results = copy.deepcopy(RESULTS)
    results["networks"]["deit-s"]["ceilings"] = {"macs": 1e11, "bandwidth": 1e9}
    assert "what fits the cache is not read" in markdown(results)


def test_a_difference_comes_before_everything_and_leaves_the_network_without_times(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    network = results["networks"]["deit-s"]
    network["differences"] = [DIFFERENCE]
    for key in ("cells", "kernels", "ceilings"):
        del network[key]
    said = "DeiT-S, minmax w4a4, batch 97, called with arrays: 3 of 970 values differ from the interpreter's"
    text = markdown(results)
    assert f"**Wrong or missing, and therefore not timed:**\n\n- {said}\n" in text
    assert "| DeiT-S | 1, 97 | equal | **differs** |" in text
    assert "Milliseconds" not in text
    assert failures(results["networks"], {}) == [said]
    assert not write_plot(results, tmp_path / "gpu.png")


def test_a_network_and_a_form_that_failed_are_said() -> None:
    results = copy.deepcopy(RESULTS)
    results["problems"] = {"swin-t": "TargetError: out of memory"}
    results["networks"]["deit-s"]["problems"] = {"minmax w4a4": "ValueError: no kernel"}
    text = markdown(results)
    assert "- Swin-T: TargetError: out of memory\n- DeiT-S, minmax w4a4: ValueError: no kernel\n" in text
    assert "| DeiT-S | 1, 97 | equal | **failed** |" in text
    assert failures(results["networks"], results["problems"]) == [
        "Swin-T: TargetError: out of memory",
        "DeiT-S, minmax w4a4: ValueError: no kernel",
    ]


def test_the_plot_is_a_png_with_any_number_of_cells(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    cells = results["networks"]["deit-s"]["cells"]
    results["networks"]["other"] = {"title": "Other", "cells": [cells[0], copy.deepcopy(cells[0])]}
    assert write_plot(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_taken_to_the_form_that_the_processors_are_compared_in() -> None:
    assert baseline_of(DEFAULT_FORMS) == BASELINE == "minmax w8a8"
    assert baseline_of(("ivit w8a8", "minmax w4a4")) == "ivit w8a8"
    assert max(len(form_title(form)) for form in DEFAULT_FORMS) <= 30
