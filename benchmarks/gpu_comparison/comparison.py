"""One network: every form is checked in every bit, and only where all are equal is anything timed."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cpu_comparison.engines import CALIBRATION_IMAGES, CALIBRATION_SEED, SkipEngineError
from cpu_comparison.networks import NETWORKS, build_network, make_images
from cpu_comparison.prepare import IMAGE_SEED
from cpu_comparison.ratios import ratios, round_values, spread
from cpu_comparison.similarity import cosine

import ptq
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.peak import REPEATS
from tvm_backend.gpu.profile import profile
from tvm_backend.gpu.runtime import CudaProgram

from .ceilings import COPY_BYTES, measure_ceilings
from .correctness import Difference, check, interpreted
from .device import Device
from .forms import baseline_of, form_title, split_form
from .peers import Floats, Peer, Running, release
from .rounds import Rounds, Time, first_line, take_rounds

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare.

    Args:
        forms: of ours, see :mod:`.forms`.
        check_batches: images of the runs that are compared with the interpreter.
        batches: images of the runs that are timed.
        rounds: turns of each engine.
        turn_ms: about how long a turn takes the device.
        profile_rounds: measurements of each kernel.
        ceiling_rounds: measurements of each ceiling.
        copy_bytes: of the copy that measures the bandwidth.
        peak_repeats: of each product in the kernel that measures the peak.
    """

    forms: tuple[str, ...]
    check_batches: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    turn_ms: float = 50.0
    profile_rounds: int = 10
    ceiling_rounds: int = 20
    copy_bytes: int = COPY_BYTES
    peak_repeats: int = REPEATS


def compare_network(
    network: str, plan: Plan, device: Device, peers: Mapping[str, Peer], peak: Bundle, say: Say
) -> dict[str, Any]:
    """Check, then time.

    Args:
        network: a key of :data:`cpu_comparison.networks.NETWORKS`.
        plan: what to compare.
        device: to run on.
        peers: to compare with.
        peak: from :func:`tvm_backend.gpu.peak.build_peak`.
        say: called with one line when something is done.

    Returns:
        Plain values: ``problems`` and ``differences`` of forms; where there is no difference, ``ceilings``, ``cells``,
        and ``kernels`` of each form and batch too.
    """
    title, module = NETWORKS[network].title, build_network(network)
    images = make_images(network, max(*plan.check_batches, *plan.batches), IMAGE_SEED)
    calibration = make_images(network, CALIBRATION_IMAGES, CALIBRATION_SEED)
    result: dict[str, Any] = {
        "title": title,
        "seconds": {},
        "checked": list(plan.check_batches),
        "problems": {},
        "differences": [],
    }
    programs: dict[str, CudaProgram] = {}
    for form in plan.forms:
        started = time.perf_counter()
        try:
            programs[form], found = _checked(form, module, calibration, images, plan, device)
        # The run fails, but the other forms are still worth comparing.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            result["problems"][form] = first_line(error)
            say(f"{title}, {form}: {first_line(error)}")
            continue
        result["seconds"][form] = time.perf_counter() - started
        result["differences"] += [difference.to_dict() for difference in found]
        equal = f"{form}: equal to the interpreter in every bit at batch {', '.join(map(str, plan.check_batches))}"
        for line in [str(difference) for difference in found] or [equal]:
            say(f"{title}, {line}")
    if result["differences"] or baseline_of(plan.forms) not in programs:
        return result
    with torch.inference_mode():
        reference = module(torch.from_numpy(images[: max(plan.batches)])).numpy()
    result["ceilings"] = measure_ceilings(peak, device.driver, plan.ceiling_rounds, plan.copy_bytes).to_dict()
    result["cells"], result["kernels"] = [], []
    for batch in plan.batches:
        chosen, wanted = np.ascontiguousarray(images[:batch]), reference[:batch]
        states: dict[str, dict[str, Any]] = {
            form: {"status": "failed", "reason": result["problems"][form]}
            for form in plan.forms
            if form not in programs
        }
        try:
            for form, program in programs.items():
                # What is timed runs on what lies in the inputs.
                answer = np.asarray(program(chosen)[0], np.float32)
                states[form] = {"status": "timed", "cosine": cosine(answer, wanted)}
                kernels = [dataclasses.asdict(kernel) for kernel in profile(program, batch, plan.profile_rounds)]
                result["kernels"].append({"batch": batch, "form": form, "kernels": kernels})
            loaded, others = _load(peers, module, calibration, chosen, wanted)
            measured = _take_rounds(programs, loaded, batch, plan)
        # What other batches have shown is kept.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            result["problems"][f"batch {batch}"] = first_line(error)
            say(f"{title}, batch {batch}: {first_line(error)}")
            continue
        states |= others
        # In the order of the tables: forms, then peers.
        ordered = {name: states[name] for name in (*plan.forms, *peers)}
        cell = {"batch": batch, "engines": _with_ratios(ordered, measured, baseline_of(plan.forms))}
        result["cells"].append(cell)
        say(_describe(title, cell, peers))
        # Graphs of torch hold the memory of all their values.
        loaded.clear()
        release()
    return result


