"""``ptq benchmark``."""

from __future__ import annotations

import dataclasses

import click

from ptq import console
from ptq.commands.options import BACKENDS, json_option, open_target


@click.command()
@click.argument("target")
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, help="Repeat for several.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1,), show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Worker threads; all cores by default.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Turns of each backend.")
@json_option
def benchmark(
    target: str, backends: tuple[str, ...], batches: tuple[int, ...], threads: int | None, rounds: int, as_json: bool
) -> None:
    """Time backends on random images of TARGET's size, in interleaved rounds."""
    import os

    import torch

    from ptq.benchmarking import time_backends
    from ptq.commands.backends import open_backend

    opened = open_target(target)
    chosen = backends or (("float", "tvm") if opened.quantized is not None else ("float",))
    workers = threads if threads is not None else len(os.sched_getaffinity(0))
    torch.set_num_threads(workers)
    runs = {backend: open_backend(opened, backend, workers) for backend in chosen}
    size = opened.preprocessing().input_size
    timings = []
    for batch in batches:
        images = torch.randn((batch, *size), generator=torch.Generator().manual_seed(0))
        timings += time_backends(runs, images, workers, rounds)
    if as_json:
        console.print_json([dataclasses.asdict(timing) for timing in timings])
        return
    console.print_table(
        ("backend", "batch", "threads", "median ms", "p10 ms", "p90 ms"),
        [(t.backend, t.batch, t.threads, *(f"{v:.3f}" for v in (t.median_ms, t.p10_ms, t.p90_ms))) for t in timings],
    )
