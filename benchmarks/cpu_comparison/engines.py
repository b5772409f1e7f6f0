"""The engines: how each is loaded, with which settings, and when it has to be left out.

Each gets the settings that are best for it, as far as they were tried: OpenVINO the latency hint with one stream, a
static batch and, where the processor has bfloat16, its own default of running the float rest of int8 networks in
it; onnxruntime all graph optimizations, spinning threads and a fixed batch, and of ``quantize_static``'s settings the
fastest that were found; torch.compile frozen weights.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import STEPS, TARGETS, Files
from .networks import build_network, make_images

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]
CALIBRATION_SEED, CALIBRATION_IMAGES = 1, 16
#: Mean similarity with the answers of torch in float32, of networks in float32 and in bfloat16.
FLOAT_COSINE, CLOSE_COSINE = 0.9999, 0.99
#: Of tools whose losses are their own affair.
LOSSY_COSINE = 0.5


class SkipEngineError(Exception):
    """This engine cannot take part; the message says why."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked to load.

    Args:
        network: a key of :data:`.networks.NETWORKS`.
        files: prepared files of that network.
        batch: images in a call.
        threads: worker threads.
        autotune: let torch.compile try several kernels; minutes for each network.
    """

    network: str
    files: Files
    batch: int
    threads: int
    autotune: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded engine.

    Args:
        run: float32 (batch, 3, height, width) to float32 (batch, outputs).
        settings: what was chosen, for the report.
        native: the engine's own object, where more than running is asked of it.
    """

    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    native: Any = None


@dataclass(frozen=True, slots=True)
class Engine:
    """A row of the table of engines.

    Args:
        title: for tables and plots.
        packages: what has to be installed, names of distributions; their versions are reported.
        load: from a task.
        step: step of :mod:`.prepare` whose file it loads; empty where it builds the network itself.
        preset: whether it takes part in the comparison of presets only, see ``benchmarks/export_presets.py``.
        exact: answers have to equal the interpreter's in every bit.
        least_cosine: similarity with torch's float answers below which this is not the same network.
    """

    title: str
    packages: tuple[str, ...]
    load: Callable[[Task], Loaded]
    step: str = ""
    preset: bool = False
    exact: bool = False
    least_cosine: float = 0.9

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages.

        Raises:
            SkipEngineError: one is not installed.
        """
        found = {}
        for package in self.packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise SkipEngineError(f"{package} is not installed; `make bench-cpu` installs it") from None
        return found


def load_ours(task: Task) -> Loaded:
    """Load the bundle into TVM's runtime, without torch."""
    from tvm_backend.runtime import load  # noqa: PLC0415 - each worker imports one engine only

    program = load(task.files.bundle, threads=task.threads)

    def run(images: Array) -> Array:
        answer: Any = program(images)[0]
        return np.asarray(answer, np.float32)

    return Loaded(run, {"threads": task.threads}, program)


def _openvino(task: Task, path: Any, **properties: Any) -> Loaded:
    import openvino  # noqa: PLC0415 - each worker imports one engine only

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape([task.batch, *list(model.inputs[0].partial_shape)[1:]])
    chosen = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": task.threads,
        "ENABLE_CPU_PINNING": True,
        **properties,
    }
    compiled = core.compile_model(model, "CPU", chosen)
    request = compiled.create_infer_request()
    names = (*chosen, "INFERENCE_PRECISION_HINT")
    settings = {name: str(compiled.get_property(name)) for name in names}

    def run(images: Array) -> Array:
        answer: Array = request.infer({0: images}, share_inputs=True, share_outputs=True)[0]
        return answer

    return Loaded(run, settings, compiled)


def load_openvino_nncf(task: Task) -> Loaded:
    """Load what NNCF quantized."""
    return _openvino(task, task.files.nncf)


def load_openvino_preset(target: str, task: Task) -> Loaded:
    """Load the INT8 ONNX file that this project exports for a runtime."""
    return _openvino(task, task.files.preset(target))


def load_openvino_float(task: Task) -> Loaded:
    """Load the float network and compute in float32."""
    return _openvino(task, task.files.float_onnx, INFERENCE_PRECISION_HINT="f32")


def load_openvino_bfloat(task: Task) -> Loaded:
    """Load the float network and let OpenVINO compute in bfloat16, its default where the processor has it."""
    loaded = _openvino(task, task.files.float_onnx)
    if "bfloat16" not in loaded.settings["INFERENCE_PRECISION_HINT"]:
        raise SkipEngineError("OpenVINO does not use bfloat16 on this processor")
    return loaded


def _onnxruntime(task: Task, path: Any) -> Loaded:
    import onnxruntime  # noqa: PLC0415 - each worker imports one engine only

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", task.batch)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    settings = {"intra_op_num_threads": task.threads, "graph_optimization_level": "all", "allow_spinning": True}
    return Loaded(lambda images: session.run(None, {name: images})[0], settings, session)


def load_onnxruntime_preset(target: str, task: Task) -> Loaded:
    """Load the INT8 ONNX file that this project exports for a runtime."""
    return _onnxruntime(task, task.files.preset(target))


def load_onnxruntime_static(settings: str, task: Task) -> Loaded:
    """Load what ``quantize_static`` made."""
    return _onnxruntime(task, task.files.static(settings))


def load_onnxruntime_float(task: Task) -> Loaded:
    """Load the float network."""
    return _onnxruntime(task, task.files.float_onnx)


def _torch(task: Task) -> Any:
    import torch  # noqa: PLC0415 - each worker imports one engine only

    torch.set_num_threads(task.threads)
    return torch


