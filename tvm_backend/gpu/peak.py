"""What a GPU's tensor cores reach at most: a kernel that multiplies 8-bit codes in registers and does nothing else.

It uses the instructions that linears and attention use. On Hopper, whose full speed other instructions (``wgmma``)
reach, this is below the number of the data sheet, and no ceiling of linears that tuning has given tiles of those.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from quantizers.errors import TargetError, UsageError
from quantizers.integer.program import Node, TensorType
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.source import cuda_source
from tvm_backend.imports import import_tvm, tvm_version
from tvm_backend.kernels.cuda.instructions import Instructions, load_words, words, zero
from tvm_backend.kernels.cuda.threads import WARP, Threads
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, once, script, vocabulary
from tvm_backend.lower import Lowered
from tvm_backend.schedule import ARENA, INPUT, Argument, Call, Schedule
from tvm_backend.targets import CudaTarget

#: Fragments of each operand that a warp holds: as many sums as the pipeline is long, few enough for the registers.
_LEFT, _RIGHT = 2, 4
_DEPTH, _ROWS, _COLUMNS = 32, 16 * _LEFT, 8 * _RIGHT
_WARPS = 8
#: Of each product. Launching is forgotten over them, and int32 holds their sum.
REPEATS = 1000
#: Blocks that a multiprocessor has at once, or in a whole number of turns.
_BLOCKS = 8
_IN_A_ROW = 10

_OPERANDS = (("left", TensorType("int8", (_ROWS, _DEPTH))), ("right", TensorType("int8", (_COLUMNS, _DEPTH))))
_SUMS = TensorType("int32", (_WARPS, _ROWS, _COLUMNS))
#: CUDA C++ and architectures to a shared library.
Compile = Callable[[str, CudaTarget], bytes]


def lower_peak(target: CudaTarget, repeats: int = REPEATS) -> Lowered:
    """Return the kernel as a program of one call; a sample is what a block computes.

    Args:
        target: decides the instructions.
        repeats: of each product.
    """
    with vocabulary(Threads()):
        kernel = _emit(target, repeats)
    left, right = (Argument(INPUT, i, kind.dtype, *_matrix(kind)) for i, (_, kind) in enumerate(_OPERANDS))
    sums = Argument(ARENA, 0, _SUMS.dtype, *_matrix(_SUMS))
    macs = repeats * _WARPS * _ROWS * _COLUMNS * _DEPTH
    call = Call("peak", "sums", "peak", macs, (left, right, sums))
    result = Argument(ARENA, 0, _SUMS.dtype, 1, _SUMS.shape)
    module = import_tvm().IRModule({"peak": kernel.function.with_attr("global_symbol", "peak")})
    return Lowered(module, Schedule((call,), (result,), (), sums.nbytes(1)), ())


def build_peak(target: CudaTarget, compile_source: Compile, repeats: int = REPEATS) -> Bundle:
    """Return the kernel as a bundle.

    Inputs are int8 ``left`` (rows, 32) and ``right`` (columns, 32), the output int32 (warps, rows, columns): in each
    warp ``repeats * left @ right.T``.

    Args:
        target: architectures.
        compile_source: as :func:`tvm_backend.gpu.nvcc.compile_library` does, its compiler chosen.
        repeats: of each product.
    """
    lowered = lower_peak(target, repeats)
    source = cuda_source(lowered, target)
    return Bundle(
        target=target.name,
        arch=platform.machine(),
        cpu_features=(),
        program_sha256=hashlib.sha256(source.encode()).hexdigest(),
        inputs=_OPERANDS,
        outputs=(("sums", _SUMS),),
        tvm_version=tvm_version(),
        schedule=lowered.schedule,
        library=compile_source(source, target),
        constants=(),
    )


def int8_peak(bundle: Bundle, driver: Driver, rounds: int = 5) -> float:
    """Return the multiply-adds of 8-bit codes a second that the device reaches: the most that was seen.

    Args:
        bundle: from :func:`build_peak`.
        driver: of the device.
        rounds: measurements.

    Raises:
        TargetError: the sums are wrong, so that their time means nothing.
        UsageError: ``rounds`` is not positive.
    """
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}, expected at least 1")
    program, blocks = CudaProgram(bundle, driver), _BLOCKS * driver.processors()
    # Not zeros, which a GPU multiplies with less power, and so at a higher clock.
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-128, 128, (blocks, *kind.shape)).astype(np.int8) for _, kind in _OPERANDS)
    (call,) = bundle.schedule.calls
    repeats = call.macs // (_WARPS * _ROWS * _COLUMNS * _DEPTH)
    if not np.array_equal(program(left, right)[0], expected_sums(left, right, repeats)):
        raise TargetError("the kernel that measures the peak gives wrong sums; nothing is known of this device's peak")
    taken = [program.time_runs(blocks, _IN_A_ROW) for _ in range(rounds)]
    return 1000 * blocks * call.macs / min(taken)


def expected_sums(left: npt.NDArray[np.int8], right: npt.NDArray[np.int8], repeats: int) -> npt.NDArray[np.int32]:
    """Return what the kernel has to give for operands (blocks, rows or columns, 32)."""
    product = repeats * (left.astype(np.int32) @ right.astype(np.int32).transpose(0, 2, 1))
    return np.repeat(product[:, None], _WARPS, axis=1)


def _matrix(kind: TensorType) -> tuple[int, tuple[int, ...]]:
    layout = Layout.matrix(kind.shape)
    return layout.rows, layout.tail


def _emit(target: CudaTarget, repeats: int) -> Kernel:
    tirx, instructions = script(), Instructions(target)
    node = Node("sums", "peak", tuple(name for name, _ in _OPERANDS), {}, _SUMS)
    function = Function(node, [Operand(kind) for _, kind in _OPERANDS], Layout.matrix(_SUMS.shape))
    with function.body():
        left, right = (function.value(i, Layout.matrix(kind.shape)) for i, (_, kind) in enumerate(_OPERANDS))
        result = function.result()
        tirx.device_entry()
        block = tirx.cta_id([cast(function.rows // (_WARPS * _ROWS), "int32")])
        thread = tirx.thread_id([_WARPS * WARP])
        lane, warp = thread % WARP, thread // WARP
        first_left = once(cast(block, "int64") * _ROWS + cast(lane // 4, "int64"))
        first_right = once(cast(block, "int64") * _COLUMNS + cast(lane // 4, "int64"))

        def word(codes: Buffer, row: Expr, quarter: int) -> Expr:
            return load_words(codes.ptr_to([row, lane % 4 * 4 + 16 * quarter]), 1, "global")[0]

        lefts = [[word(left, first_left + (16 * i + 8 * (k % 2)), k // 2) for k in range(4)] for i in range(_LEFT)]
        rights = [[word(right, first_right + 8 * j, k) for k in range(2)] for j in range(_RIGHT)]
        sums = [words(4) for _ in range(_LEFT * _RIGHT)]
        for fragment in sums:
            zero(fragment, 4)
        with tirx.serial(repeats):
            for number, fragment in enumerate(sums):
                operands = lefts[number // _RIGHT], rights[number % _RIGHT]
                instructions.multiply(fragment, *operands, "int8", "int8")
        row = once(cast(block * _WARPS + warp, "int64") * _ROWS + cast(lane // 4, "int64"))
        for number, fragment in enumerate(sums):
            for cell in range(4):
                place = [row + (16 * (number // _RIGHT) + 8 * (cell // 2))]
                place.append(cast(lane % 4 * 2 + (8 * (number % _RIGHT) + cell % 2), "int64"))
                tirx.buffer_store(result, cast(fragment[cell], "int32"), place)
    return function.kernel()
