"""The tables and the plot, from made-up results, and the options of the script."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cpu
import pytest
from click.testing import CliRunner
from cpu_comparison.engines import ENGINES, OURS
from cpu_comparison.kernels import by_kind, floor_ms
from cpu_comparison.plot import write_plot
from cpu_comparison.report import markdown, table

KERNELS = [
    {"kernel": "linear", "shape": "197x384 -> 197x384", "calls": 2, "macs": 60_000_000, "median_ms": 1.0},
    {"kernel": "linear", "shape": "197x384 -> 197x1536", "calls": 1, "macs": 40_000_000, "median_ms": 1.0},
    {"kernel": "norm", "shape": "197x384 -> 197x384", "calls": 4, "macs": 0, "median_ms": 2.0},
]


def timed(ms: float, ratio: float | None = None, **more: object) -> dict[str, Any]:
    state: dict[str, Any] = {"status": "timed", "ms": {"median": ms, "p10": ms - 0.1, "p90": ms + 0.1}, **more}
    if ratio is not None:
        state["ratio"] = {"median": ratio, "p10": ratio - 0.01, "p90": ratio + 0.01}
    return state


RESULTS: dict[str, Any] = {
    "machine": {
        "processor": "Some CPU",
        "flags": ["avx2", "avx512_vnni"],
        "usable_processors": 2,
        "date": "2030-01-02T03:04:05+00:00",
    },
    "settings": {"rounds": 7, "engines": [OURS, "openvino-nncf", "torch-int8", "torch-fp32"]},
    "networks": {
        "deit-s": {
            "title": "DeiT-S",
            "preparation": {"seconds": {"bundle": 5.125}, "problems": {}},
            "sizes": {"ours": 44_000_000, "float ONNX": 88_000_000},
            "cells": [
                {
                    "batch": 1,
                    "threads": 2,
                    "engines": {
                        OURS: timed(4.0, 1.0, versions={"apache-tvm": "1"}),
                        "openvino-nncf": timed(3.6, 0.9, versions={"openvino": "2"}),
                        "torch-int8": {
                            "status": "skipped",
                            "reason": "the worker ended; its last lines:\nTraceback\nOSError: no compiler",
                        },
                        "torch-fp32": timed(40.0, 10.0),
                    },
                    "kernels": {"kernels": KERNELS, "peak": 1e11, "foreign": 0.0, "starved": 0.0},
                }
            ],
            "footprint": [
                {
                    "threads": 2,
                    "batch": 1,
                    "start_s": 0.1,
                    "first_answer_s": 0.75,
                    "load_and_answer_s": 0.25,
                    "rss_mb": 120.4,
                    "peak_mb": 130.0,
                }
            ],
            "scaling": [{"batch": 1, "threads": [1, 2], "faster": {"median": 1.85, "p10": 1.8, "p90": 1.9}}],
        }
    },
}


def test_times_are_a_row_for_each_cell() -> None:
    text = markdown(RESULTS)
    assert "| network | batch | threads | vit-ptq int8 | OpenVINO int8 (NNCF) |" in text
    assert "| DeiT-S | 1 | 2 | **4.00** | 3.60 (0.90) | skipped | 40.00 (10.00) |" in text
    assert "Some CPU (avx512_vnni, avx2), 2 cores, 2030-01-02, 7 interleaved rounds; apache-tvm 1, openvino 2." in text


def test_a_peer_that_is_faster_is_listed_and_so_is_one_without_a_time() -> None:
    text = markdown(RESULTS)
    assert "- DeiT-S, batch 1, 2 threads: OpenVINO int8 (NNCF) 0.90 (0.89 to 0.91)\n" in text
    assert (
        "- torch.compile int8 (torchao): skipped: the worker ended; its last lines: OSError: no compiler (DeiT-S 1/2)"
        in text
    )


def test_nothing_is_listed_where_ours_is_ahead_and_all_were_timed() -> None:
    results = copy.deepcopy(RESULTS)
    engines = results["networks"]["deit-s"]["cells"][0]["engines"]
    engines["openvino-nncf"] = timed(8.0, 2.0)
    engines["torch-int8"] = timed(12.0, 3.0)
    text = markdown(results)
    assert "faster;" not in text
    assert "Without a time" not in text


def test_a_busy_machine_is_said_before_anything_else() -> None:
    results = copy.deepcopy(RESULTS)
    ours = results["networks"]["deit-s"]["cells"][0]["engines"][OURS]
    ours["turns"] = [{"foreign": 0.01, "starved": 0.1}] * 18 + [
        {"foreign": 0.4, "starved": 0},
        {"foreign": 0, "starved": 0.6},
    ]
    assert "do not trust" not in markdown(results)
    ours["turns"].append({"foreign": 0.5, "starved": 0})
    text = markdown(results)
    assert "- DeiT-S, batch 1, 2 threads: 3 of 21 turns, during which others used 0.50 processors on average" in text
    assert text.index("do not trust") < text.index("Another engine is faster")


def test_the_kernels_have_shares_and_a_floor() -> None:
    linear, norm = sorted(by_kind(KERNELS, 1e11), key=lambda kind: kind.kernel)
    assert (linear.calls, linear.ms, linear.share) == (3, 2.0, 0.5)
    assert linear.of_peak == pytest.approx(0.5)
    assert (norm.ms, norm.macs, norm.of_peak) == (2.0, 0, 0)
    assert floor_ms(KERNELS, 1e11) == pytest.approx(1.0)
    text = markdown(RESULTS)
    assert "DeiT-S, batch 1, 2 threads: 4.00 ms, **4.00 times the floor** of 1.00 ms" in text
    assert "| linear | 3 | 2.000 | 50.0 % | 100 | 50 % |" in text
    assert "| norm | 4 | 2.000 | 50.0 % |  |  |" in text


def test_a_peak_below_the_kernels_is_not_credible() -> None:
    results = copy.deepcopy(RESULTS)
    assert "do not trust the floor" not in markdown(results)
    results["networks"]["deit-s"]["cells"][0]["kernels"]["peak"] = 4e10
    assert "it was measured too low, do not trust the floor" in markdown(results)


def test_why_there_is_no_kernel_table_is_said_once() -> None:
    results = copy.deepcopy(RESULTS)
    cells = results["networks"]["deit-s"]["cells"]
    cells[0]["kernels"] = {"problem": "no profile"}
    cells.append(copy.deepcopy(cells[0]))
    assert markdown(results).count("No kernel table: no profile.") == 1


def test_what_ours_costs_beside_time() -> None:
    row = "| DeiT-S | 5.1 | 0.75 (0.25) | 120 (130) | 44.0 | - | - | 88.0 | 1.85 (batch 1) |"
    assert row in markdown(RESULTS)


def test_tables() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_plot_is_a_png_with_any_number_of_cells(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    cells = results["networks"]["deit-s"]["cells"]
    results["networks"]["other"] = {"title": "Other", "cells": [cells[0], copy.deepcopy(cells[0])]}
    write_plot(results, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "ours,tensorrt"], "unknown: tensorrt; known are: ours, openvino-nncf"),
        (["--networks", "resnet"], "unknown: resnet; known are: deit-t"),
        (["--threads", "4096"], "4096 is more than the"),
        (["--batches", "1,x"], "'1,x', expected positive numbers"),
        (["--batches", "0"], "'0', expected positive numbers"),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cpu.main, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_titles_fit_a_legend() -> None:
    assert len({engine.title for engine in ENGINES.values()}) == len(ENGINES)
    assert max(len(engine.title) for engine in ENGINES.values()) <= 30
