"""The process of one engine: it loads, checks the answer, and then takes turns when told to.

Lines of JSON come in on standard input and go out on standard output; what libraries print goes to standard
error. The first line out is ``ready``, ``skipped`` or ``failed``; then each ``turn`` that comes in is answered by
a ``turn``, each ``profile`` by a ``profile``; the end of the input ends the process.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .engines import ENGINES, Array, Loaded, SkipEngineError, Task, load_engine
from .files import Files
from .protocol import protect_standard_output, send
from .similarity import cosine
from .turn import take_turn


class WrongAnswerError(Exception):
    """The engine answers, but not what it has to."""


def check_answer(answer: Array, files: Files, name: str) -> dict[str, Any]:
    """Compare an answer with the interpreter's, where it has to be equal, and with the float network's.

    Args:
        answer: float32 (batch, outputs) for the first images of ``files.images``.
        files: of the network.
        name: key of the engine.

    Returns:
        ``cosine``: the mean similarity with torch's float answers; ``equal``: where bits are compared.

    Raises:
        WrongAnswerError: an answer that no engine of that kind may give.
    """
    engine = ENGINES[name]
    expected: npt.NDArray[np.float32] = np.load(files.float_outputs)[: len(answer)]
    found: dict[str, Any] = {"cosine": None}
    if answer.shape != expected.shape:
        raise WrongAnswerError(f"{engine.title}: answered {answer.shape}, expected {expected.shape}")
    if engine.exact:
        integers: npt.NDArray[np.float32] = np.load(files.integer_outputs)[: len(answer)]
        different = int(np.count_nonzero(answer.view(np.uint32) != integers.view(np.uint32)))
        if different:
            raise WrongAnswerError(
                f"{engine.title}: {different} of {answer.size} outputs differ from the interpreter's; "
                "nothing is timed until they are equal"
            )
        found["equal"] = True
    found["cosine"] = cosine(answer, expected)
    if not found["cosine"] >= engine.least_cosine:
        raise WrongAnswerError(
            f"{engine.title}: answers have a cosine of {found['cosine']:.4f} with the float network's, "
            f"expected at least {engine.least_cosine}: it does not run the same network"
        )
    return found


def serve(loaded: Loaded, images: Array, commands: IO[str], replies: IO[str]) -> None:
    """Answer commands until there are no more."""
    for line in commands:
        command = json.loads(line)
        if command["event"] == "turn":
            turn = take_turn(lambda: loaded.run(images), command["warm_ms"], command["time_ms"])
            send(replies, {"event": "turn", **turn.to_dict()})
        elif command["event"] == "profile":
            from .kernels import profile_kernels  # noqa: PLC0415 - only our engine has a profile

            send(replies, {"event": "profile", **profile_kernels(loaded.native, images, command["rounds"])})
        else:
            raise ValueError(f"unknown command {line!r}")


def main(arguments: dict[str, Any]) -> None:
    """Load, check, serve.

    Args:
        arguments: ``engine``, ``network``, ``folder``, ``batch``, ``threads`` and ``autotune``.
    """
    replies = protect_standard_output()
    files = Files(Path(arguments["folder"]))
    task = Task(arguments["network"], files, arguments["batch"], arguments["threads"], arguments["autotune"])
    images: Array = np.ascontiguousarray(np.load(files.images)[: task.batch])
    started = time.perf_counter()
    try:
        loaded, versions = load_engine(arguments["engine"], task)
        found = check_answer(np.array(loaded.run(images)), files, arguments["engine"])
    except SkipEngineError as error:
        send(replies, {"event": "skipped", "reason": str(error)})
        return
    except WrongAnswerError as error:
        send(replies, {"event": "failed", "reason": str(error)})
        return
    # A peer may break in ways of its own; the others are still worth comparing.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        kind = "failed" if ENGINES[arguments["engine"]].exact else "skipped"
        send(replies, {"event": kind, "reason": f"{type(error).__name__}: {first_line}"})
        return
    ready = {"load_s": time.perf_counter() - started, "versions": versions, "settings": loaded.settings, **found}
    send(replies, {"event": "ready", **ready})
    serve(loaded, images, sys.stdin, replies)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
