"""Right operands that are computed, packed for the dot-product instruction, with what their zero points add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantizers.integer.program import Node
from tvm_backend.kernels.cpu.dot import Dot
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.function import Buffer, Expr, local, script

Index = Callable[[Expr, Expr], list[Expr]]


@dataclass(frozen=True)
class Packed:
    """``int8[item][vector][group][lanes * group size]``, zeros beyond the end, and where the sums start.

    With left codes u (shifted) and right codes s (of uint8, 128 less),
    ``sum (u - zero_u) (s - zero_s) = sum u s - zero_u sum s - zero_s sum u + depth zero_u zero_s``:
    the second and the last term are known for each column before the product.

    Args:
        dot: the instruction.
        codes: the packed operand.
        starts: int32[item][columns], what the accumulators start from.
        columns: columns of the operand.
        depth: length of the reduction.
        dtype: element type of the operand that was packed.
    """

    dot: Dot
    codes: Buffer
    starts: Buffer
    columns: int
    depth: int
    dtype: str

    @classmethod
    def declare(cls, dot: Dot, items: Expr, columns: int, depth: int, dtype: str) -> Packed:
        """Allocate a packed operand for each item."""
        tirx = script()
        vectors, groups = -(-columns // dot.lanes), -(-depth // dot.group)
        codes = tirx.alloc_buffer((items, vectors, groups, dot.lanes * dot.group), "int8", scope="global")
        starts = tirx.alloc_buffer((items, vectors * dot.lanes), "int32", scope="global")
        return cls(dot, codes, starts, columns, depth, dtype)

    @property
    def vectors(self) -> int:
        """Vectors of columns."""
        return -(-self.columns // self.dot.lanes)

    @property
    def groups(self) -> int:
        """Groups along the reduction."""
        return -(-self.depth // self.dot.group)

    def signed(self, code: Expr, lanes: int = 1) -> Expr:
        """Return a code of the operand as int8."""
        if self.dtype == "int8":
            return code
        suffix = f"x{lanes}" if lanes > 1 else ""
        return script().reinterpret(script().bitwise_xor(code, literal(128, "uint8", lanes)), dtype=f"int8{suffix}")

    def zero_points(self, node: Node, left: str) -> tuple[int, int]:
        """Return the zero points of both operands of a matmul as the instruction sees the codes."""
        zero_left = node.integer("zero_point_a") + self.dot.shift(left)
        return zero_left, node.integer("zero_point_b") - (128 if self.dtype == "uint8" else 0)

    def start(self, item: Expr, node: Node, left: str) -> None:
        """Compute what the accumulators of an item start from.

        Args:
            item: number of the operand.
            node: the ``matmul``.
            left: element type of its left operand.
        """
        tirx, lanes = script(), self.dot.lanes
        zero_left, zero_right = self.zero_points(node, left)
        with tirx.serial(self.vectors) as vector:
            at = tirx.ramp(0, 1, lanes)
            total = local(lanes, "int32")
            tirx.buffer_store(total, literal(0, "int32", lanes), [at])
            if zero_left:
                with tirx.serial(self.groups) as group:
                    tirx.buffer_store(total, self.dot.column_sums(total[at], self._load(item, vector, group)), [at])
            constant = literal(self.depth * zero_left * zero_right, "int32", lanes)
            value = constant - total[at] * literal(zero_left, "int32", lanes)
            tirx.buffer_store(self.starts, value, [item, tirx.ramp(vector * lanes, 1, lanes)])

    def multiply(
        self,
        item: Expr,
        first: Expr,
        width: int,
        read: Callable[[int, Expr], Expr],
        rows: int,
        terms: Sequence[Buffer],
    ) -> list[list[Expr]]:
        """Emit the product of a tile and return its sums, a list of vectors for each row.

        Args:
            item: number of the operand.
            first: first vector of columns.
            width: vectors.
            read: loads the word of a row and group of the left operand.
            rows: rows of the tile.
            terms: what :meth:`row_terms` returned for these rows.
        """
        tirx, lanes = script(), self.dot.lanes
        sums = [local(width * lanes, "int32") for _ in range(rows)]
        at = [tirx.ramp(v * lanes, 1, lanes) for v in range(width)]
        for partial in sums:
            for v in range(width):
                start = self.starts[item, tirx.ramp((first + v) * lanes, 1, lanes)]
                tirx.buffer_store(partial, start, [at[v]])
        with tirx.serial(self.groups) as group:
            for i, partial in enumerate(sums):
                word = read(i, group)
                for v in range(width):
                    codes = self._load(item, first + v, group)
                    tirx.buffer_store(partial, self.dot.multiply_add(partial[at[v]], word, codes), [at[v]])
        if not terms:
            return [[partial[index] for index in at] for partial in sums]
        every = tirx.ramp(0, 1, lanes)
        return [[partial[index] - term[every] for index in at] for partial, term in zip(sums, terms, strict=True)]

    def row_terms(self, read: Callable[[int, Expr], Expr], rows: int, zero_right: int, beyond: int = 0) -> list[Buffer]:
        """Emit what the zero point of this operand takes off each row of its products; nothing if it is 0.

        Once for all columns: in the loop of a tile the sums of the rows would take registers from the products.

        Args:
            read: loads the word of a row and group of the left operand.
            rows: rows of the tile.
            zero_right: what :meth:`zero_points` returned for this operand.
            beyond: sum of the left codes that stand beyond the end of the reduction.
        """
        if not zero_right:
            return []
        tirx, lanes = script(), self.dot.lanes
        every = tirx.ramp(0, 1, lanes)
        terms = [local(lanes, "int32") for _ in range(rows)]
        for term in terms:
            tirx.buffer_store(term, literal(-beyond, "int32", lanes), [every])
        ones = literal(1, "int8", lanes * self.dot.group)
        with tirx.serial(self.groups) as group:
            for i, term in enumerate(terms):
                tirx.buffer_store(term, self.dot.multiply_add(term[every], read(i, group), ones), [every])
        for term in terms:
            tirx.buffer_store(term, term[every] * literal(zero_right, "int32", lanes), [every])
        return terms

    def _load(self, item: Expr, vector: Expr, group: Expr) -> Expr:
        return self.codes.vload([item, vector, group, 0], f"int8x{self.dot.lanes * self.dot.group}")


def pack_rows(packed: Packed, source: Buffer, index: Index, item: Expr) -> None:
    """Pack an operand whose rows are the columns of the product: ``source[column, k]``."""
    tirx, dot = script(), packed.dot
    lanes, size = dot.lanes, dot.group
    whole = packed.depth // size

    def store(column: Expr, group: Expr, count: int) -> None:
        place = [item, column // lanes, group]
        lane = (column % lanes) * size
        if count == size:
            codes = packed.signed(source.vload(index(column, group * size), f"{source.dtype}x{size}"), size)
            tirx.buffer_store(packed.codes, codes, [*place, tirx.ramp(lane, 1, size)])
            return
        for offset in range(size):
            inside = offset < count
            code = packed.signed(source[tuple(index(column, group * size + offset))]) if inside else literal(0, "int8")
            tirx.buffer_store(packed.codes, code, [*place, lane + offset])

    with tirx.serial(packed.columns) as column:
        with tirx.serial(whole) as group:
            store(column, group, size)
        if packed.depth % size:
            store(column, whole, packed.depth % size)
    beyond = packed.vectors * lanes - packed.columns
    with tirx.serial(beyond) as extra, tirx.serial(packed.groups) as group:
        column = packed.columns + extra
        zeros = literal(0, "int8", size)
        lane = (column % lanes) * size
        tirx.buffer_store(packed.codes, zeros, [item, column // lanes, group, tirx.ramp(lane, 1, size)])


def pack_columns(packed: Packed, source: Buffer, index: Index, item: Expr) -> None:
    """Pack an operand that lies like the product: ``source[k, column]``, neighbours along the columns."""
    tirx, dot = script(), packed.dot
    lanes, size = dot.lanes, dot.group
    whole, rest = packed.depth // size, packed.depth % size

    def load(k: Expr, vector: Expr, columns: int) -> Expr:
        if columns == lanes:
            return packed.signed(source.vload(index(k, vector * lanes), f"{source.dtype}x{lanes}"), lanes)
        part = local(lanes, "int8")
        tirx.buffer_store(part, literal(0, "int8", lanes), [tirx.ramp(0, 1, lanes)])
        with tirx.serial(columns) as j:
            tirx.buffer_store(part, packed.signed(source[tuple(index(k, vector * lanes + j))]), [j])
        return part[tirx.ramp(0, 1, lanes)]

    def store(group: Expr, vector: Expr, count: int, columns: int) -> None:
        rows = [load(group * size + offset, vector, columns) for offset in range(count)]
        tirx.buffer_store(
            packed.codes, _interleave(rows, size, lanes), [item, vector, group, tirx.ramp(0, 1, lanes * size)]
        )

    def store_vector(vector: Expr, columns: int) -> None:
        with tirx.serial(whole) as group:
            store(group, vector, size, columns)
        if rest:
            store(whole, vector, rest, columns)

    with tirx.serial(packed.columns // lanes) as vector:
        store_vector(vector, lanes)
    if packed.columns % lanes:
        store_vector(packed.columns // lanes, packed.columns % lanes)


def _interleave(rows: Sequence[Expr], size: int, lanes: int) -> Expr:
    """Return bytes ``row0[0], row1[0], ..., row0[1], ...``; rows that are not there are zeros."""
    tirx = script()
    wide = f"uint{8 * size}"
    word = None
    for offset, row in enumerate(rows):
        byte = cast(tirx.reinterpret(row, dtype=f"uint8x{lanes}"), wide, lanes)
        shifted = tirx.shift_left(byte, literal(8 * offset, wide, lanes)) if offset else byte
        word = shifted if word is None else tirx.bitwise_or(word, shifted)
    return tirx.reinterpret(word, dtype=f"int8x{lanes * size}")
