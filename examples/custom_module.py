"""Quantize a module of your own: nothing has to be registered, renamed or annotated.

    python examples/custom_module.py

The model below has windows instead of global attention, a gated feed-forward layer and no class token. It is traced
with torch.export, and its sites are found by structure: an operand of a matrix product, an input of a table, a residual
sum. Operators that have no integer form are one error that names them all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import ptq


class WindowBlock(nn.Module):
    """Attention inside windows of tokens, then a gated feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projection, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.value = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (batch, tokens, width) to tokens."""
        batch, tokens, width = x.shape
        windows = tokens // self.window
        qkv = self.projection(self.before(x)).reshape(batch * windows, self.window, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.mixed(mixed.transpose(1, 2).reshape(batch, tokens, width))
        y = self.after(x)
        return x + self.down(functional.silu(self.gate(y)) * self.value(y))


class WindowedNet(nn.Module):
    """Patches, two blocks, the mean over all tokens, ten classes; images (1, 32, 32)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.Sequential(WindowBlock(width, 3, 16), WindowBlock(width, 3, 16))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 32, 32) to logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    model, images = WindowedNet().eval(), torch.randn(16, 1, 32, 32)
    quantized = ptq.quantize(model, images, bits="w8a8")
    for site in quantized.describe()["sites"][:6]:
        print(f"{site['name']}: {site['kind']}, {site['bits']} bits, {site['format']}")
    with torch.no_grad():
        expected = model(images)
    compiled = quantized.compile("cpu")
    assert torch.equal(compiled(images), quantized.integer(images))
    error = float((quantized.integer(images) - expected).norm() / expected.norm())
    print(f"the integer program is {100 * error:.2f} % of the logits' length away from float, at any batch size")


if __name__ == "__main__":
    main()
