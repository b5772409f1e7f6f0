"""Read safetensors checkpoints and fit them to a module; hash and check weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quantizers.errors import ModelError

#: File name endings of formats that can hold code.
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
_SHOWN = 5


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ModelError: missing, damaged, or a format that would need pickle.
    """
    if path.suffix in PICKLED:
        raise ModelError(
            f"{path}: reading it would need pickle, which can run any code. Convert it once, where you trust it:\n"
            "  from safetensors.torch import save_file; import torch\n"
            f"  save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
        )
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected weights in safetensors format")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path}: not a readable safetensors file: {error}") from error


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load weights into a module; every name and shape must fit.

    Raises:
        ModelError: lists missing, unexpected and mis-shaped names.
    """
    expected = module.state_dict()
    problems = [
        ("missing in the checkpoint", sorted(set(expected) - set(weights))),
        ("not in the model", sorted(set(weights) - set(expected))),
        (
            "of another shape",
            [
                f"{name} (checkpoint {tuple(weights[name].shape)}, model {tuple(expected[name].shape)})"
                for name in sorted(set(expected) & set(weights))
                if weights[name].shape != expected[name].shape
            ],
        ),
    ]
    lines = [f"  {len(names)} {what}: {_listed(names)}" for what, names in problems if names]
    if lines:
        raise ModelError(
            f"{where}: the checkpoint does not fit the model:\n"
            + "\n".join(lines)
            + "\nCheck the model's name and options."
        )
    module.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in weights.items()})


def require_finite(module: nn.Module) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: names the first tensor that holds one.
    """
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"weight {name} holds NaN or infinity; the checkpoint is damaged")


def hash_weights(module: nn.Module) -> str:
    """Return SHA-256, in hexadecimal, over the sorted names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