def _take_rounds(programs: Mapping[str, CudaProgram], loaded: Mapping[str, Running], batch: int, plan: Plan) -> Rounds:
    engines = {form: _ours(program, batch) for form, program in programs.items()}
    engines |= {name: running.time for name, running in loaded.items()}
    return take_rounds(engines, frozenset(loaded), plan.rounds, plan.turn_ms)


def _checked(
    form: str, module: torch.nn.Module, calibration: Floats, images: Floats, plan: Plan, device: Device
) -> tuple[CudaProgram, list[Difference]]:
    """Return a form on the device, and where it differs from the interpreter."""
    method, bits = split_form(form)
    quantized = ptq.quantize(module, torch.from_numpy(calibration), method=method, bits=bits)
    program = device.program(quantized.program)
    expected = interpreted(quantized.program, images[: max(plan.check_batches)])
    return program, check(form, program, device.driver, images, expected, plan.check_batches)


def _ours(program: CudaProgram, batch: int) -> Time:
    return lambda count: program.time_runs(batch, count)


def _load(
    peers: Mapping[str, Peer], module: torch.nn.Module, calibration: Floats, images: Floats, reference: Floats
) -> tuple[dict[str, Running], dict[str, dict[str, Any]]]:
    """Return the peers that answer as they have to, and the state of each."""
    loaded: dict[str, Running] = {}
    states: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        try:
            running = peer.load(module, calibration, images)
            similarity = cosine(running.answer(), reference)
        except SkipEngineError as error:
            states[name] = {"status": "skipped", "reason": str(error)}
            continue
        # A peer may break in ways of its own; the others are still worth comparing.
        except Exception as error:  # noqa: BLE001
            states[name] = {"status": "failed", "reason": first_line(error)}
            continue
        states[name] = {"status": "timed", "cosine": similarity}
        if similarity >= peer.least_cosine:
            loaded[name] = running
            continue
        reason = (
            f"answers have a cosine of {similarity:.4f} with float32, expected at least {peer.least_cosine}: "
            "it does not run the same network"
        )
        states[name] = {"status": "failed", "reason": reason, "cosine": similarity}
    return loaded, states


def _with_ratios(states: dict[str, dict[str, Any]], measured: Rounds, baseline: str) -> dict[str, dict[str, Any]]:
    base = round_values(measured.turns[baseline])
    for name, turns in measured.turns.items():
        values = round_values(turns)
        states[name].update(turns=turns, ms=spread(values).to_dict(), ratio=spread(ratios(values, base)).to_dict())
    for name, reason in measured.problems.items():
        states[name].update(status="failed", reason=reason)
    return states


def _describe(title: str, cell: dict[str, Any], peers: Mapping[str, Peer]) -> str:
    lines = [f"{cell_title(title, cell)}:"]
    for name, state in cell["engines"].items():
        text = f"  {engine_title(name, peers):30s} "
        if state["status"] == "timed":
            text += f"{state['ms']['median']:9.3f} ms  {state['ratio']['median']:5.2f}"
        else:
            text += f"{state['status']}: {state['reason']}"
        lines.append(text)
    return "\n".join(lines)


def cell_title(title: str, cell: dict[str, Any]) -> str:
    """Return what people call a cell of a network."""
    return f"{title}, batch {cell['batch']}"


def engine_title(name: str, peers: Mapping[str, Peer]) -> str:
    """Return what people call a form of ours, or a peer."""
    return peers[name].title if name in peers else form_title(name)


def failures(networks: Mapping[str, Mapping[str, Any]], problems: Mapping[str, str]) -> Sequence[str]:
    """Return what makes a run fail: differences, and networks that could not be compared."""
    found = [f"{NETWORKS[name].title}: {problem}" for name, problem in problems.items()]
    for network in networks.values():
        found += [f"{network['title']}, {form}: {problem}" for form, problem in network["problems"].items()]
        found += [f"{network['title']}, {Difference(**difference)}" for difference in network["differences"]]
    return found
