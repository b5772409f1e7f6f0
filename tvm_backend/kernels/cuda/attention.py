"""Attention on tensor cores: scores, integer softmax and the mixture of values, without a score leaving the registers.

A warp has 16 queries. Keys, then values, come through shared memory in blocks of 64. The codes of the scores stay where
the products leave them, four in a register: two neighbouring tiles of 8 keys in the lower and the upper half. That is
how the next product wants its left operand, but for the order of the keys within a step of 32, and values are read in
that same order: transposed, two keys of two channels a register, which a permutation of bytes turns into four keys of
one channel. What the softmax makes of the codes replaces them in place: exponentials, whose rows are divided once by
their sums at the end, or the probabilities of I-ViT's Shiftmax, whose upper bytes are a second operand beside them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence

from quantizers.integer.program import INTEGER_RANGES
from tvm_backend.kernels.cuda.instructions import (
    CHUNK,
    Instructions,
    barrier,
    load_matrices,
    permute_bytes,
    words,
    zero,
)
from tvm_backend.kernels.cuda.rescale import Numbers
from tvm_backend.kernels.cuda.runs import Run
from tvm_backend.kernels.cuda.score_stages import ScoreWriter
from tvm_backend.kernels.cuda.shared_rows import SharedRows, Source, common_unit
from tvm_backend.kernels.cuda.softmax_rows import DividedRows, ShiftmaxRows
from tvm_backend.kernels.cuda.tables import look_up
from tvm_backend.kernels.cuda.threads import WARP, over_lanes
from tvm_backend.kernels.cuda.tiles import SHARED_MEMORY
from tvm_backend.kernels.kernel import Kernel, Layout, Operand
from tvm_backend.kernels.shared.arithmetic import cast, literal
from tvm_backend.kernels.shared.attention import Attention, Divided, Published, item_offset
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, local, once, script
from tvm_backend.strides import Strided
from tvm_backend.targets import CudaTarget

#: Queries of a warp, and warps of a block at most.
_ROWS, _WARPS = 16, 4
#: Keys in shared memory at a time, and how many times that: products of one, the others on their way.
_KEYS, _STAGES = 64, 3
#: Keys of two tiles, and of one product with values.
_PAIR, _STEP = 16, 32
#: Registers that a thread may spend on what has to stay in them, of 255.
_REGISTERS = 140


def fits(rule: Attention) -> bool:
    """Tell whether the codes of a row of scores and the sums of a row of values fit the registers."""
    operands = len(_byte_weights(rule))
    codes = operands * 2 * -(-rule.keys // _PAIR)
    sums, queries = 2 * -(-rule.channels // CHUNK) * 4, -(-rule.depth // _STEP) * 4
    widest = max(_rounded(rule.depth, _STEP), _rounded(rule.channels, CHUNK))
    shared = _WARPS * _ROWS * _rounded(rule.depth, _STEP) + _STAGES * _KEYS * widest
    return codes + max(operands * sums, queries) <= _REGISTERS and shared <= SHARED_MEMORY


def emit_attention(rule: Attention, operands: Sequence[Operand], target: CudaTarget) -> Kernel:
    """``normalize_rows(exponentials(requantize(q k^T)) v)``, or Shiftmax and a rescaling, for all heads.

    Args:
        rule: the operators, for which :func:`fits` holds.
        operands: the values that hold queries, keys and values; the same one may stand for several.
        target: decides which instructions are used.
    """
    return _Writer(rule, operands, target).kernel()


def _byte_weights(rule: Attention) -> tuple[int, ...]:
    """Return how often each byte of a probability counts, the lower one first."""
    softmax = rule.softmax
    # Shiftmax of b bits reaches 2^(b-1), which takes b bits.
    return (1, 256) if isinstance(softmax, Published) and softmax.shiftmax.integer("bits") > 8 else (1,)


def _rounded(extent: int, unit: int) -> int:
    return -(-extent // unit) * unit


class _Writer:
    def __init__(self, rule: Attention, operands: Sequence[Operand], target: CudaTarget) -> None:
        self.rule, self.operands = rule, operands
        self.instructions = Instructions(target)
        self.warps = min(_WARPS, -(-rule.queries // _ROWS))
        self.threads = WARP * self.warps
        self.depth, self.channels = _rounded(rule.depth, _STEP), _rounded(rule.channels, CHUNK)
        #: Registers of codes come in fours, for one product with values.
        self.steps = -(-rule.keys // _STEP)
        self.pairs = self.steps * _STEP // _PAIR
        self.blocks = -(-rule.keys // _KEYS)
        self.dtypes = [operand.type.dtype for operand in operands]
        self.code_dtype = rule.stages[-1].node.type.dtype
        self.code_of_rows = rule.softmax.node.type.dtype

    def kernel(self) -> Kernel:
        tirx, rule = script(), self.rule
        flat = Layout(1, (math.prod(rule.result_node.type.shape),))
        function = Function(rule.result_node, self.operands, flat)
        with function.body():
            self._declare(function)
            tirx.device_entry()
            count, tiles = math.prod(rule.lead), -(-rule.queries // (_ROWS * self.warps))
            block = tirx.cta_id([cast(function.rows * (count * tiles), "int32")])
            thread = tirx.thread_id([self.threads])
            self.thread, self.lane = thread, thread % WARP
            item = once(cast(block // tiles, "int64"))
            self.sample, self.head = once(item // count), once(item % count)
            first_query = once(cast(block % tiles * (_ROWS * self.warps), "int64"))
            #: The two rows of scores that a thread has columns of.
            own = thread // WARP * _ROWS + self.lane // 4
            self.rows = [once(first_query + cast(own + 8 * half, "int64")) for half in range(2)]
            for held in (*self.stages, self.softmax):
                held.hold()
            self.zero_points = self.zeros.hold()
            storage = tirx.alloc_buffer((self._shared_bytes(),), "int8", scope="shared")
            queries = SharedRows(storage, 0, _ROWS * self.warps, self.depth)
            start, size = _ROWS * self.warps * self.depth, _KEYS * max(self.depth, self.channels)
            ring = [start + stage * size for stage in range(_STAGES)]
            views = ((1, rule.key, self.depth), (2, rule.value, self.channels))
            parts = [(*view, number) for view in views for number in range(self.blocks)]

            def arriving(number: int) -> SharedRows:
                return SharedRows(storage, ring[number % _STAGES], _KEYS, parts[number][2])

            def fetch(number: int) -> None:
                if number < len(parts):
                    operand, view, _, block_of_keys = parts[number]
                    width = rule.depth if operand == 1 else rule.channels
                    source = self._source(operand, view, rule.keys, width)
                    arriving(number).fetch(self.instructions, source, block_of_keys * _KEYS, 0, thread, self.threads)
                self.instructions.commit()

            source = self._source(0, rule.query, rule.queries, rule.depth)
            queries.fetch(self.instructions, source, first_query, 0, thread, self.threads)
            for number in range(_STAGES - 1):
                fetch(number)
            for number, (operand, _, _, block_of_keys) in enumerate(parts):
                self.instructions.wait(_STAGES - 2)
                barrier()
                fetch(number + _STAGES - 1)
                if number == 0:
                    self._begin_scores(queries)
                if operand == 1:
                    self._scores(arriving(number), block_of_keys)
                    continue
                if block_of_keys == 0:
                    self._probabilities()
                    self._begin_mixture()
                self._mix(arriving(number), block_of_keys)
            self._finish()
        return function.kernel()

    def _declare(self, function: Function) -> None:
        """Declare all arguments."""
        rule = self.rule
        self.sources: list[Buffer] = []
        for index, operand in enumerate(self.operands):
            same = next((i for i in range(index) if self.operands[i] is operand), index)
            layout = Layout(1, (math.prod(operand.type.shape),))
            self.sources.append(function.value(index, layout) if same == index else self.sources[same])
        self.stages = [ScoreWriter(stage, function, rule) for stage in rule.stages]
        softmax = rule.softmax
        self.softmax: DividedRows | ShiftmaxRows = (
            DividedRows(softmax, function, rule)
            if isinstance(softmax, Divided)
            else ShiftmaxRows(softmax, function, rule)
        )
        left, right = (rule.scores.integer(key) for key in ("zero_point_a", "zero_point_b"))
        self.centred = (left != 0, right != 0)
        self.zeros = Numbers(function, [left, right, rule.depth * left * right, rule.product.integer("zero_point_b")])
        self.levels = None if rule.levels is None else function.constant(rule.levels)
        self.result = function.result()

    def _shared_bytes(self) -> int:
        return _ROWS * self.warps * self.depth + _STAGES * _KEYS * max(self.depth, self.channels)

    def _source(self, operand: int, view: Strided, rows: int, width: int) -> Source:
        at = self._index(view)
        extents = [s for s, n in zip(view.strides[:-1], (*self.rule.lead, rows), strict=True) if n > 1]
        unit = common_unit(view.offset, width, math.prod(self.operands[operand].type.shape), *extents)
        return Source(self.sources[operand], at, literal(rows, "int64"), width, unit)

    def _index(self, view: Strided) -> Callable[[Expr, Expr], list[Expr]]:
        base = once(item_offset(self.head, self.rule.lead, view))
        return lambda row, channel: [self.sample, base + row * view.strides[-2] + channel]

    # Scores ------------------------------------------------------------------------------------------

    def _begin_scores(self, queries: SharedRows) -> None:
        """Read the queries, and what zero points of the keys take off each of their rows."""
        tirx = script()
        first = self.thread // WARP * _ROWS + self.lane % 16
        self.left = [
            load_matrices(queries.address(first, 2 * part + self.lane // 16), 4) for part in range(self.depth // _STEP)
        ]
        self.codes = words(2 * self.pairs)
        self.largest = local(2, "int32")
        for half in range(2):
            tirx.buffer_store(self.largest, literal(INTEGER_RANGES[self.code_dtype][0], "int32"), [half])
        self.starts = local(2, "int32")
        constant = cast(self.zero_points[2], "int32")
        sums = self._sums_with_ones(self.left, None) if self.centred[1] else None
        for half in range(2):
            start = constant
            if sums is not None:
                start = constant - cast(self.zero_points[1], "int32") * cast(sums[2 * half], "int32")
            tirx.buffer_store(self.starts, start, [half])

    def _sums_with_ones(self, rows: list[list[Expr]] | None, columns: list[list[Expr]] | None) -> Buffer:
        """Return the sums of a warp's rows or columns, in the places of the products that they belong to."""
        sums = words(4)
        zero(sums, 4)
        one = literal(0x01010101, "uint32")
        for part in range(self.depth // _STEP):
            if rows is not None:
                self.instructions.multiply(sums, rows[part], [one] * 2, self.dtypes[0], "int8")
            if columns is not None:
                self.instructions.multiply(sums, [one] * 4, columns[part], "int8", self.dtypes[1])
        return sums

    def _scores(self, keys: SharedRows, block: int) -> None:
        """Turn the products with a block of keys into codes."""
        tirx = script()
        first = block * _KEYS // _PAIR
        with tirx.unroll(min(_KEYS // _PAIR, self.pairs - first)) as pair:
            registers = words(2)
            zero(registers, 2)
            for tile in range(2):
                right = self._keys(keys, pair * _PAIR + tile * 8)
                sums = words(4)
                zero(sums, 4)
                for part, (a, b) in enumerate(zip(self.left, right, strict=True)):
                    del part
                    self.instructions.multiply(sums, a, b, self.dtypes[0], self.dtypes[1])
                taken = self._sums_with_ones(None, right) if self.centred[0] else None
                for half in range(2):
                    for e in range(2):
                        total = cast(sums[2 * half + e], "int32") + self.starts[half]
                        if taken is not None:
                            total = total - cast(self.zero_points[0], "int32") * cast(taken[e], "int32")
                        key = block * _KEYS + pair * _PAIR + tile * 8 + self.lane % 4 * 2 + e
                        self._place(total, half, key, registers, 2 * tile + e)
            for half in range(2):
                tirx.buffer_store(self.codes, registers[half], [2 * (first + pair) + half])

    def _keys(self, keys: SharedRows, row: Expr) -> list[list[Expr]]:
        """Read 8 keys: two words for each step of the depth."""
        chunks = self.depth // CHUNK
        found: list[Expr] = []
        for start in range(0, chunks, 4):
            count = min(4, chunks - start)
            chunk = start + self.lane // 8 % count
            found += load_matrices(keys.address(row + self.lane % 8, chunk), count)
        return [found[2 * part : 2 * part + 2] for part in range(self.depth // _STEP)]

    def _place(self, total: Expr, half: int, key: Expr, registers: Buffer, byte: int) -> None:
        """Put the code of a sum into its byte, and let it take part in its row's largest."""
        tirx = script()
        value = total
        for stage in self.stages:
            value = stage.code(value, self.head, self.rows[half], key)
        code = local(1, "int32")
        tirx.buffer_store(code, cast(value, "int32"), [0])
        with tirx.If(key < self.rule.keys), tirx.Then():
            tirx.buffer_store(self.largest, tirx.max(self.largest[half], code[0]), [half])
        bits = tirx.shift_left(tirx.bitwise_and(cast(code[0], "uint32"), literal(255, "uint32")), _word(8 * byte))
        tirx.buffer_store(registers, tirx.bitwise_or(registers[half], bits), [half])

    # Softmax -----------------------------------------------------------------------------------------

    def _probabilities(self) -> None:
        """Replace codes by the bytes of what multiplies the values, 0 for keys that do not exist."""
        tirx = script()
        for half in range(2):
            self._over_quad(self.largest, half, tirx.max)
        if isinstance(self.softmax, ShiftmaxRows):
            with tirx.unroll(self.pairs) as pair:
                for half in range(2):
                    for _, distance, exists in self._distances(pair, half):
                        with tirx.If(exists), tirx.Then():
                            self.softmax.add(distance, half)
            self.softmax.finish_sums(lambda sums, half: self._over_quad(sums, half, operator.add))
        self.bytes = [self.codes, *(words(2 * self.pairs) for _ in _byte_weights(self.rule)[1:])]
        self.totals = local(2, "int32")
        for half in range(2):
            tirx.buffer_store(self.totals, literal(0, "int32"), [half])
        with tirx.unroll(self.pairs) as pair:
            for half in range(2):
                found = [words(1) for _ in self.bytes]
                for word in found:
                    zero(word, 1)
                for byte, distance, exists in self._distances(pair, half):
                    entry = local(1, "int32")
                    tirx.buffer_store(entry, literal(0, "int32"), [0])
                    with tirx.If(exists), tirx.Then():
                        tirx.buffer_store(entry, self.softmax.probability(distance, half), [0])
                    tirx.buffer_store(self.totals, self.totals[half] + entry[0], [half])
                    for position, word in enumerate(found):
                        part = tirx.shift_right(cast(entry[0], "uint32"), _word(8 * position))
                        moved = tirx.shift_left(tirx.bitwise_and(part, _word(255)), _word(8 * byte))
                        tirx.buffer_store(word, tirx.bitwise_or(word[0], moved), [0])
                for target, word in zip(self.bytes, found, strict=True):
                    tirx.buffer_store(target, word[0], [2 * pair + half])
        for half in range(2):
            self._over_quad(self.totals, half, operator.add)

    def _distances(self, pair: Expr, half: int) -> Iterator[tuple[int, Expr, Expr]]:
        """Yield the bytes of a register of codes, their distances from the largest, and whether the keys exist."""
        tirx = script()
        for byte in range(4):
            bits = tirx.shift_right(self.codes[2 * pair + half], _word(8 * byte))
            # Both are bytes of the same kind and the largest is not below: modulo 256 the difference is the distance.
            distance = tirx.bitwise_and(self.largest[half] - cast(bits, "int32"), literal(255, "int32"))
            key = pair * _PAIR + byte // 2 * 8 + self.lane % 4 * 2 + byte % 2
            yield byte, distance, key < self.rule.keys

    def _over_quad(self, values: Buffer, half: int, combine: Callable[[Expr, Expr], Expr]) -> None:
        """Combine what the four threads of a row hold."""
        over_lanes(values, half, (1, 2), combine)

    # Values ------------------------------------------------------------------------------------------

    def _begin_mixture(self) -> None:
        self.mixtures = [[words(4) for _ in range(self.channels // 8)] for _ in self.bytes]
        for mixture in self.mixtures:
            for sums in mixture:
                zero(sums, 4)

    def _mix(self, values: SharedRows, block: int) -> None:
        """Add the products of exponentials and a block of values."""
        tirx = script()
        first = block * _KEYS // _STEP
        with tirx.unroll(min(_KEYS // _STEP, self.steps - first)) as step:
            start = 4 * (first + step)
            # Two rows of one pair of tiles, then of the next.
            lefts = [[part[start + i] for i in range(4)] for part in self.bytes]
            for chunk in range(self.channels // CHUNK):
                rows = values.address(step * _STEP + self.lane, chunk)
                found = load_matrices(rows, 4, transposed=True)
                for parity, selector in enumerate((0x6420, 0x7531)):
                    right = [permute_bytes(found[2 * i], found[2 * i + 1], selector) for i in range(2)]
                    for left, mixture in zip(lefts, self.mixtures, strict=True):
                        sums = mixture[2 * chunk + parity]
                        self.instructions.multiply(sums, left, right, "uint8", self.dtypes[2])

    def _finish(self) -> None:
        """Turn the sums of a row into codes and store them."""
        tirx, rule = script(), self.rule
        at = self._index(rule.result)
        extents = [s for s, n in zip(rule.result.strides[:-1], (*rule.lead, rule.queries), strict=True) if n > 1]
        whole = common_unit(rule.result.offset, rule.channels, math.prod(rule.result_node.type.shape), *extents)
        run = Run(self.result, 4, aligned=whole >= 4)
        weights = _byte_weights(rule)
        for half in range(2):
            row = self.rows[half]
            with tirx.If(row < rule.queries), tirx.Then():
                self.softmax.begin_row(self.head, self.totals[half])
                taken = once(self.zero_points[3] * cast(self.totals[half], "int64"))
                for chunk in range(self.channels // CHUNK):
                    channel = chunk * CHUNK + self.lane % 4 * 4
                    codes = []
                    for i in range(4):
                        # Even channels of a chunk are one tile, odd ones the next.
                        total = literal(0, "int32") - cast(taken, "int32")
                        for weight, mixture in zip(weights, self.mixtures, strict=True):
                            total = total + cast(mixture[2 * chunk + i % 2][2 * half + i // 2], "int32") * weight
                        code = self.softmax.code(total, self.head)
                        codes.append(code if self.levels is None else look_up(self.levels, code, self.code_of_rows))
                    with tirx.If(channel < rule.channels), tirx.Then():
                        sample, place = at(row, channel)
                        end = place - channel + rule.channels
                        run.store([sample, place], codes, end)


def _word(bits: int) -> Expr:
    return literal(bits, "uint32")
