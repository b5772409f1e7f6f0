"""A machine with a GPU that runs bundles for somebody else: this one, or another one through TVM's RPC."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from quantizers.errors import PtqError, TargetError, UsageError
from tvm_backend.bundle import Bundle, load_bundle, save_bundle
from tvm_backend.gpu.driver import LIBRARY, Driver
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.imports import import_tvm

Array = npt.NDArray[np.generic]

_PREFIX = "vit_ptq.gpu."


class Machine(Protocol):
    """What tuning needs of a machine; programs are numbers."""

    def describe(self) -> tuple[str, str]:
        """Return the architecture of its GPU, as ``sm_90``, and the GPU's name."""
        ...

    def load(self, bundle: Bundle) -> int:
        """Open a bundle."""
        ...

    def run(self, program: int, images: Array) -> list[Array]:
        """Return what a program makes of images, float32 (batch, *shape)."""
        ...

    def time_calls(self, program: int, batch: int, positions: Sequence[int], count: int) -> list[float]:
        """Return the device's milliseconds for some calls of a program's schedule, each ``count`` times in a row."""
        ...


class LocalMachine:
    """This machine.

    Args:
        driver: the machine's own where None.

    Raises:
        TargetError: no driver, or no device.
    """

    def __init__(self, driver: Driver | None = None) -> None:
        self._driver = driver or Driver()
        self._programs: list[CudaProgram] = []

    def describe(self) -> tuple[str, str]:
        """Return the architecture and the name of the GPU."""
        return self._driver.architecture(), self._driver.name()

    def load(self, bundle: Bundle) -> int:
        """Open a bundle."""
        self._programs.append(CudaProgram(bundle, self._driver))
        return len(self._programs) - 1

    def run(self, program: int, images: Array) -> list[Array]:
        """Return what a program makes of images."""
        return list(self._programs[program](images.astype(np.float32, copy=False)))

    def time_calls(self, program: int, batch: int, positions: Sequence[int], count: int) -> list[float]:
        """Return the device's milliseconds for some calls."""
        return self._programs[program].time_calls(batch, count, positions)


class RemoteMachine:
    """A machine on which :func:`serve` runs.

    Args:
        host: name or address.
        port: of the server.

    Raises:
        TargetError: there is no such server, or it refuses.
    """

    def __init__(self, host: str, port: int) -> None:
        rpc = import_tvm("tvm.rpc")
        try:
            self._session = rpc.connect(host, port)
            self._functions = {
                name: self._session.get_function(_PREFIX + name) for name in ("describe", "load", "run", "time_calls")
            }
        except (RuntimeError, OSError, AttributeError, ValueError) as error:
            raise TargetError(
                f"no machine answers at {host}:{port} ({type(error).__name__}); start ptq serve there"
            ) from error

    def describe(self) -> tuple[str, str]:
        """Return the architecture and the name of the GPU."""
        architecture, name = json.loads(self._call("describe"))
        return architecture, name

    def load(self, bundle: Bundle) -> int:
        """Send a bundle and open it there."""
        return int(json.loads(self._call("load", _packed(bundle))))

    def run(self, program: int, images: Array) -> list[Array]:
        """Send images, and return what a program makes of them."""
        with np.load(io.BytesIO(self._call("run", program, _arrays([images]))), allow_pickle=False) as answer:
            return [answer[name] for name in answer.files]

    def time_calls(self, program: int, batch: int, positions: Sequence[int], count: int) -> list[float]:
        """Return the device's milliseconds for some calls."""
        found: list[float] = json.loads(self._call("time_calls", program, batch, json.dumps(list(positions)), count))
        return found

    def _call(self, name: str, *arguments: Any) -> bytes:
        answer = bytes(self._functions[name](*arguments))
        # The first byte says whether the rest is an answer or a refusal: errors do not cross the connection whole.
        if answer[:1] == b"!":
            raise TargetError(f"the remote machine refuses: {answer[1:].decode()}")
        return answer[1:]


@contextmanager
def served(host: str, port: int, driver: str = LIBRARY) -> Iterator[int]:
    """Let others run bundles on this machine's GPU while the context lasts.

    Args:
        host: address to listen at.
        port: to listen at.
        driver: name or path of the driver's library.

    Yields:
        The port that was taken: the next free one where ``port`` is not.

    Raises:
        TargetError: no driver, or no device.
        UsageError: a package is missing that TVM's server needs.
    """
    Driver(driver)
    if importlib.util.find_spec("cloudpickle") is None:
        raise UsageError("TVM's RPC server needs the package cloudpickle: pip install 'vit-ptq[serve]'")
    server = import_tvm("tvm.rpc").Server(
        host=host,
        port=port,
        port_end=port + 100,
        silent=True,
        server_init_callback=functools.partial(_register, driver),
    )
    try:
        yield server.port
    finally:
        server.terminate()


def _register(driver: str) -> None:
    """Register what :class:`RemoteMachine` calls; every connection has a process and so a machine of its own."""

    @functools.cache
    def machine() -> LocalMachine:
        return LocalMachine(Driver(driver))

    answers: dict[str, Callable[..., bytes]] = {
        "describe": lambda: json.dumps(machine().describe()).encode(),
        "load": lambda content: str(machine().load(_unpacked(bytes(content)))).encode(),
        "run": lambda program, content: _arrays(machine().run(program, _only_array(bytes(content)))),
        "time_calls": lambda program, batch, positions, count: json.dumps(
            machine().time_calls(program, batch, json.loads(positions), count)
        ).encode(),
    }
    for name, answer in answers.items():
        import_tvm("tvm_ffi").register_global_func(_PREFIX + name, _guarded(answer), override=True)


def _guarded(answer: Callable[..., bytes]) -> Callable[..., bytes]:
    def guarded(*arguments: Any) -> bytes:
        try:
            return b"=" + answer(*arguments)
        except PtqError as error:
            return b"!" + str(error).encode()

    return guarded


def _packed(bundle: Bundle) -> bytes:
    stream = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "bundle"
        save_bundle(bundle, directory)
        with zipfile.ZipFile(stream, "w") as archive:
            for path in sorted(directory.iterdir()):
                archive.write(path, path.name)
    return stream.getvalue()


def _unpacked(content: bytes) -> Bundle:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)
        return load_bundle(folder)


def _arrays(arrays: Sequence[Array]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, *arrays)
    return stream.getvalue()


def _only_array(content: bytes) -> Array:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        array: Array = stored[stored.files[0]]
        return array
