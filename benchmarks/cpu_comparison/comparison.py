"""Compare the engines on one network: prepare its files, then one cell for each batch and number of threads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .engines import ENGINES, OURS, steps_of
from .files import Files
from .networks import NETWORKS
from .processes import Worker, WorkerError, ask_undisturbed, environment, start_engine, take_rounds
from .ratios import ratios, round_values, spread

FOOTPRINT_STARTS = 5
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare.

    Args:
        engines: keys of :data:`.engines.ENGINES`.
        batches: images in a call.
        threads: numbers of worker threads.
        rounds: turns of each engine in a cell.
        warm_ms: see :func:`.turn.take_turn`.
        time_ms: likewise.
        autotune: let torch.compile try several kernels.
    """

    engines: tuple[str, ...]
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    rounds: int
    warm_ms: float = 20.0
    time_ms: float = 100.0
    autotune: bool = False


def compare_network(network: str, plan: Plan, work: Path, say: Say) -> dict[str, Any]:
    """Compare all engines of a plan on a network.

    Args:
        network: a key of :data:`.networks.NETWORKS`.
        plan: what to compare.
        work: an existing folder for files.
        say: called with one line when something is done.

    Returns:
        ``preparation``, ``sizes``, ``cells``, and for our engine ``footprint`` and ``scaling``; plain values.
    """
    files = Files(work / network)
    files.folder.mkdir()
    preparation = _prepare(network, plan, files)
    seconds = ", ".join(f"{step} {value:.1f} s" for step, value in preparation["seconds"].items())
    say(f"{NETWORKS[network].title}: prepared: {seconds}")
    for step, reason in preparation["problems"].items():
        say(f"{NETWORKS[network].title}: {step} could not be made: {reason}")
    result: dict[str, Any] = {
        "title": NETWORKS[network].title,
        "preparation": preparation,
        "sizes": files.sizes(),
        "cells": [],
    }
    for batch in plan.batches:
        for threads in plan.threads:
            cell = compare_cell(network, plan, files, preparation["problems"], batch, threads)
            result["cells"].append(cell)
            say(describe_cell(NETWORKS[network].title, cell))
    if OURS in plan.engines and files.bundle.exists():
        result["footprint"] = [
            {"threads": threads, **_footprint(files, plan.batches[0], threads)} for threads in plan.threads
        ]
        result["scaling"] = [_scaling(network, plan, files, batch) for batch in plan.batches if len(plan.threads) > 1]
    return result


def compare_cell(
    network: str, plan: Plan, files: Files, problems: dict[str, str], batch: int, threads: int
) -> dict[str, Any]:
    """Compare the engines at one batch size and number of threads.

    Args:
        network: a key of :data:`.networks.NETWORKS`.
        plan: what to compare.
        files: prepared.
        problems: of the preparation, step to reason.
        batch: images in a call.
        threads: worker threads.

    Returns:
        ``engines``: for each its ``status`` (``timed``, ``skipped`` or ``failed``), with a ``reason`` or with
        ``turns``, ``ms`` and, where ours is timed, ``ratio``, its time over ours; and ``kernels`` of ours.
    """
    cell: dict[str, Any] = {"batch": batch, "threads": threads, "engines": {}}
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name in plan.engines:
            worker, state = _start(name, network, files, batch, threads, plan.autotune)
            step = ENGINES[name].step
            if state["status"] == "skipped" and step in problems:
                state["reason"] += f": {problems[step]}"
            # Ours has no excuse.
            if state["status"] == "skipped" and ENGINES[name].exact:
                state["status"] = "failed"
            cell["engines"][name] = state
            if worker is not None:
                stack.callback(worker.stop)
                workers.append(worker)
        turns = take_rounds(workers, plan.rounds, plan.warm_ms, plan.time_ms)
        for worker in workers:
            if worker.name == OURS:
                cell["kernels"] = _profile(worker, workers, plan.rounds)
    for name, rounds in turns.items():
        cell["engines"][name].update(turns=rounds, ms=spread(round_values(rounds)).to_dict())
    if OURS in turns:
        ours = round_values(turns[OURS])
        for name, rounds in turns.items():
            cell["engines"][name]["ratio"] = spread(ratios(round_values(rounds), ours)).to_dict()
    return cell


