"""What a fresh process without torch costs that loads our bundle: time to the first answer, and memory."""

from __future__ import annotations

import json
import sys
import time

#: Before numpy and TVM are imported, so that their imports count.
_ENTERED = time.monotonic()

from pathlib import Path  # noqa: E402 - after the clock
from typing import Any  # noqa: E402 - after the clock


def measure(bundle: str, images: str, batch: int, threads: int, spawned: float) -> dict[str, Any]:
    """Load, answer, and look at this process.

    Args:
        bundle: directory.
        images: ``.npy`` of float32 (images, 3, height, width).
        batch: images in the call.
        threads: worker threads.
        spawned: the parent's ``time.monotonic()`` when it started this process.

    Returns:
        ``first_answer_s`` since the process was started; of it ``load_and_answer_s`` without imports;
        ``rss_mb`` now and ``peak_mb`` at most, both after more answers.
    """
    import numpy as np  # noqa: PLC0415 - its import counts

    from tvm_backend.runtime import load  # noqa: PLC0415 - its import counts

    inputs = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])
    imported = time.monotonic()
    program = load(bundle, threads=threads)
    program(inputs)
    answered = time.monotonic()
    for _ in range(5):
        program(inputs)
    if "torch" in sys.modules:
        raise RuntimeError("the process imported torch, which a bundle must not need")
    memory = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    kilobytes = {key: int(memory[key].split()[0]) for key in ("VmRSS", "VmHWM")}
    return {
        "start_s": _ENTERED - spawned,
        "first_answer_s": answered - spawned,
        "load_and_answer_s": answered - imported,
        "rss_mb": kilobytes["VmRSS"] / 1024,
        "peak_mb": kilobytes["VmHWM"] / 1024,
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
