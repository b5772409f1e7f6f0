"""The kernels of a kind of machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm_backend.kernels.cpu import emitters as cpu
from tvm_backend.kernels.cpu.attention import emit_attention
from tvm_backend.kernels.cpu.attention import fits as cpu_attention_fits
from tvm_backend.kernels.cpu.linear import emit_linear
from tvm_backend.kernels.cuda import emitters as cuda
from tvm_backend.kernels.cuda.attention import emit_attention as emit_cuda_attention
from tvm_backend.kernels.cuda.attention import fits as cuda_attention_fits
from tvm_backend.kernels.cuda.linear import emit_linear as emit_cuda_linear
from tvm_backend.kernels.cuda.threads import Threads
from tvm_backend.kernels.kernel import Kernel
from tvm_backend.kernels.shared.attention import Attention
from tvm_backend.targets import CudaTarget, Target


@dataclass(frozen=True)
class KernelSet:
    """What kernels are written with.

    Args:
        emitters: by operator.
        linear: of a linear with an epilogue.
        attention: of a whole attention.
        attention_fits: whether it can be written for one; where not, its operators have a kernel each.
        words: that replace TVM's while any of them writes, None for no other.
    """

    emitters: Mapping[str, Callable[..., Kernel]]
    linear: Callable[..., Kernel]
    attention: Callable[..., Kernel]
    attention_fits: Callable[[Attention], bool]
    words: Any = None


_CPU = KernelSet(cpu.EMITTERS, emit_linear, emit_attention, cpu_attention_fits)
_CUDA = KernelSet(cuda.EMITTERS, emit_cuda_linear, emit_cuda_attention, cuda_attention_fits, Threads())


def kernel_set(target: Target) -> KernelSet:
    """Return the kernels for a target."""
    return _CUDA if isinstance(target, CudaTarget) else _CPU
