"""The tensors of an exported network, as buffers of modules that are nested as the names of the checkpoint are."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

#: Returns a buffer. It is looked up at each call, because torch.export puts symbols in the place of buffers.
Buffer = Callable[[], Tensor]


class Buffers:
    """Registers tensors under dotted names.

    Args:
        root: the module that gets them; ``a.b.weight`` becomes the buffer ``weight`` of its submodule ``a.b``.
        constants: names of the graph's constants, none of which may become the name of a submodule.
    """

    def __init__(self, root: nn.Module, constants: Collection[str]) -> None:
        self._root = root
        self._constants = frozenset(constants)
        self._stored: dict[str, tuple[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> Buffer:
        """Store a tensor and return what looks it up; an equal one under the same name is stored once."""
        key, index = name, 2
        while key in self._stored:
            path, stored = self._stored[key]
            if stored.dtype == tensor.dtype and stored.shape == tensor.shape and torch.equal(stored, tensor):
                return self._lookup(path)
            key, index = f"{name}_{index}", index + 1
        path = self._register(key, tensor.contiguous())
        self._stored[key] = path, tensor
        return self._lookup(path)

    def _lookup(self, path: str) -> Buffer:
        return lambda: self._root.get_buffer(path)

    def _register(self, name: str, tensor: Tensor) -> str:
        parent, _, leaf = name.rpartition(".")
        # A weight that was folded apart is ``fc.weight.folded``, and ``fc.weight`` may be a buffer beside it.
        while parent in self._constants:
            parent, _, tail = parent.rpartition(".")
            leaf = f"{tail}_{leaf}"
        module = self._root
        for part in parent.split(".") if parent else ():
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
        return f"{parent}.{leaf}" if parent else leaf
