"""A device that torch does not have: its tensors lie on the CPU, and mixing them with others is refused as CUDA does.

What it cannot show is another device's arithmetic. It is registered with torch for good, so a process of its own needs
it: ``support/on_pretended_device.py``.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("privateuseone:0")

#: Operations that take tensors of several devices: copies, and indices, which CUDA takes from the CPU.
_MIXING = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
}


class _OnDevice(Tensor):
    """A tensor that says it is on :data:`DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"on {DEVICE}: {self.inner!r}"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})


def _dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [entry for entry in tree_flatten((args, kwargs))[0] if isinstance(entry, Tensor)]
    here = [entry for entry in tensors if isinstance(entry, _OnDevice)]
    # A number of the CPU may meet any tensor.
    others = [entry for entry in tensors if not isinstance(entry, _OnDevice) and entry.ndim]
    if here and others and function not in _MIXING:
        raise RuntimeError(
            f"{function}: tensors on {DEVICE} and on the CPU, of shapes {[tuple(t.shape) for t in tensors]}"
        )
    wanted = kwargs.get("device")
    on_device = bool(here) if wanted is None else torch.device(wanted).type == DEVICE.type
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(
        lambda entry: entry.inner if isinstance(entry, _OnDevice) else entry, (args, kwargs)
    )
    result = function(*plain_args, **plain_kwargs)
    if not on_device:
        return result
    wrapped = tree_map(lambda entry: _OnDevice(entry) if isinstance(entry, Tensor) else entry, result)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if here else wrapped


class PretendedDevice(TorchDispatchMode):
    """While it is entered, ``torch`` takes :data:`DEVICE` as a device."""

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(function, args, kwargs or {})

    def __enter__(self) -> Self:
        # torch.tensor would copy to the device without asking this mode.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
