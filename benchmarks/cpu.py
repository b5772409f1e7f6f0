"""Our engine against every engine that a user would otherwise pick, on this machine's processor.

    python benchmarks/cpu.py --output out/cpu
    python benchmarks/cpu.py --quick
    make bench-cpu

Writes ``cpu.json`` (all samples), ``cpu.png`` (bars) and ``cpu.md`` (tables), and prints the tables. Exits with 1 where
our engine's answers differ from the interpreter's, which is checked before it is timed.

What makes it fair:

- Each engine has a process of its own, and gets the same images, weights, batch and number of threads, as arrays of
  numpy in and out. Answers are checked: ours in every bit, peers by their similarity to torch's float32.
- Rounds are interleaved: in each one every engine takes one turn (calls for 20 ms that do not count, then calls for
  100 ms that do), in another order each time. A round's value is the median of its turn. Ratios are taken inside a
  round, and their median is reported, so that a slow minute of the machine meets both sides.
- Pools of threads spin after the last call, and keep a processor from whoever is timed next: about 120 ms in TVM, up to
  35 ms in onnxruntime, below 10 ms in torch (OpenMP) and OpenVINO (TBB), measured by the processor time that idle
  workers go on using. Forbidding it would cost onnxruntime half of its speed. So every engine may spin, and a turn
  begins when the processor time of all workers stands still; the 20 ms then wake the engine's own threads.
- A turn during which processes outside used more than 5 % of a processor, or during which the engine got less of them
  than before, is repeated, up to four times, and the least disturbed one is kept. The JSON file says for each turn how
  much others used (``foreign``), and how many processors the engine used (``busy``, which shows whether it keeps to its
  number of threads). Cells with many disturbed turns are listed before the results.
- Peers run with the settings that were best for them: see :mod:`cpu_comparison.engines`. OpenVINO computes the float
  rest of int8 networks in bfloat16 where the processor has it, as it does by default; its float32 is asked for by name.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from cpu_comparison.comparison import Plan, cell_title, compare_network
from cpu_comparison.engines import ENGINES
from cpu_comparison.machine import describe_machine, stolen_seconds, usable_processors
from cpu_comparison.networks import NETWORKS
from cpu_comparison.plot import write_plot
from cpu_comparison.prepare import BITS, METHOD
from cpu_comparison.processes import WorkerError
from cpu_comparison.report import markdown

ALL_NETWORKS = tuple(name for name in NETWORKS if name not in ("tiny", "fashion"))
PEERS = tuple(name for name, engine in ENGINES.items() if not engine.preset)
QUICK_ROUNDS = 5


def _names(known: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...] | None]:
    def parse(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[str, ...] | None:
        names = None if text is None else tuple(part.strip() for part in text.split(","))
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise click.BadParameter(f"unknown: {', '.join(unknown)}; known are: {', '.join(known)}")
        return names

    return parse


def _numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise click.BadParameter(f"{text!r}, expected positive numbers with commas between them")
    return tuple(int(part) for part in text.split(","))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option(
    "--networks", callback=_names(tuple(NETWORKS)), help=f"Of: {', '.join(NETWORKS)}.  [{', '.join(ALL_NETWORKS)}]"
)
@click.option("--batches", callback=_numbers, help="Images in a call.  [1,8]")
@click.option("--threads", callback=_numbers, help="Numbers of threads.  [1,2, as far as there are processors]")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each engine in a cell.  [15]")
@click.option("--engines", callback=_names(PEERS), help=f"Of: {', '.join(PEERS)}.  [all]")
@click.option("--quick", is_flag=True, help="DeiT-S, batch 1, most threads and 5 rounds, where not said otherwise.")
@click.option("--autotune", is_flag=True, help="Let torch.compile try several kernels: minutes for each cell.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/cpu"),
    show_default=True,
    help="Folder for cpu.json, cpu.png and cpu.md; those that exist are replaced.",
)
@click.option("--keep", type=click.Path(path_type=Path), help="Keep models and logs in this new folder.")
def main(
    networks: tuple[str, ...] | None,
    batches: tuple[int, ...] | None,
    threads: tuple[int, ...] | None,
    rounds: int | None,
    engines: tuple[str, ...] | None,
    quick: bool,
    autotune: bool,
    output: Path,
    keep: Path | None,
) -> None:
    """Compare, write and print."""
    processors = usable_processors()
    if threads is None:
        threads = (min(2, processors),) if quick else tuple(range(1, min(2, processors) + 1))
    if max(threads) > processors:
        raise click.BadParameter(
            f"{max(threads)} is more than the {processors} processors here", param_hint="--threads"
        )
    plan = Plan(
        engines=tuple(name for name in PEERS if engines is None or name in engines),
        batches=batches or ((1,) if quick else (1, 8)),
        threads=threads,
        rounds=rounds or (QUICK_ROUNDS if quick else 15),
        autotune=autotune,
    )
    chosen = networks or (("deit-s",) if quick else ALL_NETWORKS)
    if keep is not None and keep.exists():
        raise click.BadParameter(f"{keep} exists", param_hint="--keep")
    output.mkdir(parents=True, exist_ok=True)
    results = _run(chosen, plan, output, keep)
    (output / "cpu.md").write_text(markdown(results), encoding="utf-8")
    write_plot(results, output / "cpu.png")
    click.echo("\n" + markdown(results))
    click.echo(f"wrote {output / 'cpu.json'}, {output / 'cpu.md'} and {output / 'cpu.png'}", err=True)
    failures = _failures(results)
    for failure in failures:
        click.echo(failure, err=True)
    sys.exit(1 if failures else 0)


def _run(networks: tuple[str, ...], plan: Plan, output: Path, keep: Path | None) -> dict[str, Any]:
    started, stolen = time.perf_counter(), stolen_seconds()
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": {**asdict(plan), "method": METHOD, "bits": BITS},
        "titles": {name: ENGINES[name].title for name in plan.engines},
        "networks": {},
        "problems": {},
    }
    work = Path(tempfile.mkdtemp(prefix="bench-cpu-")) if keep is None else keep
    work.mkdir(parents=True, exist_ok=True)
    # An ended run takes its models and its workers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for name in networks:
            try:
                results["networks"][name] = compare_network(name, plan, work, lambda line: click.echo(line, err=True))
            except WorkerError as error:
                results["problems"][name] = str(error)
                click.echo(f"{NETWORKS[name].title}: {error}", err=True)
            results["seconds"] = time.perf_counter() - started
            results["stolen_seconds"] = stolen_seconds() - stolen
            # After each network: an interrupted run leaves what it measured.
            (output / "cpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if keep is None:
                shutil.rmtree(work / name, ignore_errors=True)
    finally:
        if keep is None:
            shutil.rmtree(work, ignore_errors=True)
    return results


def _failures(results: dict[str, Any]) -> list[str]:
    failures = [f"{NETWORKS[name].title}: {problem}" for name, problem in results["problems"].items()]
    for network in results["networks"].values():
        for cell in network["cells"]:
            for engine, state in cell["engines"].items():
                if state["status"] == "failed":
                    failures.append(f"{cell_title(network['title'], cell)}: {ENGINES[engine].title}: {state['reason']}")
    return failures


if __name__ == "__main__":
    main()
