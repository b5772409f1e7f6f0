"""Batched matrix products of two values: attention scores, and attention weights times values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.arithmetic import cast, literal, minus
from tvm_backend.kernels.cpu.dot import LANES, Tile, accumulators, dot4, lane, load_group
from tvm_backend.kernels.cpu.function import Buffer, Expr, Function, local, script
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.targets import CpuTarget

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class _Product:
    """One matrix product: extents, zero points as the arithmetic of this kernel needs them, buffers.

    With the dot instruction the operands are ``u = a + 128`` (or a) and ``s = b - 128`` (or b), and
    ``sum (u - zero_a) (s - zero_b) = sum u s - zero_a sum s - zero_b sum u + depth zero_a zero_b``.
    """

    tile: Tile
    transposed: bool
    rows: int
    depth: int
    count: int
    signed_a: bool
    shift_b: int
    zero_a: int
    zero_b: int
    a: Buffer
    b: Buffer
    result: Buffer
    packed_dtype: str

    def _right(self, item: Expr, k: Expr, column: Expr) -> Expr:
        value = self.b[item, column, k] if self.transposed else self.b[item, k, column]
        return cast(minus(value, self.shift_b, "int32"), self.packed_dtype)

    def pack(self, item: Expr) -> Buffer:
        """Copy one right operand into packed order, zeros beyond its end."""
        tirx, tile = script(), self.tile
        tiles, groups = tile.columns(self.count), tile.groups(self.depth)
        shape = (tiles, groups, tile.width * tile.group)
        packed = tirx.alloc_buffer(shape, self.packed_dtype, scope="global")
        with (
            tirx.serial(tiles) as t,
            tirx.serial(groups) as group,
            tirx.serial(tile.width) as j,
            tirx.serial(tile.group) as offset,
        ):
            k, column = group * tile.group + offset, t * tile.width + j
            value = self._right(item, k, column)
            inside = tirx.And(k < self.depth, column < self.count)
            value = tirx.if_then_else(inside, value, literal(0, self.packed_dtype))
            tirx.buffer_store(packed, value, [t, group, j * tile.group + offset])
        return packed

    def column_terms(self, packed: Buffer, t: Expr) -> Buffer:
        """Return what each column's accumulators start from."""
        tirx, tile = script(), self.tile
        start = local(tile.width, "int32")
        for v in range(tile.vectors):
            at = lane(v)
            tirx.buffer_store(start, literal(0, "int32", LANES), [at])
        if tile.group == 4 and self.zero_a:
            ones = literal(0x01010101, "int32", LANES)
            with tirx.serial(tile.groups(self.depth)) as group:
                for v in range(tile.vectors):
                    at = lane(v)
                    codes = packed.vload([t, group, v * LANES * 4], f"int8x{LANES * 4}")
                    tirx.buffer_store(start, dot4(start[at], ones, codes), [at])
            for v in range(tile.vectors):
                at = lane(v)
                term = literal(self.depth * self.zero_b * self.zero_a, "int32", LANES)
                tirx.buffer_store(start, term - start[at] * literal(self.zero_a, "int32", LANES), [at])
        return start

    def multiply(
        self, item: Expr, packed: Buffer, t: Expr, first_row: Expr, start: Buffer
    ) -> tuple[list[Buffer], Buffer]:
        """Compute one tile; returns its sums and, where zero_b asks for it, the sum of each row of a."""
        tirx, tile = script(), self.tile
        sums = accumulators(tile)
        row_sums = local(tile.rows * LANES, "int32")
        for i in range(tile.rows):
            for v in range(tile.vectors):
                tirx.buffer_store(sums[i], start[lane(v)], [lane(v)])
            if tile.group == 4 and self.zero_b:
                tirx.buffer_store(row_sums, literal(0, "int32", LANES), [tirx.ramp(i * LANES, 1, LANES)])
        whole = self.depth // tile.group
        with tirx.serial(whole) as group:
            self._step(item, packed, t, first_row, group, tile.group, sums, row_sums)
        if self.depth % tile.group:
            self._step(item, packed, t, first_row, whole, self.depth % tile.group, sums, row_sums)
        return sums, row_sums

    def _step(
        self,
        item: Expr,
        packed: Buffer,
        t: Expr,
        first_row: Expr,
        group: Expr,
        count: int,
        sums: Sequence[Buffer],
        row_sums: Sequence[Buffer],
    ) -> None:
        tirx, tile = script(), self.tile
        length = LANES * tile.group
        for i in range(tile.rows):
            row = tirx.min(first_row + i, self.rows - 1)
            if tile.group == 4:
                word = load_group(self.a, [item, row], group * 4, count, signed=self.signed_a)
            else:
                word = minus(self.a[item, row, group], self.zero_a, "int32")
            codes = tirx.broadcast(word, LANES)
            for v in range(tile.vectors):
                right = packed.vload([t, group, v * length], f"{self.packed_dtype}x{length}")
                old = sums[i][lane(v)]
                new = dot4(old, codes, right) if tile.group == 4 else old + codes * cast(right, "int32", LANES)
                tirx.buffer_store(sums[i], new, [lane(v)])
            if tile.group == 4 and self.zero_b:
                # The codes beyond the end of a row are not zero here, so the ones beside them are.
                ones = literal(0x01010101 >> (8 * (4 - count)), "int32", LANES)
                at = tirx.ramp(i * LANES, 1, LANES)
                ones_bytes = tirx.reinterpret(ones, dtype="int8x64")
                tirx.buffer_store(row_sums, dot4(row_sums[at], codes, ones_bytes), [at])

    def store(
        self, item: Expr, t: Expr, first_row: Expr, columns: int, sums: Sequence[Buffer], row_sums: Sequence[Buffer]
    ) -> None:
        """Store the first ``columns`` columns of a tile, for the rows that exist."""
        tirx, tile = script(), self.tile
        for i in range(tile.rows):
            with tirx.If(first_row + i < self.rows), tirx.Then():
                for v in range(-(-columns // LANES)):
                    value = sums[i][lane(v)]
                    if tile.group == 4 and self.zero_b:
                        correction = row_sums[tirx.ramp(i * LANES, 1, LANES)] * literal(self.zero_b, "int32", LANES)
                        value = value - correction
                    column = t * tile.width + v * LANES
                    if (v + 1) * LANES <= columns:
                        tirx.buffer_store(self.result, value, [item, first_row + i, tirx.ramp(column, 1, LANES)])
                        continue
                    partial = local(LANES, "int32")
                    tirx.buffer_store(partial, value, [tirx.ramp(0, 1, LANES)])
                    with tirx.serial(columns - v * LANES) as j:
                        tirx.buffer_store(self.result, partial[j], [item, first_row + i, column + j])


def emit_matmul(node: Node, operands: Sequence[Operand], target: CpuTarget) -> Kernel:
    """``sum_k (a - zero_point_a) (b - zero_point_b)``, int32."""
    tirx = script()
    a, b = operands
    rows, depth = a.type.shape[-2:]
    count = node.type.shape[-1]
    signed_a, unsigned_b = a.type.dtype == "int8", b.type.dtype == "uint8"
    zero_a = node.integer("zero_point_a") + (128 if signed_a else 0)
    zero_b = node.integer("zero_point_b") - (128 if unsigned_b else 0)
    # The terms of the expanded product are bounded here, for the verifier bounds the product only.
    fits = depth * (255 + abs(zero_a)) * (128 + abs(zero_b)) <= _INT32_MAX
    dot = target.vnni and fits
    tile = Tile.choose(count, target, dot4=dot)
    shift_b = (128 if unsigned_b else 0) if dot else node.integer("zero_point_b")
    product_dtype = "int8" if dot else "int16" if abs(shift_b) < 2**14 else "int32"
    function = Function(node, operands, Layout.matrix(node.type.shape, 2))
    with function.body():
        buffers = [function.value(i, Layout.matrix(operand.type.shape, 2)) for i, operand in enumerate(operands)]
        product = _Product(
            tile, bool(node.integer("transpose_b")), rows, depth, count, signed_a, shift_b,
            zero_a=zero_a if dot else node.integer("zero_point_a"),
            zero_b=zero_b if dot else 0,
            a=buffers[0], b=buffers[1], result=function.result(), packed_dtype=product_dtype,
        )  # fmt: skip
        tiles = tile.columns(count)
        rest = count - (tiles - 1) * tile.width
        items = Layout.matrix(node.type.shape, 2).rows
        with tirx.parallel(function.rows) as item:
            left, right = (item if operand.batched else item % items for operand in operands)
            packed = product.pack(right)
            with tirx.serial(tiles) as t:
                start = product.column_terms(packed, t)
                with tirx.serial(-(-rows // tile.rows)) as row_tile:
                    first_row = row_tile * tile.rows
                    sums, row_sums = product.multiply(left, packed, t, first_row, start)
                    if rest == tile.width:
                        product.store(item, t, first_row, tile.width, sums, row_sums)
                    else:
                        with tirx.If(t < tiles - 1):
                            with tirx.Then():
                                product.store(item, t, first_row, tile.width, sums, row_sums)
                            with tirx.Else():
                                product.store(item, t, first_row, rest, sums, row_sums)
    return function.kernel()
