"""What a number in a report depends on: the processor, the system, the date."""

from __future__ import annotations

import datetime as dt
import os
import platform
from pathlib import Path
from typing import Any

_WORTH_SAYING = ("avx", "amx", "fma", "bf16", "vnni", "asimd", "sve", "i8mm")


def usable_processors() -> int:
    """Return how many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Return processor, instruction sets, memory, system, Python and the date in UTC."""
    fields = _processor_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": sorted(flag for flag in flags if any(word in flag for word in _WORTH_SAYING)),
        "usable_processors": usable_processors(),
        "memory_gb": round(_memory_kilobytes() / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def stolen_seconds() -> float:
    """Return for how long the host has run something else on the processors of this virtual machine; 0 if unknown."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return 0.0
    ticks = int(statistics.read_text(encoding="ascii").splitlines()[0].split()[8])
    return ticks / os.sysconf("SC_CLK_TCK")


def _processor_fields() -> dict[str, str]:
    description = Path("/proc/cpuinfo")
    if not description.exists():
        return {}
    first = description.read_text(encoding="utf-8").split("\n\n", maxsplit=1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_kilobytes() -> int:
    memory = Path("/proc/meminfo")
    return int(memory.read_text(encoding="ascii").split()[1]) if memory.exists() else 0
