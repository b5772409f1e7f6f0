"""Workers: what they say, what they refuse to time, and what the parent makes of it. The engine is a fake."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cpu_comparison import comparison, kernels, processes
from cpu_comparison.comparison import Plan, compare_cell
from cpu_comparison.engines import ENGINES, OURS, Engine, Loaded, SkipEngineError, Task, load_engine, steps_of
from cpu_comparison.files import Files
from cpu_comparison.processes import Worker, WorkerError, environment, take_rounds
from cpu_comparison.worker import WrongAnswerError, check_answer, serve

FAKE = """
import sys
import numpy as np
from cpu_comparison.engines import Loaded
from cpu_comparison.protocol import protect_standard_output, send
from cpu_comparison.worker import serve

replies = protect_standard_output()
print("a library that prints")
send(replies, {"event": "ready", "cosine": 1.0})
serve(Loaded(lambda images: images), np.zeros((1, 2), np.float32), sys.stdin, replies)
"""
DYING = "import sys; print('no such instruction', file=sys.stderr); sys.exit(3)"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(tmp_path)
    answers = np.random.default_rng(0).standard_normal((4, 10), dtype=np.float32)
    np.save(made.float_outputs, answers)
    np.save(made.integer_outputs, answers)
    return made


@pytest.fixture
def start(tmp_path: Path) -> Iterator[object]:
    started: list[Worker] = []

    def worker(name: str, code: str = FAKE) -> Worker:
        command = [sys.executable, "-c", code]
        started.append(Worker(name, command, environment(1, tmp_path), tmp_path / f"{name}.log"))
        return started[-1]

    yield worker
    for one in started:
        one.stop()


def test_rounds_give_one_turn_of_each_worker_and_what_libraries_print_is_not_a_reply(start, tmp_path) -> None:
    workers = [start("a"), start("b")]
    assert workers[0].first == {"event": "ready", "cosine": 1.0}
    turns = take_rounds(workers, rounds=2, warm_ms=0, time_ms=0)
    assert {name: len(taken) for name, taken in turns.items()} == {"a": 2, "b": 2}
    assert all(
        set(turn) == {"ms", "busy", "foreign", "settled_ms", "starved"} for taken in turns.values() for turn in taken
    )
    assert "a library that prints" in (tmp_path / "a.log").read_text()


class Scripted:
    """A worker whose turns are given."""

    process_id, most_busy = 2**22 + 1, 2.0

    def __init__(self, busy: list[float]) -> None:
        self.busy = iter(busy)

    def ask(self, _: object) -> dict[str, object]:
        return {"event": "turn", "ms": [1.0], "busy": next(self.busy)}


def test_a_turn_that_others_disturbed_is_repeated_and_the_least_disturbed_one_kept(monkeypatch) -> None:
    monkeypatch.setattr(processes, "others_seconds", lambda _: {})
    worker = Scripted([1.2, 1.9, 2.0])
    assert processes.ask_undisturbed(worker, [worker], {})["busy"] == 1.9
    worker = Scripted([1.2, 1.7, 1.6, 1.5, 1.4, 2.0])
    kept = processes.ask_undisturbed(worker, [worker], {})
    assert kept["busy"] == 1.7
    assert processes.is_disturbed(kept)


def test_a_worker_that_dies_is_an_error_with_the_end_of_its_log(start) -> None:
    with pytest.raises(WorkerError, match=r"broken: the worker ended with exit code 3.*\n.*no such instruction"):
        start("broken", DYING)


def test_a_worker_that_dies_later_is_the_same_error(start) -> None:
    worker = start("late", "print('{}', flush=True)\n" + DYING)
    with pytest.raises(WorkerError, match="exit code 3"):
        worker.ask({"event": "turn"})


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(WorkerError, match="hanging: the worker ended with exit code -9"):
        Worker("hanging", command, environment(1, tmp_path), tmp_path / "hanging.log", longest_s=0.1)


def test_commands_in_replies_out() -> None:
    commands = io.StringIO('{"event": "turn", "warm_ms": 0, "time_ms": 0}\n')
    replies = io.StringIO()
    serve(Loaded(lambda images: images), np.zeros((1, 2), np.float32), commands, replies)
    reply = json.loads(replies.getvalue())
    assert reply["event"] == "turn"
    assert len(reply["ms"]) == 1


def test_an_unknown_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown command"):
        serve(Loaded(lambda images: images), np.zeros(1), io.StringIO('{"event": "dance"}\n'), io.StringIO())


def test_our_answer_has_to_equal_the_interpreters_in_every_bit(files: Files) -> None:
    answer = np.load(files.integer_outputs)[:2]
    assert check_answer(answer, files, OURS)["equal"] is True
    answer[1, 3] = np.nextafter(answer[1, 3], np.float32(9))
    with pytest.raises(WrongAnswerError, match="1 of 20 outputs differ from the interpreter's; nothing is timed"):
        check_answer(answer, files, OURS)


def test_minus_zero_is_another_bit(files: Files) -> None:
    np.save(files.integer_outputs, np.zeros((1, 10), np.float32))
    with pytest.raises(WrongAnswerError, match="10 of 10 outputs differ"):
        check_answer(np.full((1, 10), -0.0, np.float32), files, OURS)


def test_a_peer_has_to_run_the_same_network(files: Files) -> None:
    answer = np.load(files.float_outputs)[:2]
    assert check_answer(2 * answer, files, "onnxruntime-fp32")["cosine"] == pytest.approx(1)
    with pytest.raises(WrongAnswerError, match="it does not run the same network"):
        check_answer(-answer, files, "onnxruntime-fp32")
    with pytest.raises(WrongAnswerError, match=r"answered \(2, 9\), expected \(2, 10\)"):
        check_answer(answer[:, :9], files, "onnxruntime-fp32")
    with pytest.raises(WrongAnswerError, match="cosine of nan"):
        check_answer(answer * np.float32("nan"), files, "openvino-nncf")


def test_an_engine_that_is_not_installed_is_skipped_with_its_name(files: Files, monkeypatch) -> None:
    absent = Engine("absent", ("no-such-distribution",), lambda _: Loaded(lambda images: images))
    monkeypatch.setitem(ENGINES, "absent", absent)
    with pytest.raises(SkipEngineError, match="no-such-distribution is not installed; `make bench-cpu` installs it"):
        load_engine("absent", Task("tiny", files, 1, 1))


def test_an_engine_whose_file_could_not_be_made_is_skipped(files: Files) -> None:
    with pytest.raises(SkipEngineError, match=r"int8-onnxruntime\.onnx was not made"):
        load_engine("onnxruntime-int8", Task("tiny", files, 1, 1))


def test_the_cell_says_why_an_engine_has_no_time_and_ours_has_no_excuse(files: Files, monkeypatch, start) -> None:
    def fake(engine: str, *_: object) -> Worker:
        skipped = "import json; print(json.dumps({'event': 'skipped', 'reason': 'it was not made'}))"
        return start(engine, FAKE if engine == "torch-fp32" else skipped)

    monkeypatch.setattr(comparison, "start_engine", fake)
    plan = Plan((OURS, "openvino-nncf", "torch-fp32"), (1,), (1,), rounds=1, warm_ms=0, time_ms=0)
    problems = {"nncf": "ModuleNotFoundError: No module named 'nncf'"}
    cell = compare_cell("tiny", plan, files, problems, batch=1, threads=1)
    states = cell["engines"]
    assert states[OURS] == {"status": "failed", "reason": "it was not made"}
    assert states["openvino-nncf"]["status"] == "skipped"
    assert states["openvino-nncf"]["reason"] == "it was not made: ModuleNotFoundError: No module named 'nncf'"
    assert states["torch-fp32"]["status"] == "timed"
    assert states["torch-fp32"]["ms"]["median"] > 0
    assert "ratio" not in states["torch-fp32"]


def test_only_the_files_that_the_engines_need_are_made() -> None:
    assert steps_of(["torch-fp32"]) == []
    assert steps_of([OURS, "openvino-int8", "onnxruntime-int8"]) == ["bundle", "preset:onnxruntime", "preset:openvino"]
    assert steps_of(["openvino-nncf"]) == ["float_onnx", "nncf"]
    assert steps_of(["static-default", "openvino-portable"]) == ["preset:portable", "float_onnx", "static:default"]


def test_an_engine_without_a_profile_says_so(monkeypatch) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda _: None)
    assert "has no profile" in kernels.profile_kernels(None, None, 1)["problem"]
