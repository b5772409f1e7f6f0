"""What one warp or thread does in one go: products of tensor cores, copies into shared memory, wide loads and stores.

The same words for all generations of GPUs: before sm_80 a product of 16 by 8 by 32 codes is four of 8 by 8 by 16, whose
operands are the quarters of its own, and copies wait for what they read.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm_backend.imports import import_tvm
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script
from tvm_backend.targets import CudaTarget

#: Bytes of the widest copy, and of a row of an ``ldmatrix``.
CHUNK = 16
#: Bytes that one instruction can copy.
UNITS = (16, 8, 4)

#: What instructions call the element types.
SIGNS = {"int8": "s8", "uint8": "u8"}
_VECTORS = {1: "b32", 2: "v2.b32", 4: "v4.b32"}


def words(count: int) -> Buffer:
    """Declare 32-bit registers."""
    return local(count, "uint32")


def zero(registers: Buffer, count: int) -> None:
    """Set registers to 0."""
    for i in range(count):
        script().buffer_store(registers, literal(0, "uint32"), [i])


def load_words(address: Expr, count: int, space: str) -> list[Expr]:
    """Read 1, 2 or 4 neighbouring words from ``global`` or ``shared`` memory."""
    held = words(count)
    loaded = [held[i] for i in range(count)]
    script().evaluate(script().ptx[f"ld.{space}.{_VECTORS[count]}"](*loaded, address))
    return loaded


def store_words(address: Expr, values: Sequence[Expr], space: str) -> None:
    """Write 1, 2 or 4 neighbouring words."""
    held = words(len(values))
    for i, value in enumerate(values):
        script().buffer_store(held, value, [i])
    stored = [held[i] for i in range(len(values))]
    script().evaluate(script().ptx[f"st.{space}.{_VECTORS[len(values)]}"](address, *stored))


def load_matrices(address: Expr, count: int, *, transposed: bool = False) -> list[Expr]:
    """Read 2 or 4 matrices of 8 rows of 16 bytes from shared memory.

    Args:
        address: where each lane's row begins; lanes 8 i to 8 i + 7 point at the rows of matrix i.
        count: matrices.
        transposed: give a lane two bytes of each of two rows, instead of four bytes of one.
    """
    held = words(count)
    loaded = [held[i] for i in range(count)]
    kind = ".trans" if transposed else ""
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{kind}.shared.b16"
    script().evaluate(script().ptx[name](*loaded, address))
    return loaded


def permute_bytes(low: Expr, high: Expr, selector: int) -> Expr:
    """Return four of the eight bytes of two words, the lowest hexadecimal digit of the selector first."""
    held = words(1)
    script().evaluate(script().ptx["prmt.b32"](held[0], low, high, literal(selector, "uint32")))
    return held[0]


class Instructions:
    """The instructions that depend on the generation.

    Args:
        target: the oldest of its architectures decides.
    """

    def __init__(self, target: CudaTarget) -> None:
        self._recent = target.asynchronous_copies

    def multiply(
        self, sums: Buffer, left: Sequence[Expr], right: Sequence[Expr], left_dtype: str, right_dtype: str
    ) -> None:
        """Add a product of 16 by 32 and 32 by 8 codes to a warp's sums.

        Args:
            sums: four words a lane, as ``mma.m16n8k32`` hands them out.
            left: four words.
            right: two words.
            left_dtype: int8 or uint8.
            right_dtype: likewise.
        """
        tirx = script()
        kinds = f"row.col.s32.{SIGNS[left_dtype]}.{SIGNS[right_dtype]}.s32"
        if self._recent:
            cells = [sums[i] for i in range(4)]
            tirx.evaluate(tirx.ptx[f"mma.sync.aligned.m16n8k32.{kinds}"](*cells, *left, *right, *cells))
            return
        for half in range(2):
            for part in range(2):
                cells = [sums[2 * half + e] for e in range(2)]
                operands = (left[2 * part + half], right[part])
                tirx.evaluate(tirx.ptx[f"mma.sync.aligned.m8n8k16.{kinds}"](*cells, *operands, *cells))

    def copy(self, target: Expr, source: Expr, size: int, there: Expr | None = None) -> None:
        """Copy 4, 8 or 16 bytes from global to shared memory, by the next :meth:`wait` at the latest.

        Args:
            target: address, a multiple of ``size``.
            source: likewise; it has to be readable whether it is ``there`` or not.
            size: bytes.
            there: where false, zeros are written instead.
        """
        tirx = script()
        if self._recent:
            kind = "cg" if size == CHUNK else "ca"
            valid = []
            if there is not None:
                choose = import_tvm("tvm.tirx").Select
                valid = [choose(there, literal(size, "uint32"), literal(0, "uint32"))]
            tirx.evaluate(tirx.ptx[f"cp.async.{kind}.shared.global"](target, source, size, *valid))
            return
        count = size // 4
        loaded = load_words(source, count, "global")
        if there is not None:
            choose = import_tvm("tvm.tirx").Select
            loaded = [choose(there, word, literal(0, "uint32")) for word in loaded]
        store_words(target, loaded, "shared")

    def commit(self) -> None:
        """Close a group of copies."""
        if self._recent:
            script().evaluate(script().ptx["cp.async.commit_group"]())

    def wait(self, but: int) -> None:
        """Wait for this thread's groups of copies, all but the last few."""
        if self._recent:
            script().evaluate(script().ptx["cp.async.wait_group"](but))


def barrier() -> None:
    """Wait for all threads of the block."""
    script().evaluate(script().cuda.cta_sync())