def _in_torch(torch: Any, module: Callable[[Any], Any], settings: dict[str, Any]) -> Loaded:
    def run(images: Array) -> Array:
        with torch.inference_mode():
            answer: Array = module(torch.from_numpy(images)).numpy()
        return answer

    return Loaded(run, {"threads": torch.get_num_threads(), **settings})


def load_torch(task: Task) -> Loaded:
    """Build the float network and run it eagerly."""
    return _in_torch(_torch(task), build_network(task.network), {})


def _compile(task: Task, torch: Any, module: Any) -> Loaded:
    import torch._inductor.config as inductor  # noqa: PLC0415 - as above

    inductor.freezing = True
    inductor.max_autotune = task.autotune
    return _in_torch(torch, torch.compile(module), {"freezing": True, "max_autotune": task.autotune})


def load_torch_compile(task: Task) -> Loaded:
    """Compile the float network with inductor, weights frozen."""
    torch = _torch(task)
    return _compile(task, torch, build_network(task.network))


def load_torch_int8(task: Task) -> Loaded:
    """Quantize with torchao's quantizer for x86 and compile with inductor, as torchao's tutorial does."""
    torch = _torch(task)
    if importlib.util.find_spec("torchao") is None:
        raise SkipEngineError("torchao is not installed; `make bench-cpu` installs it")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.quantization import pt2e  # noqa: PLC0415 - as above
    from torchao.quantization.pt2e import quantize_pt2e  # noqa: PLC0415 - as above
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # noqa: PLC0415 - as above

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    calibration = torch.from_numpy(make_images(task.network, CALIBRATION_IMAGES, CALIBRATION_SEED))
    with torch.no_grad():
        # The batch size is fixed, so that the compiled code is made for it.
        exported = torch.export.export(build_network(task.network), (calibration[: task.batch],)).module()
        prepared = quantize_pt2e.prepare_pt2e(exported, quantizer)
        for images in calibration.split(task.batch):
            if len(images) == task.batch:
                prepared(images)
        converted = quantize_pt2e.convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(converted)
    return _compile(task, torch, converted)


OURS = "ours"

#: In the order of tables and plots.
ENGINES: dict[str, Engine] = {
    OURS: Engine("vit-ptq int8", ("apache-tvm",), load_ours, "bundle", exact=True),
    "openvino-nncf": Engine("OpenVINO int8 (NNCF)", ("openvino", "nncf"), load_openvino_nncf, "nncf"),
    "openvino-int8": Engine(
        "OpenVINO, our int8 ONNX", ("openvino",), partial(load_openvino_preset, "openvino"), "preset:openvino"
    ),
    "onnxruntime-int8": Engine(
        "onnxruntime, our int8 ONNX",
        ("onnxruntime",),
        partial(load_onnxruntime_preset, "onnxruntime"),
        "preset:onnxruntime",
    ),
    "static-best": Engine(
        "onnxruntime quantize_static",
        ("onnxruntime",),
        partial(load_onnxruntime_static, "best"),
        "static:best",
        least_cosine=LOSSY_COSINE,
    ),
    "torch-int8": Engine("torch.compile int8 (torchao)", ("torch", "torchao"), load_torch_int8),
    "openvino-bf16": Engine(
        "OpenVINO bfloat16", ("openvino",), load_openvino_bfloat, "float_onnx", least_cosine=CLOSE_COSINE
    ),
    "openvino-fp32": Engine(
        "OpenVINO float32", ("openvino",), load_openvino_float, "float_onnx", least_cosine=FLOAT_COSINE
    ),
    "onnxruntime-fp32": Engine(
        "onnxruntime float32", ("onnxruntime",), load_onnxruntime_float, "float_onnx", least_cosine=FLOAT_COSINE
    ),
    "torch-compile": Engine("torch.compile float32", ("torch",), load_torch_compile, least_cosine=FLOAT_COSINE),
    "torch-fp32": Engine("torch float32", ("torch",), load_torch, least_cosine=FLOAT_COSINE),
}
# Each file in both runtimes, and what onnxruntime makes of the float network itself.
for _target in TARGETS:
    for _runtime, _title, _load in (
        ("onnxruntime", "onnxruntime", load_onnxruntime_preset),
        ("openvino", "OpenVINO", load_openvino_preset),
    ):
        if _runtime != _target:
            ENGINES[f"{_runtime}-{_target}"] = Engine(
                f"{_title}, {_target} file", (_runtime,), partial(_load, _target), f"preset:{_target}", preset=True
            )
ENGINES["static-default"] = Engine(
    "quantize_static, default",
    ("onnxruntime",),
    partial(load_onnxruntime_static, "default"),
    "static:default",
    preset=True,
    least_cosine=LOSSY_COSINE,
)


def steps_of(engines: Sequence[str]) -> list[str]:
    """Return the steps of the preparation that some engines need, each once, in an order that works."""
    needed = {ENGINES[engine].step for engine in engines if ENGINES[engine].step}
    # Other tools start from the float network.
    if any(step == "nncf" or step.startswith("static:") for step in needed):
        needed.add("float_onnx")
    return [step for step in STEPS if step in needed]


def load_engine(name: str, task: Task) -> tuple[Loaded, dict[str, str]]:
    """Load an engine quietly and return it with the versions of its packages.

    Raises:
        SkipEngineError: it cannot take part.
    """
    engine = ENGINES[name]
    versions = engine.versions()
    if engine.step and not task.files.made_by(engine.step).exists():
        raise SkipEngineError(f"{task.files.made_by(engine.step).name} was not made")
    # What compilers of other projects warn about is of no use to whoever reads the comparison.
    warnings.simplefilter("ignore")
    return engine.load(task), versions
