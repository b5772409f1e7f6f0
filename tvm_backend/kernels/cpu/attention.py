"""One attention head: scores, integer softmax and the mixture of values, without a score leaving the cache.

A first parallel loop packs the keys and the values of every head as the dot-product instruction reads them. A
second one goes through tiles of queries: their scores are requantized to codes in a small row buffer, which the
table of exponentials turns into un-normalized probabilities; these multiply the values, and each row is divided
once by its sum. Where the reader has a codebook, a table of 256 entries turns the codes into its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantizers.integer.program import INTEGER_RANGES
from tvm_backend.imports import import_tvm
from tvm_backend.kernels.cpu.byte_table import WIDTH, TableStore, by_unsigned_code, join, look_up, store_part
from tvm_backend.kernels.cpu.dot import DOTS, Dot
from tvm_backend.kernels.cpu.pack import Packed, pack_columns, pack_rows
from tvm_backend.kernels.cpu.panel import Panel
from tvm_backend.kernels.cpu.rescale import rescale
from tvm_backend.kernels.cpu.score_stages import ScoreWriter
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal, saturate, shift_round
from tvm_backend.kernels.shared.attention import Attention, Divided, item_offset
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, once, script
from tvm_backend.kernels.shared.softmax import Numerators
from tvm_backend.strides import Strided
from tvm_backend.targets import CpuTarget

#: Queries of one register tile, and tiles that one task works through.
_ROWS = 6
_TILES_PER_TASK = 4


def fits(rule: Attention) -> bool:
    """Tell whether the kernel can be written: for exponentials that are divided at the end."""
    return isinstance(rule.softmax, Divided)


def emit_attention(rule: Attention, operands: Sequence[Operand], target: CpuTarget) -> Kernel:
    """``normalize_rows(exponentials(requantize(q k^T)) v)`` for all heads.

    Args:
        rule: the operators, for which :func:`fits` holds.
        operands: the values that hold queries, keys and values; the same one may stand for several.
        target: decides which instructions are used.
    """
    return _Writer(rule, operands, target).kernel()


def even_runs(vectors: int, widest: int) -> list[tuple[int, int, int]]:
    """Split vectors into tiles of almost equal width: (first vector, tiles, width) of at most two runs."""
    tiles = -(-vectors // widest)
    narrow, wide_tiles = vectors // tiles, vectors % tiles
    runs = [(0, wide_tiles, narrow + 1), (wide_tiles * (narrow + 1), tiles - wide_tiles, narrow)]
    return [run for run in runs if run[1]]


class _Writer:
    def __init__(self, rule: Attention, operands: Sequence[Operand], target: CpuTarget) -> None:
        self.rule, self.operands, self.target = rule, operands, target
        assert isinstance(rule.softmax, Divided)
        self.softmax = rule.softmax
        self.dot: Dot = DOTS[target.dot]
        self.lead, self.queries, self.keys, self.channels = rule.lead, rule.queries, rule.keys, rule.channels
        self.depth = rule.depth
        self.code_dtype = rule.stages[-1].node.type.dtype
        self.score_vectors = -(-self.keys // self.dot.lanes)
        self.channel_vectors = -(-self.channels // self.dot.lanes)
        # Whole lookups and whole groups of keys.
        self.padded_keys = -(-self.score_vectors * self.dot.lanes // WIDTH) * WIDTH

    def kernel(self) -> Kernel:
        tirx, rule = script(), self.rule
        flat = Layout(1, (int(np.prod(rule.result_node.type.shape)),))
        function = Function(rule.result_node, self.operands, flat)
        count = int(np.prod(self.lead))
        with function.body():
            sources: dict[int, Buffer] = {}
            buffers = []
            for index, operand in enumerate(self.operands):
                same = next((i for i in range(index) if self.operands[i] is operand), index)
                if same == index:
                    sources[index] = function.value(index, Layout(1, (int(np.prod(operand.type.shape)),)))
                buffers.append(sources[same])
            table = by_unsigned_code(self.softmax.table, "uint8")
            self.table = function.constant(table)
            self.numerators = Numerators(self.softmax.numerator, function, self.lead)
            self.stages = [ScoreWriter(stage, function, self.lead, self.keys, self.dot.lanes) for stage in rule.stages]
            mask = np.zeros(WIDTH, np.int8)
            mask[: self.keys - (self.padded_keys - WIDTH)] = -1
            self.mask = function.constant(mask)
            self.levels: TableStore | None = None
            if rule.levels is not None:
                self.levels = TableStore(rule.levels, self.softmax.node.type.dtype, function, self.target)
            result = function.result()
            items = function.rows * count
            keys, values = self._pack(buffers, items, count)
            tiles = -(-self.queries // _ROWS)
            blocks = -(-tiles // _TILES_PER_TASK)
            with tirx.parallel(items * blocks) as task:
                item, block = once(task // blocks), once(task % blocks)
                numerator = self.numerators.of(item % count)
                rows = tirx.alloc_buffer((_ROWS, self.padded_keys), "uint8", scope="global")
                if self.padded_keys > self.score_vectors * self.dot.lanes:
                    # Score tiles never write these, and lookups read them.
                    with (
                        tirx.serial(_ROWS) as i,
                        tirx.serial(self.score_vectors * self.dot.lanes, self.padded_keys) as j,
                    ):
                        tirx.buffer_store(rows, literal(0, "uint8"), [i, j])
                panel = Panel(
                    self.dot, buffers[0], self._index(rule.query, item, count),
                    self.operands[0].type.dtype, self.depth, _ROWS,
                )  # fmt: skip
                with tirx.serial(_TILES_PER_TASK) as step:
                    first = (block * _TILES_PER_TASK + step) * _ROWS
                    with tirx.If(first < self.queries), tirx.Then():
                        at = [once(tirx.min(first + i, self.queries - 1)) for i in range(_ROWS)]
                        self._scores(panel, at, keys, item, count, rows)
                        sums = self._exponentials(rows)
                        reciprocals = self._reciprocals(numerator, sums)
                        self._mix(result, at, rows, reciprocals, values, item, count)
        return function.kernel()

    def _index(self, view: Strided, item: Expr, count: int) -> Callable[[Expr, Expr], list[Expr]]:
        sample, base = once(item // count), once(item_offset(item % count, self.lead, view))
        return lambda row, channel: [sample, base + row * view.strides[-2] + channel]

    def _pack(self, buffers: Sequence[Buffer], items: Expr, count: int) -> tuple[Packed, Packed]:
        tirx, rule, dot = script(), self.rule, self.dot
        _, key, value = (operand.type.dtype for operand in self.operands)
        keys = Packed.declare(dot, items, self.keys, self.depth, key)
        values = Packed.declare(dot, items, self.channels, self.keys, value)
        with tirx.parallel(items) as item:
            pack_rows(keys, buffers[1], self._index(rule.key, item, count), item)
            keys.start(item, rule.scores, self.operands[0].type.dtype)
            pack_columns(values, buffers[2], self._index(rule.value, item, count), item)
            values.start(item, rule.product, "uint8")
        return keys, values

    def _scores(self, panel: Panel, at: Sequence[Expr], keys: Packed, item: Expr, count: int, rows: Buffer) -> None:
        tirx, dot, rule = script(), self.dot, self.rule
        lanes = dot.lanes
        read = panel.fill(at)
        zero_right = keys.zero_points(rule.scores, self.operands[0].type.dtype)[1]
        terms = keys.row_terms(read, _ROWS, zero_right)
        head = item % count
        for first, tiles, width in even_runs(self.score_vectors, dot.accumulators // _ROWS):
            with tirx.serial(tiles) as tile:
                vector = first + tile * width
                totals = keys.multiply(item, vector, width, read, _ROWS, terms)
                for i, (row, vectors) in enumerate(zip(at, totals, strict=True)):
                    codes = [self._coded(value, head, row, (vector + v) * lanes) for v, value in enumerate(vectors)]
                    joined = join(codes, lanes)
                    if self.code_dtype != "uint8":
                        joined = tirx.reinterpret(joined, dtype=f"uint8x{lanes * width}")
                    tirx.buffer_store(rows, joined, [i, tirx.ramp(vector * lanes, 1, lanes * width)])

    def _coded(self, scores: Expr, head: Expr, row: Expr, column: Expr) -> Expr:
        for stage in self.stages:
            scores = stage.apply(scores, head, row, column)
        return scores

    def _exponentials(self, rows: Buffer) -> Buffer:
        """Replace the codes of each row by exponentials, zero beyond the last key; return the sums."""
        tirx = script()
        sums = local(_ROWS, "int32")
        with tirx.serial(_ROWS) as i:
            if self.target.byte_tables:
                self._wide_exponentials(rows, sums, i)
            else:
                self._plain_exponentials(rows, sums, i)
        return sums

    def _wide_exponentials(self, rows: Buffer, sums: Buffer, i: Expr) -> None:
        tirx = script()
        dtype = self.code_dtype
        chunks = self.padded_keys // WIDTH
        mask = self.mask.vload([0], f"int8x{WIDTH}")
        lowest = literal(INTEGER_RANGES[dtype][0], dtype, WIDTH)

        def load(chunk: Expr) -> Expr:
            codes = rows.vload([i, chunk * WIDTH], f"uint8x{WIDTH}")
            return codes if dtype == "uint8" else tirx.reinterpret(codes, dtype=f"int8x{WIDTH}")

        largest = local(WIDTH, dtype)
        every = tirx.ramp(0, 1, WIDTH)
        kept = tirx.bitwise_and(load(chunks - 1), tirx.reinterpret(mask, dtype=f"{dtype}x{WIDTH}"))
        outside = tirx.bitwise_and(lowest, tirx.reinterpret(tirx.bitwise_not(mask), dtype=f"{dtype}x{WIDTH}"))
        tirx.buffer_store(largest, tirx.bitwise_or(kept, outside), [every])
        with tirx.serial(chunks - 1) as chunk:
            tirx.buffer_store(largest, tirx.max(largest[every], load(chunk)), [every])
        reduce = "llvm.vector.reduce.smax" if dtype == "int8" else "llvm.vector.reduce.umax"
        peak = tirx.call_llvm_pure_intrin(tirx.llvm_lookup_intrinsic_id(reduce), largest[every], dtype=dtype)
        top = local(1, dtype)
        tirx.buffer_store(top, peak, [0])
        lanes = self.dot.lanes
        totals, every_total = local(lanes, "int32"), tirx.ramp(0, 1, lanes)
        tirx.buffer_store(totals, literal(0, "int32", lanes), [every_total])

        def exponentials(chunk: Expr, *, last: bool) -> None:
            distance = tirx.reinterpret(tirx.broadcast(top[0], WIDTH), dtype=f"int8x{WIDTH}") - tirx.reinterpret(
                load(chunk), dtype=f"int8x{WIDTH}"
            )
            value = look_up(self.table, distance)
            # Held in a variable: an expression that is used again would read the codes again, after their end.
            held = local(WIDTH, "int8")
            tirx.buffer_store(held, tirx.bitwise_and(value, mask) if last else value, [every])
            entries = held[every]
            codes = tirx.reinterpret(entries, dtype=f"uint8x{WIDTH}")
            tirx.buffer_store(rows, codes, [i, tirx.ramp(chunk * WIDTH, 1, WIDTH)])
            ones = tirx.reinterpret(literal(0x01010101, "int32", lanes), dtype=f"int8x{WIDTH}")
            word = tirx.reinterpret(entries, dtype=f"int32x{lanes}")
            tirx.buffer_store(totals, self.dot.multiply_add(totals[every_total], word, ones), [every_total])

        with tirx.serial(chunks - 1) as chunk:
            exponentials(chunk, last=False)
        exponentials(chunks - 1, last=True)
        add = tirx.llvm_lookup_intrinsic_id("llvm.vector.reduce.add")
        tirx.buffer_store(sums, tirx.call_llvm_pure_intrin(add, totals[every_total], dtype="int32"), [i])

    def _plain_exponentials(self, rows: Buffer, sums: Buffer, i: Expr) -> None:
        tirx = script()
        dtype = self.code_dtype

        def code(j: Expr) -> Expr:
            byte = rows[i, j]
            return cast(byte if dtype == "uint8" else tirx.reinterpret(byte, dtype="int8"), "int32")

        largest, total = local(1, "int32"), local(1, "int32")
        tirx.buffer_store(largest, literal(INTEGER_RANGES[dtype][0], "int32"), [0])
        tirx.buffer_store(total, literal(0, "int32"), [0])
        with tirx.serial(self.keys) as j:
            tirx.buffer_store(largest, tirx.max(largest[0], code(j)), [0])
        with tirx.serial(self.keys) as j:
            tirx.buffer_store(rows, self.table[largest[0] - code(j)], [i, j])
        with tirx.serial(self.keys) as j:
            tirx.buffer_store(total, total[0] + cast(rows[i, j], "int32"), [0])
        with tirx.serial(self.keys, self.padded_keys) as j:
            tirx.buffer_store(rows, literal(0, "uint8"), [i, j])
        tirx.buffer_store(sums, total[0], [i])

    def _reciprocals(self, numerator: Expr, sums: Buffer) -> Buffer:
        wide = "int32" if self.softmax.narrow_reciprocal else "int64"
        reciprocals = local(_ROWS, wide)
        for i in range(_ROWS):
            # Both are positive, where truncation is the floor.
            quotient = import_tvm("tvm.tirx").truncdiv(numerator, cast(sums[i], "int64"))
            script().buffer_store(reciprocals, cast(quotient, wide), [i])
        return reciprocals

    def _mix(
        self, result: Buffer, at: Sequence[Expr], rows: Buffer, reciprocals: Buffer, values: Packed, item: Expr,
        count: int,
    ) -> None:  # fmt: skip
        tirx, dot = script(), self.dot
        lanes = dot.lanes
        panel = Panel(dot, rows, lambda row, k: [row, k], "uint8", values.groups * dot.group, _ROWS)
        read = panel.fill(list(range(_ROWS)))
        zero_right = values.zero_points(self.rule.product, "uint8")[1]
        beyond = (values.groups * dot.group - self.keys) * dot.shift("uint8")
        terms = values.row_terms(read, _ROWS, zero_right, beyond)
        place = self._index(self.rule.result, item, count)
        for first, tiles, width in even_runs(self.channel_vectors, dot.accumulators // _ROWS):
            with tirx.serial(tiles) as tile:
                vector = first + tile * width
                totals = values.multiply(item, vector, width, read, _ROWS, terms)
                for i, vectors in enumerate(totals):
                    codes = [self._divided(v, reciprocals[i], lanes) for v in vectors]
                    start = place(at[i], vector * lanes)
                    whole = self.channels - (first + (tiles - 1) * width) * lanes >= width * lanes
                    columns = width * lanes if whole else tirx.min(width * lanes, self.channels - vector * lanes)
                    if self.levels is not None:
                        self.levels.store(result, start, codes, lanes, columns)
                    elif whole:
                        sample, channel = start
                        place_of_all = [sample, tirx.ramp(channel, 1, width * lanes)]
                        tirx.buffer_store(result, join(codes, lanes), place_of_all)
                    else:
                        store_part(result, start, join(codes, lanes), width * lanes, columns)

    def _divided(self, sums: Expr, reciprocal: Expr, lanes: int) -> Expr:
        tirx, node = script(), self.softmax.node
        factor = tirx.broadcast(reciprocal, lanes)
        if self.softmax.narrow_reciprocal:
            return rescale(node, [(sums, factor)], lanes, narrow=True)
        return saturate(shift_round(cast(sums, "int64", lanes) * factor, node.integer("shift"), lanes), node, lanes)
