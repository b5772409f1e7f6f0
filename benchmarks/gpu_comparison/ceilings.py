"""What the device reaches at most: bytes a second of a large copy, multiply-adds a second of its tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.peak import int8_peak

#: Far beyond any cache.
COPY_BYTES = 1 << 30
_COPIES = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of a device.

    Args:
        macs: multiply-adds of 8-bit codes a second.
        bandwidth: bytes of its memory a second, read or written.
    """

    macs: float
    bandwidth: float

    def floor_ms(self, macs: int, size: int) -> float:
        """Return the milliseconds that no kernel with so many multiply-adds and bytes can go below."""
        return 1000 * max(macs / self.macs, size / self.bandwidth)

    def to_dict(self) -> dict[str, float]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_ceilings(peak: Bundle, driver: Driver, rounds: int, copy_bytes: int = COPY_BYTES) -> Ceilings:
    """Measure both; a ceiling is the most that was seen.

    Args:
        peak: from :func:`tvm_backend.gpu.peak.build_peak`.
        driver: of the device.
        rounds: measurements.
        copy_bytes: of the copy.

    Raises:
        TargetError: memory for two of the copies is missing, or the peak's sums are wrong.
    """
    return Ceilings(int8_peak(peak, driver, rounds), _bandwidth(driver, rounds, copy_bytes))


def _bandwidth(driver: Driver, rounds: int, size: int) -> float:
    driver.use()
    places: list[int] = []
    try:
        places += [driver.allocate(size)]
        places += [driver.allocate(size)]
        start, end = (driver.event(timed=True) for _ in range(2))
        driver.copy(places[1], places[0], size, driver.stream)
        taken = []
        for _ in range(rounds):
            driver.record(start, driver.stream)
            for _ in range(_COPIES):
                driver.copy(places[1], places[0], size, driver.stream)
            driver.record(end, driver.stream)
            taken.append(driver.elapsed_ms(start, end) / _COPIES)
    finally:
        for address in places:
            driver.free(address)
    # Each byte is read and written.
    return 1000 * 2 * size / min(taken)


@dataclass(frozen=True, slots=True)
class Kind:
    """All kernels of one kind, in one run of the network.

    Args:
        kernel: the kind.
        calls: in a run.
        ms: milliseconds of all calls.
        share: of the time of all kernels, 0 to 1.
        macs: multiply-adds of all calls.
        size: bytes that all calls read and write.
        of_roofline: the time that the ceilings allow over the time taken, summed call by call.
    """

    kernel: str
    calls: int
    ms: float
    share: float
    macs: int
    size: int
    of_roofline: float


def by_kind(kernels: Sequence[dict[str, Any]], ceilings: Ceilings) -> list[Kind]:
    """Sum over kernels of a kind, the longest first.

    Args:
        kernels: :class:`tvm_backend.profile.KernelTime` as plain values.
        ceilings: of the device.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault(kernel["kernel"], []).append(kernel)
    whole = sum(kernel["median_ms"] for kernel in kernels)
    found = []
    for name, members in groups.items():
        calls, ms, macs, size = (
            sum(member[key] for member in members) for key in ("calls", "median_ms", "macs", "size")
        )
        # Entries are of one shape, so that all their calls have the same ceiling.
        floor = sum(ceilings.floor_ms(member["macs"], member["size"]) for member in members)
        found.append(Kind(name, calls, ms, ms / whole, macs, size, floor / ms))
    return sorted(found, key=lambda kind: -kind.ms)
