"""What a runtime makes of an ONNX file: which products became integer, which stayed float and why, what each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx

from ptq.deployment.onnxruntime import run_onnxruntime
from ptq.deployment.openvino import run_openvino
from ptq.deployment.placement import Placement
from ptq.deployment.products import Product, find_products
from quantizers.errors import ArtifactError, UsageError

#: Each loads a file and returns its version and where the products went.
RUNTIMES: Mapping[str, Callable[[Path, tuple[Product, ...], int, int], Placement]] = MappingProxyType(
    {"onnxruntime": run_onnxruntime, "openvino": run_openvino}
)
#: Said of a product that stays float although nothing in the file speaks against it.
UNEXPLAINED = "nothing in the file speaks against integers; this version of the runtime has no such kernel for it"


@dataclass(frozen=True, slots=True)
class ProductReport:
    """A product of the file in a runtime.

    Args:
        name: of the node.
        module: path of the module it came from, where the file says.
        op: operator in the file.
        integer: whether the runtime computes it in integers.
        kernel: what the runtime runs for it.
        milliseconds: of one call; None where the runtime tells no time.
        findings: what keeps it, or would keep it in another runtime, from integers; what is wrong with it.
    """

    name: str
    module: str
    op: str
    integer: bool
    kernel: str
    milliseconds: float | None
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A file in a runtime.

    Args:
        runtime: a key of :data:`RUNTIMES`.
        version: of the runtime.
        products: matrix products and convolutions, in the file's order.
        others: milliseconds and number of the runtime's other kernels, by kind.
        integer_share: share of the products, 0 to 1, that the runtime computes in integers.
    """

    runtime: str
    version: str
    products: tuple[ProductReport, ...]
    others: Mapping[str, tuple[float, int]]
    integer_share: float


def check_deployment(path: Path, runtime: str, threads: int = 1, calls: int = 10) -> Deployment:
    """Load a file in a runtime, run it on random images, and report its products.

    Args:
        path: an ONNX file; free extents of its inputs are taken as 1.
        runtime: a key of :data:`RUNTIMES`.
        threads: of the runtime.
        calls: whose times are averaged, after one that is not counted.

    Raises:
        UsageError: no such file or runtime, or a runtime that is not installed.
        ArtifactError: not an ONNX file, or one that the runtime refuses.
    """
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if not path.is_file():
        raise UsageError(f"{path} is no file; expected an ONNX file, such as 'ptq export --format onnx' writes")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:
        # Whatever the parser stumbles over, to people it is one thing.
        raise ArtifactError(f"{path} is not a valid ONNX file: {' '.join(str(error).split())[:300]}") from error
    products = find_products(model)
    placed = RUNTIMES[runtime](path, products, threads, calls)
    reports = []
    for product in products:
        kernel = placed.kernels.get(product.name)
        integer = kernel is not None and kernel.integer
        findings = product.findings
        if not integer:
            findings = (*findings, *product.obstacles) or (UNEXPLAINED,)
        reports.append(
            ProductReport(
                product.name,
                product.module,
                product.op,
                integer,
                "absorbed by another kernel" if kernel is None else kernel.name,
                None if kernel is None else kernel.milliseconds,
                findings,
            )
        )
    share = sum(report.integer for report in reports) / len(reports) if reports else 0.0
    return Deployment(runtime, placed.version, tuple(reports), placed.others, share)


__all__ = ["RUNTIMES", "Deployment", "ProductReport", "check_deployment"]
