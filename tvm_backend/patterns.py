"""Groups of operators that one kernel computes, found in a program before any kernel is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantizers.integer.bounds import Interval
from quantizers.integer.program import IntegerProgram, Node
from tvm_backend.kernels.shared.attention import Attention, Divided, Published, ScoreStage
from tvm_backend.kernels.shared.epilogue import Epilogue, Rescale, fits_int32, operand_zero_point
from tvm_backend.strides import VIEWS, Strided, strided_source, strided_target

_BYTES = ("int8", "uint8")
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class FusedLinear:
    """A linear and the operators that alone read it, one after the other.

    Args:
        linear: the first node.
        last: the node whose value the kernel computes.
        members: all nodes, first to last.
        epilogue: what the kernel does to its sums.
        addend: the value that the epilogue adds, if it adds one.
    """

    linear: Node
    last: Node
    members: tuple[Node, ...]
    epilogue: Epilogue
    addend: str | None


@dataclass(frozen=True)
class FusedAttention:
    """The operators of an attention.

    Args:
        last: the node whose value the kernel computes.
        members: all nodes, first to last.
        rule: what the kernel computes.
        operands: the values that hold queries, keys and values.
    """

    last: Node
    members: tuple[Node, ...]
    rule: Attention
    operands: tuple[str, str, str]


class Patterns:
    """Looks for groups in one program.

    Args:
        program: verified.
        bounds: of every value, as the verifier returned them.
    """

    def __init__(self, program: IntegerProgram, bounds: Mapping[str, Interval]) -> None:
        self._program, self._bounds = program, bounds
        self._nodes = {node.name: node for node in program.nodes}
        self._types = program.types()
        self._reads: Counter[str] = Counter(name for node in program.nodes for name in node.inputs)
        self._reads.update(value for _, value in program.outputs)
        self._readers: dict[str, Node] = {name: node for node in program.nodes for name in node.inputs}

    def find(self) -> dict[str, FusedLinear | FusedAttention]:
        """Return the groups by the name of their last node."""
        found: dict[str, FusedLinear | FusedAttention] = {}
        for node in self._program.nodes:
            group: FusedLinear | FusedAttention | None = None
            if node.op == "linear":
                group = self._linear(node)
            elif node.op == "normalize_rows":
                group = self._divided(node)
            elif node.op == "requantize":
                group = self._published(node)
            if group is not None:
                found[group.last.name] = group
        return found

    def _only_reader(self, node: Node) -> Node | None:
        return self._readers.get(node.name) if self._reads[node.name] == 1 else None

    def _producer(self, name: str, op: str, reads: int = 1) -> Node | None:
        node = self._nodes.get(name)
        return node if node is not None and node.op == op and self._reads[name] == reads else None

    def _byte_lookup(self, node: Node) -> Node | None:
        """Return the table of bytes that alone reads a node's 8-bit codes, if one does."""
        reader = self._only_reader(node)
        if reader is None or reader.op != "lookup":
            return None
        return reader if {node.type.dtype, reader.type.dtype} <= set(_BYTES) else None

    def _per_column(self, name: str) -> bool:
        return math.prod(self._program.constants[name].shape[:-1]) == 1

    # Linear ------------------------------------------------------------------------------------------

    def _linear(self, linear: Node) -> FusedLinear | None:
        constants, reader = self._program.constants, self._only_reader(linear)
        if reader is None:
            return None
        if reader.op == "requantize" and self._per_column(reader.inputs[1]):
            multiplier = constants[reader.inputs[1]]
            # Taking a zero point off the sums must stay within int32 as well.
            bounds = self._centred(reader, 0)
            if bounds.magnitude > _INT32_MAX:
                return None
            narrow = self._narrow([(bounds, reader.inputs[1])], reader)
            rescale = Rescale(reader, multiplier, narrow)
            follower = self._byte_lookup(reader)
            if follower is not None:
                epilogue = Epilogue(rescale, constants[follower.inputs[1]], follower.type.dtype)
                return FusedLinear(linear, follower, (linear, reader, follower), epilogue, None)
            return FusedLinear(linear, reader, (linear, reader), Epilogue(rescale, None, reader.type.dtype), None)
        if reader.op == "add":
            return self._residual(linear, reader)
        return None

    def _residual(self, linear: Node, add: Node) -> FusedLinear | None:
        position = add.inputs.index(linear.name)
        other = add.inputs[1 - position]
        multipliers = add.inputs[2:]
        if (
            other in self._program.constants
            or self._types[other].shape != add.type.shape
            or linear.type.shape != add.type.shape
            or not all(self._per_column(name) for name in multipliers)
        ):
            return None
        centred = [self._centred(add, operand) for operand in range(2)]
        if any(bounds.magnitude > _INT32_MAX for bounds in centred):
            return None
        narrow = self._narrow(list(zip(centred, multipliers, strict=True)), add)
        constants = self._program.constants
        rescale = Rescale(
            add,
            constants[multipliers[position]],
            narrow,
            position,
            addend=3,
            addend_multiplier=constants[multipliers[1 - position]],
        )
        return FusedLinear(linear, add, (linear, add), Epilogue(rescale, None, add.type.dtype), other)

    # Attention ---------------------------------------------------------------------------------------

    def _divided(self, normalize: Node) -> FusedAttention | None:
        """Exponentials, their sum, their product with the values, and one division a row."""
        product = self._producer(normalize.inputs[0], "matmul")
        total = self._producer(normalize.inputs[1], "row_sum")
        if product is None or total is None:
            return None
        exponentials = self._producer(product.inputs[0], "exponentials", reads=2)
        if exponentials is None or total.inputs[0] != exponentials.name or not self._terms_fit(product):
            return None
        # The reciprocals of all heads have one type, which the largest decides.
        numerator, smallest = self._bounds[normalize.inputs[2]].high, self._bounds[total.name].low
        quotient = numerator // smallest
        reach = numerator * -(-self._bounds[product.name].magnitude // self._bounds[total.name].high)
        shift = normalize.integer("shift")
        narrow_reciprocal = (
            quotient <= _INT32_MAX
            and ((reach + (1 << (shift - 1))) >> shift) + abs(normalize.integer("zero_point")) + 1 <= _INT32_MAX
        )
        constants = self._program.constants
        table, numerators = constants[exponentials.inputs[1]], constants[normalize.inputs[2]]
        softmax = Divided(table, normalize, numerators, narrow_reciprocal)
        return self._attention(exponentials, (exponentials, total), product, softmax)

    def _published(self, requantize: Node) -> FusedAttention | None:
        """I-ViT's Shiftmax, the product of its probabilities with the values, and a rescaling."""
        product = self._producer(requantize.inputs[0], "matmul")
        shiftmax = None if product is None else self._producer(product.inputs[0], "shiftmax")
        last = self._requantized_scores(requantize)
        if product is None or shiftmax is None or last is None:
            return None
        return self._attention(shiftmax, (shiftmax,), product, Published(shiftmax, last))

    def _attention(
        self, first: Node, inside: tuple[Node, ...], product: Node, softmax: Divided | Published
    ) -> FusedAttention | None:
        """Look around a softmax.

        Args:
            first: of its nodes, whose first operand are the codes of the scores.
            inside: its nodes up to the product.
            product: of probabilities and values.
            softmax: the rule.
        """
        found = self._score_stages(first.inputs[0])
        if found is None or product.integer("transpose_b") or product.integer("zero_point_a"):
            return None
        scores, stages = found
        node, constants = softmax.node, self._program.constants
        inner = (scores, *(stage.node for stage in stages), *inside, product, node)
        names = (*scores.inputs, product.inputs[1])
        types = [self._types[name] for name in names]
        if (
            any(kind.dtype not in _BYTES for kind in types)
            or any(name in constants for name in names)
            or stages[-1].node.type.dtype not in _BYTES
            or not self._terms_fit(scores)
        ):
            return None
        views = [self._source(name) for name in names]
        lookup = self._byte_lookup(node)
        coded = lookup or node
        chain = tuple(self._views_of(coded))
        while chain and (target := strided_target(chain, node.type.shape)) is None:
            chain = chain[:-1]
        target = strided_target(chain, node.type.shape)
        assert target is not None
        if target.strides[-1] != 1 and node.type.shape[-1] > 1:
            chain, target = (), strided_target((), node.type.shape)
            assert target is not None
        last = chain[-1] if chain else coded
        rule = Attention(
            scores=scores,
            stages=stages,
            softmax=softmax,
            product=product,
            levels=None if lookup is None else constants[lookup.inputs[1]],
            query=views[0][1],
            key=views[1][1],
            value=views[2][1],
            result=target,
            result_node=last,
            depth=types[0].shape[-1],
        )
        query, key, value = (name for name, _ in views)
        tail = chain if lookup is None else (lookup, *chain)
        return FusedAttention(last, (*inner, *tail), rule, (query, key, value))

    def _score_stages(self, name: str) -> tuple[Node, tuple[ScoreStage, ...]] | None:
        """Follow codes back to the matmul of queries and keys; return it and the stages in order."""
        constants = self._program.constants
        stages: list[ScoreStage] = []
        while (node := self._nodes.get(name)) is not None and self._reads[name] == 1 and node.op != "matmul":
            stage: ScoreStage | None = None
            name = node.inputs[0]
            if node.op == "requantize":
                stage = self._requantized_scores(node)
            elif node.op == "add":
                fixed = [position for position in range(2) if node.inputs[position] in constants]
                if len(fixed) == 1:
                    name = node.inputs[1 - fixed[0]]
                    stage = self._biased_scores(node, 1 - fixed[0])
            if stage is None:
                return None
            stages.insert(0, stage)
        if node is None or node.op != "matmul" or self._reads[name] != 1 or not node.integer("transpose_b"):
            return None
        return (node, tuple(stages)) if stages else None

    def _requantized_scores(self, node: Node) -> ScoreStage | None:
        multiplier = self._program.constants[node.inputs[1]]
        bounds = self._centred(node, 0)
        narrow = self._narrow([(bounds, node.inputs[1])], node)
        if math.prod(multiplier.shape[-2:]) != 1 or bounds.magnitude > _INT32_MAX:
            return None
        return ScoreStage(node, multiplier, narrow)

    def _biased_scores(self, node: Node, position: int) -> ScoreStage | None:
        constants = self._program.constants
        scores, other = node.inputs[position], node.inputs[1 - position]
        multiplier, factor = (constants[node.inputs[2 + p]] for p in (position, 1 - position))
        terms = [(self._centred(node, operand), node.inputs[2 + operand]) for operand in (position, 1 - position)]
        if (
            self._types[scores].shape != node.type.shape
            or math.prod(multiplier.shape[-2:]) != 1
            or factor.size != 1
            or constants[other].shape[-1:] != node.type.shape[-1:]
            or any(bounds.magnitude > _INT32_MAX for bounds, _ in terms)
        ):
            return None
        return ScoreStage(
            node, multiplier, self._narrow(terms, node), position, constants[other], int(factor.reshape(-1)[0])
        )

    def _centred(self, node: Node, position: int) -> Interval:
        """Bounds of a value that a node rescales, its zero point taken off."""
        return self._bounds[node.inputs[position]].minus(operand_zero_point(node, position))

    def _narrow(self, terms: Sequence[tuple[Interval, str]], node: Node) -> bool:
        """Whether the rescaled sum of terms, each with the name of its multiplier, is proved to fit int32."""
        products = [(bounds, self._bounds[name]) for bounds, name in terms]
        return fits_int32(products, node.integer("shift"), node.integer("zero_point"))

    def _terms_fit(self, node: Node) -> bool:
        """Whether the terms that zero points add to a product fit int32; the verifier bounds the product only."""
        depth = self._types[node.inputs[0]].shape[-1]
        left, right = abs(node.integer("zero_point_a")) + 128, abs(node.integer("zero_point_b")) + 128
        return depth * (255 + left) * (128 + right) <= _INT32_MAX

    def _source(self, name: str) -> tuple[str, Strided]:
        """Return the value that a chain of views starts from and the strides in it."""
        chain: list[Node] = []
        base = name
        while (node := self._nodes.get(base)) is not None and node.op in VIEWS:
            chain.insert(0, node)
            base = node.inputs[0]
        if chain and base not in self._program.constants:
            view = strided_source(chain, self._types[base].shape)
            if view is not None and (view.strides[-1] == 1 or self._types[name].shape[-1] == 1):
                return base, view
        natural = strided_source((), self._types[name].shape)
        assert natural is not None
        return name, natural

    def _views_of(self, node: Node) -> Iterator[Node]:
        reader = self._only_reader(node)
        while reader is not None and reader.op in VIEWS:
            yield reader
            reader = self._only_reader(reader)
