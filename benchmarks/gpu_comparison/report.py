"""Markdown for people, and the bars, from the results that the JSON file holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_comparison.networks import NETWORKS
from cpu_comparison.plot import FLOAT_COLOUR, INTEGER_COLOUR, OURS_COLOUR, Bar, Panel, draw
from cpu_comparison.report import table

from .ceilings import Ceilings, by_kind
from .comparison import cell_title
from .correctness import Difference

#: No kernel is faster than the ceilings, but for noise and for caches.
MOST_CREDIBLE = 1.05


def markdown(results: dict[str, Any]) -> str:
    """Return all tables.

    Args:
        results: what :file:`gpu.json` holds.
    """
    networks: dict[str, dict[str, Any]] = results["networks"]
    parts = [_where(results), *_problems(results), checks_table(results)]
    if any("cells" in network for network in networks.values()):
        baseline = results["titles"][results["settings"]["baseline"]]
        parts.append(
            f"Milliseconds a run by the device's clock, all engines as CUDA graphs, in brackets the median ratio to "
            f"{baseline} in the same round."
        )
        parts.append(times_table(results))
        parts += [text for text in (faster_peers(results), left_out(results)) if text]
        parts += list(kernel_tables(results))
    return "\n\n".join(parts) + "\n"


def _where(results: dict[str, Any]) -> str:
    device, settings = results["device"], results["settings"]
    versions = ", ".join(f"{package} {version}" for package, version in device["versions"].items())
    return (
        f"{device['name']} ({device['architecture']}, {device['multiprocessors']} multiprocessors), driver for CUDA "
        f"{device['driver']}, nvcc {device['toolkit']}, {results['machine']['date'][:10]}, {settings['rounds']} "
        f"interleaved rounds; {versions}."
    )


def _problems(results: dict[str, Any]) -> list[str]:
    lines = [f"- {NETWORKS[name].title}: {problem}" for name, problem in results["problems"].items()]
    for network in results["networks"].values():
        lines += [f"- {network['title']}, {form}: {problem}" for form, problem in network["problems"].items()]
        lines += [f"- {network['title']}, {Difference(**difference)}" for difference in network["differences"]]
    return ["\n".join(["**Wrong or missing, and therefore not timed:**", "", *lines])] if lines else []


def checks_table(results: dict[str, Any]) -> str:
    """Return a row for each network, and for each form whether it equals the interpreter."""
    forms = results["settings"]["forms"]
    rows = []
    for network in results["networks"].values():
        wrong = {difference["form"] for difference in network["differences"]}
        batches = ", ".join(map(str, network["checked"]))
        words = dict.fromkeys(wrong, "**differs**") | dict.fromkeys(network["problems"], "**failed**")
        rows.append([network["title"], batches, *(words.get(form, "equal") for form in forms)])
    return table(["in every bit", "batches", *forms], rows)


def times_table(results: dict[str, Any]) -> str:
    """Return one row for each network and batch, and one column for each engine."""
    titles, baseline = results["titles"], results["settings"]["baseline"]
    rows = [
        [network["title"], str(cell["batch"]), *(_time(cell["engines"][name], name == baseline) for name in titles)]
        for network, cell in _cells(results)
    ]
    return table(["network", "batch", *titles.values()], rows)


def _time(state: dict[str, Any], reference: bool) -> str:
    if state["status"] != "timed":
        return str(state["status"])
    ms = f"{state['ms']['median']:.3f}"
    return f"**{ms}**" if reference else f"{ms} ({state['ratio']['median']:.2f})"


def faster_peers(results: dict[str, Any]) -> str:
    """Return the cells in which a peer is faster than the baseline, and by how much; empty if there is none."""
    lines = []
    for network, cell in _cells(results):
        found = [
            f"{results['titles'][name]} {ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
            for name, state in cell["engines"].items()
            if name in results["settings"]["engines"] and (ratio := state.get("ratio")) and ratio["median"] < 1
        ]
        lines += [f"- {cell_title(network['title'], cell)}: {', '.join(found)}"] if found else []
    return "\n".join(["A peer is faster; its time over ours:", "", *lines]) if lines else ""


def left_out(results: dict[str, Any]) -> str:
    """Return why engines have no time, each reason once; empty if all have one."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for network, cell in _cells(results):
        for name, state in cell["engines"].items():
            if state["status"] != "timed":
                key = (results["titles"][name], state["status"], state["reason"])
                where.setdefault(key, []).append(f"{network['title']} {cell['batch']}")
    lines = [f"- {': '.join(key)} ({', '.join(places)})" for key, places in where.items()]
    return "\n".join(["Without a time (network batch):", "", *lines]) if lines else ""


def kernel_tables(results: dict[str, Any]) -> Iterator[str]:
    """Yield a table of kernel kinds for each network and batch, of the baseline; other forms are in the JSON file."""
    baseline = results["settings"]["baseline"]
    for network in results["networks"].values():
        for profile in network.get("kernels", []):
            if profile["form"] == baseline:
                yield _kernel_table(network, profile, results["titles"][baseline])


def _kernel_table(network: dict[str, Any], profile: dict[str, Any], title: str) -> str:
    ceilings = Ceilings(**network["ceilings"])
    kinds = by_kind(profile["kernels"], ceilings)
    alone = sum(kind.ms for kind in kinds)
    floor = sum(kind.of_roofline * kind.ms for kind in kinds)
    summary = (
        f"{cell_title(network['title'], profile)}, {title}: kernels alone {alone:.3f} ms, the roofline allows "
        f"{floor:.3f} ms: {ceilings.macs / 1e12:.1f} T multiply-adds a second of int8 (mma.sync) and "
        f"{ceilings.bandwidth / 1e9:.0f} GB/s, both measured in the same run."
    )
    if any(kind.of_roofline > MOST_CREDIBLE for kind in kinds):
        summary += " Above 100 %: a kernel runs several times in a row here, so what fits the cache is not read."
    rows = [
        [
            kind.kernel,
            str(kind.calls),
            f"{kind.ms:.4f}",
            f"{100 * kind.share:.1f} %",
            f"{kind.macs / 1e6:.0f}" if kind.macs else "",
            f"{kind.size / 1e6:.2f}",
            f"{100 * kind.of_roofline:.0f} %",
        ]
        for kind in kinds
    ]
    header = ["kernel", "calls", "ms", "share", "M multiply-adds", "MB", "of roofline"]
    return f"{summary}\n\n{table(header, rows)}"


def write_plot(results: dict[str, Any], path: Path) -> bool:
    """Write a PNG with a panel for each network and batch; return whether anything was timed that it could show.

    Args:
        results: what :file:`gpu.json` holds.
        path: the picture; one that exists is replaced.
    """
    settings = results["settings"]
    bars = {
        name: Bar(title, _colour(name, settings), name == settings["baseline"])
        for name, title in results["titles"].items()
    }
    rows = [
        [Panel(cell_title(network["title"], cell), cell["engines"]) for cell in network["cells"]]
        for network in results["networks"].values()
        if network.get("cells")
    ]
    if rows:
        device = results["device"]
        draw(rows, bars, f"{device['name']}, {results['machine']['date'][:10]}", path, digits=3)
    return bool(rows)


def _colour(name: str, settings: dict[str, Any]) -> str:
    if name in settings["forms"]:
        return OURS_COLOUR
    return INTEGER_COLOUR if name in settings["integer_engines"] else FLOAT_COLOUR


def _cells(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for network in results["networks"].values():
        for cell in network.get("cells", []):
            yield network, cell