def cell_title(title: str, cell: dict[str, Any]) -> str:
    """Return what people call a cell of a network."""
    return f"{title}, batch {cell['batch']}, {cell['threads']} thread{'s' if cell['threads'] > 1 else ''}"


def describe_cell(title: str, cell: dict[str, Any]) -> str:
    """Return lines for people: each engine of a cell with its time, or why it has none."""
    lines = [f"{cell_title(title, cell)}:"]
    for name, state in cell["engines"].items():
        text = f"  {ENGINES[name].title:30s} "
        if state["status"] == "timed":
            text += f"{state['ms']['median']:9.2f} ms"
            text += f"  {state['ratio']['median']:5.2f} times ours" if "ratio" in state else ""
        else:
            text += f"{state['status']}: {state['reason']}"
        lines.append(text)
    return "\n".join(lines)


def _prepare(network: str, plan: Plan, files: Files) -> dict[str, Any]:
    arguments = {
        "network": network,
        "folder": str(files.folder),
        "images": max(plan.batches),
        "steps": steps_of(plan.engines),
    }
    command = [sys.executable, "-m", "cpu_comparison.prepare", json.dumps(arguments)]
    # Nothing is timed to the millisecond here, and threads that spin crawl on a machine that does other work as well.
    env = environment(max(plan.threads), files.folder.parent / "inductor") | {"OMP_WAIT_POLICY": "passive"}
    worker = Worker(f"preparing {network}", command, env, files.folder / "prepare.log")
    worker.stop()
    return worker.first


def _start(
    name: str, network: str, files: Files, batch: int, threads: int, autotune: bool, label: str = ""
) -> tuple[Worker | None, dict[str, Any]]:
    try:
        worker = start_engine(name, network, files.folder, batch, threads, autotune, label)
    except WorkerError as error:
        return None, {"status": "failed" if ENGINES[name].exact else "skipped", "reason": str(error)}
    message = dict(worker.first)
    event = message.pop("event")
    if event == "ready":
        return worker, {"status": "timed", **message}
    worker.stop()
    return None, {"status": event, **message}


def _profile(worker: Worker, workers: Sequence[Worker], rounds: int) -> dict[str, Any]:
    try:
        return ask_undisturbed(worker, workers, {"event": "profile", "rounds": rounds})
    except WorkerError as error:
        return {"problem": str(error)}


def _footprint(files: Files, batch: int, threads: int) -> dict[str, Any]:
    """Median over several fresh processes; the first of them is not counted, it may find cold files."""
    samples = []
    for _ in range(1 + FOOTPRINT_STARTS):
        arguments = {
            "bundle": str(files.bundle),
            "images": str(files.images),
            "batch": batch,
            "threads": threads,
            "spawned": time.monotonic(),
        }
        command = [sys.executable, "-m", "cpu_comparison.footprint", json.dumps(arguments)]
        env = environment(threads, files.folder.parent / "inductor")
        # The command is this project's own.
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            return {"problem": (done.stderr.splitlines() or ["no message"])[-1]}
        samples.append(json.loads(done.stdout))
    return {key: float(np.median([sample[key] for sample in samples[1:]])) for key in samples[0]} | {"batch": batch}


def _scaling(network: str, plan: Plan, files: Files, batch: int) -> dict[str, Any]:
    """Time ours with the fewest and the most threads in the same rounds."""
    fewest, most = min(plan.threads), max(plan.threads)
    with ExitStack() as stack:
        workers = []
        for threads in (fewest, most):
            worker, state = _start(OURS, network, files, batch, threads, autotune=False, label=str(threads))
            if worker is None:
                return {"batch": batch, "problem": state["reason"]}
            stack.callback(worker.stop)
            workers.append(worker)
        turns = take_rounds(workers, plan.rounds, plan.warm_ms, plan.time_ms)
    faster = ratios(round_values(turns[str(fewest)]), round_values(turns[str(most)]))
    return {"batch": batch, "threads": [fewest, most], "faster": spread(faster).to_dict(), "turns": turns}
