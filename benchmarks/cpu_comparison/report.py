"""Markdown for people, from the results that the JSON file holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .comparison import cell_title
from .engines import ENGINES, OURS
from .kernels import by_kind, floor_ms
from .processes import is_disturbed

#: Share of disturbed turns from which on a reader has to know.
WORTH_A_WARNING = 0.1
#: No kernel is faster than the peak, but for noise.
MOST_CREDIBLE = 1.05


def markdown(results: dict[str, Any]) -> str:
    """Return all tables.

    Args:
        results: what :file:`cpu.json` holds.
    """
    machine, settings = results["machine"], results["settings"]
    networks: dict[str, dict[str, Any]] = results["networks"]
    where = (
        f"{machine['processor']} ({', '.join(_vector_units(machine['flags']))}), {machine['usable_processors']} cores, "
        f"{machine['date'][:10]}, {settings['rounds']} interleaved rounds; {_versions(networks)}."
    )
    parts = [
        where,
        "Milliseconds a call, in brackets the median ratio to ours in the same round.",
        times_table(networks, settings["engines"]),
    ]
    parts += [text for text in (disturbances(networks), faster_peers(networks), left_out(networks)) if text]
    if OURS in settings["engines"]:
        parts.append(footprint_table(networks))
        parts += [text for text in kernel_tables(networks) if text]
    return "\n\n".join(parts) + "\n"


def times_table(networks: dict[str, dict[str, Any]], engines: Sequence[str]) -> str:
    """Return one row for each network, batch and number of threads, and one column for each engine."""
    rows = []
    for network in networks.values():
        for cell in network["cells"]:
            row = [network["title"], str(cell["batch"]), str(cell["threads"])]
            rows.append(row + [_time(engine, cell["engines"][engine]) for engine in engines])
    return table(["network", "batch", "threads", *(ENGINES[engine].title for engine in engines)], rows)


def disturbances(networks: dict[str, dict[str, Any]]) -> str:
    """Return the cells in which other processes kept disturbing turns; empty if the machine was quiet."""
    lines = []
    for network in networks.values():
        for cell in network["cells"]:
            turns = [turn for state in cell["engines"].values() for turn in state.get("turns", [])]
            loud = [max(turn["foreign"], turn["starved"]) for turn in turns if is_disturbed(turn)]
            if len(loud) > WORTH_A_WARNING * len(turns):
                lines.append(
                    f"- {cell_title(network['title'], cell)}: {len(loud)} of {len(turns)} turns, during which others "
                    f"used {sum(loud) / len(loud):.2f} processors on average"
                )
    head = "**Other processes kept this machine busy; do not trust these cells:**"
    return "\n".join([head, "", *lines]) if lines else ""


def faster_peers(networks: dict[str, dict[str, Any]]) -> str:
    """Return the cells in which another engine is faster than ours, and by how much; empty if there is none."""
    where: dict[str, list[str]] = {}
    for title, cell, engine, state in _states(networks):
        if engine != OURS and "ratio" in state and state["ratio"]["median"] < 1:
            ratio = f"{state['ratio']['median']:.2f} ({state['ratio']['p10']:.2f} to {state['ratio']['p90']:.2f})"
            cells = where.setdefault(cell_title(title, cell), [])
            cells.append(f"{ENGINES[engine].title} {ratio}")
    lines = [f"- {cell}: {', '.join(peers)}" for cell, peers in where.items()]
    return "\n".join(["Another engine is faster; its time over ours:", "", *lines]) if lines else ""


def left_out(networks: dict[str, dict[str, Any]]) -> str:
    """Return why engines have no time, each reason once; empty if all have one."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for title, cell, engine, state in _states(networks):
        if state["status"] != "timed":
            place = f"{title} {cell['batch']}/{cell['threads']}"
            where.setdefault((ENGINES[engine].title, state["status"], state["reason"]), []).append(place)
    lines = [
        f"- {engine}: {status}: {_brief(reason)} ({', '.join(places)})"
        for (engine, status, reason), places in where.items()
    ]
    return "\n".join(["Without a time (network batch/threads):", "", *lines]) if lines else ""


