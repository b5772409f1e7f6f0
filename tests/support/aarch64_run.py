"""Run bundles where no test runner is: under qemu-aarch64, with the Python, numpy and TVM of another architecture.

    aarch64_run.py FOLDER...

Each folder holds ``bundle`` and ``images-N.npy`` for some batch sizes N; the results are written beside them as
``output-N-THREADS-I.npy``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tvm_backend.runtime import load
from tvm_backend.threads import usable_processors


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        for threads in range(1, min(2, usable_processors()) + 1):
            program = load(folder / "bundle", threads)
            for images in sorted(folder.glob("images-*.npy")):
                batch = images.stem.removeprefix("images-")
                for index, output in enumerate(program(np.load(images))):
                    np.save(folder / f"output-{batch}-{threads}-{index}.npy", output)


if __name__ == "__main__":
    main()
