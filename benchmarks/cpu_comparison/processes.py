"""The parent's side: start the process of an engine, and let engines take turns while nothing else computes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .processor_time import others_seconds, spent, wait_until_idle

ROOT = Path(__file__).resolve().parents[2]
#: A turn during which other processes used more of a processor than this is repeated, a few times at most.
MOST_FOREIGN_LOAD = 0.05
#: And so is one in which the engine got that much less than it got before: processes that came and went within a
#: turn are not seen otherwise.
MOST_STARVED = 0.15
MOST_REPEATS = 4
#: A worker that has not answered by then hangs: the slowest compiler took two minutes, a turn takes seconds.
LONGEST_ANSWER_S = 900.0


def environment(threads: int, cache: Path) -> dict[str, str]:
    """Return the environment of a worker.

    Args:
        threads: for engines that read it from there.
        cache: where torch.compile keeps what it compiled.
    """
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        # No engine reports its use, and none asks a hub.
        "NNCF_CI": "1",
        "CI": "true",
        "HF_HUB_OFFLINE": "1",
    }


class WorkerError(Exception):
    """A worker died, or said something that it should not; the message holds the end of its log."""


class Worker:
    """The process of one engine.

    Args:
        name: key of the engine, for messages.
        command: what to run.
        env: its environment.
        log: file for what it prints; the worker's own protocol goes elsewhere.
        longest_s: for each of its answers, after which it is killed.

    Raises:
        WorkerError: it does not come up.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        longest_s: float = LONGEST_ANSWER_S,
    ) -> None:
        self.name = name
        self._log, self._longest_s = log, longest_s
        with log.open("w", encoding="utf-8") as errors:
            # The command is this project's own.
            self._process = subprocess.Popen(  # noqa: S603
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.process_id = self._process.pid
        self.most_busy = 0.0
        self.first = self._receive()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command and return the reply.

        Raises:
            WorkerError: there is none.
        """
        assert self._process.stdin is not None
        # A worker that is gone is noticed when it does not answer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # Killing it closes the pipe, and reading ends.
        limit = threading.Timer(self._longest_s, self._process.kill)
        limit.start()
        try:
            line = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not line:
            self.stop()
            code = self._process.returncode
            end = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            raise WorkerError(f"{self.name}: the worker ended with exit code {code}; its last lines:\n{end}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def start_engine(
    engine: str, network: str, folder: Path, batch: int, threads: int, autotune: bool, label: str = ""
) -> Worker:
    """Start the worker of an engine and wait for its first message; see :mod:`.worker`."""
    arguments = {
        "engine": engine,
        "network": network,
        "folder": str(folder),
        "batch": batch,
        "threads": threads,
        "autotune": autotune,
    }
    command = [sys.executable, "-m", "cpu_comparison.worker", json.dumps(arguments)]
    log = folder / f"{engine}-{batch}-{threads}.log"
    return Worker(label or engine, command, environment(threads, folder.parent / "inductor"), log)


def take_rounds(
    workers: Sequence[Worker], rounds: int, warm_ms: float, time_ms: float
) -> dict[str, list[dict[str, Any]]]:
    """Let each worker take one turn a round, in another order each round.

    Before a turn the processes of all other workers have come to rest. A turn during which processes outside the
    comparison were busy is repeated, and the least disturbed one is kept.

    Returns:
        For each worker's name one turn a round: ``ms``, ``busy``, ``foreign`` (processors used by others) and
        ``settled_ms`` (how long the turn before went on using the processor) and ``starved`` (how many processors
        less than in its best turn the engine had).
    """
    message = {"event": "turn", "warm_ms": warm_ms, "time_ms": time_ms}
    turns: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    for _ in range(rounds):
        for worker in order.sample(list(workers), len(workers)):
            turns[worker.name].append(ask_undisturbed(worker, workers, message))
    return turns


def ask_undisturbed(worker: Worker, workers: Sequence[Worker], message: Mapping[str, Any]) -> dict[str, Any]:
    """Send a command once all workers have come to rest, and again where other processes disturbed it.

    Args:
        worker: whom to ask.
        workers: all, the asked one included.
        message: the command.

    Returns:
        The reply to the least disturbed one, with ``foreign``, ``settled_ms`` and ``starved`` as in
        :func:`take_rounds`.

    Raises:
        WorkerError: there is none.
    """
    best: dict[str, Any] = {}
    for _ in range(1 + MOST_REPEATS):
        settled = wait_until_idle([other.process_id for other in workers])
        own = frozenset({worker.process_id, os.getpid()})
        before, started = others_seconds(own), time.perf_counter()
        reply = worker.ask(message)
        foreign = spent(before, others_seconds(own)) / (time.perf_counter() - started)
        busy = reply.get("busy", worker.most_busy)
        worker.most_busy = max(worker.most_busy, busy)
        reply.update(foreign=foreign, settled_ms=1000 * settled, starved=worker.most_busy - busy)
        del reply["event"]
        if not best or foreign + reply["starved"] < best["foreign"] + best["starved"]:
            best = reply
        if not is_disturbed(reply):
            break
    return best


def is_disturbed(turn: Mapping[str, Any]) -> bool:
    """Tell whether other processes took part of the machine during a turn or a profile."""
    return bool(turn["foreign"] > MOST_FOREIGN_LOAD or turn["starved"] > MOST_STARVED)