def footprint_table(networks: dict[str, dict[str, Any]]) -> str:
    """Return what building, loading and running our engine costs, a row for each network."""
    rows = []
    for network in networks.values():
        seconds = network["preparation"]["seconds"]
        measured = [entry for entry in network.get("footprint", []) if "problem" not in entry]
        best = max(measured, key=lambda entry: entry["threads"], default=None)
        scaling = [
            f"{entry['faster']['median']:.2f} (batch {entry['batch']})"
            for entry in network.get("scaling", [])
            if "faster" in entry
        ]
        sizes = network["sizes"]
        rows.append(
            [
                network["title"],
                f"{seconds['bundle']:.1f}" if "bundle" in seconds else "-",
                f"{best['first_answer_s']:.2f} ({best['load_and_answer_s']:.2f})" if best else "-",
                f"{best['rss_mb']:.0f} ({best['peak_mb']:.0f})" if best else "-",
                *(_megabytes(sizes.get(key)) for key in ("ours", "int8 ONNX", "OpenVINO NNCF", "float ONNX")),
                ", ".join(scaling) or "-",
            ]
        )
    threads = sorted({thread for network in networks.values() for thread in _threads(network)})
    return table(
        [
            "vit-ptq",
            "build, s",
            "process start to first answer, s (without imports)",
            "memory, MB (peak)",
            "bundle, MB",
            "int8 ONNX, MB",
            "NNCF, MB",
            "float ONNX, MB",
            f"{threads[-1]} threads are faster than {threads[0]} by" if len(threads) > 1 else "scaling",
        ],
        rows,
    )


def kernel_tables(networks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table of kernel kinds for each cell, or one line where there is no profile."""
    problems = set()
    for network in networks.values():
        for cell in network["cells"]:
            profile = cell.get("kernels")
            if profile is None:
                continue
            if "problem" in profile:
                problems.add(_brief(profile["problem"]))
                continue
            yield _kernel_table(network["title"], cell, profile)
    yield from (f"No kernel table: {problem}." for problem in sorted(problems))


def _kernel_table(title: str, cell: dict[str, Any], profile: dict[str, Any]) -> str:
    kinds = by_kind(profile["kernels"], profile["peak"])
    rows = [
        [
            kind.kernel,
            str(kind.calls),
            f"{kind.ms:.3f}",
            f"{100 * kind.share:.1f} %",
            f"{kind.macs / 1e6:.0f}" if kind.macs else "",
            f"{100 * kind.of_peak:.0f} %" if kind.macs else "",
        ]
        for kind in kinds
    ]
    floor = floor_ms(profile["kernels"], profile["peak"])
    whole = cell["engines"][OURS]["ms"]["median"]
    summary = (
        f"{cell_title(title, cell)}: {whole:.2f} ms, "
        f"**{whole / floor:.2f} times the floor** of {floor:.2f} ms that its matrix products take at the int8 peak "
        f"measured in the same process, {profile['peak'] / 1e12:.3f} T multiply-adds a second "
        f"(kernels alone: {sum(kind.ms for kind in kinds):.2f} ms)."
    )
    if any(kind.of_peak > MOST_CREDIBLE for kind in kinds):
        summary += " **Kernels above the peak: it was measured too low, do not trust the floor.**"
    if is_disturbed(profile):
        summary += f" **Disturbed: other processes used {profile['foreign']:.2f} processors meanwhile.**"
    header = ["kernel", "calls", "ms", "share", "M multiply-adds", "of int8 peak"]
    return f"{summary}\n\n{table(header, rows)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _brief(message: str) -> str:
    """First line, and of a worker's log the last, which is what the exception said."""
    first, *rest = message.splitlines() or [""]
    return f"{first} {rest[-1]}" if rest else first


def _time(engine: str, state: dict[str, Any]) -> str:
    if state["status"] != "timed":
        return str(state["status"])
    ms = f"{state['ms']['median']:.2f}"
    if engine == OURS:
        return f"**{ms}**"
    return f"{ms} ({state['ratio']['median']:.2f})" if "ratio" in state else ms


def _states(networks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    for network in networks.values():
        for cell in network["cells"]:
            for engine, state in cell["engines"].items():
                yield network["title"], cell, engine, state


def _threads(network: dict[str, Any]) -> list[int]:
    return [cell["threads"] for cell in network["cells"]]


def _vector_units(flags: Sequence[str]) -> list[str]:
    known = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "avx512f", "avx2", "i8mm", "asimddp")
    return [flag for flag in known if flag in flags] or ["no vector unit known"]


def _versions(networks: dict[str, dict[str, Any]]) -> str:
    found: dict[str, str] = {}
    for _, _, _, state in _states(networks):
        found.update(state.get("versions", {}))
    return ", ".join(f"{package} {version}" for package, version in sorted(found.items()))


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"
