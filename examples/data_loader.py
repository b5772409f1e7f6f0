"""Calibration inside a Python pipeline: your own data loader, your own recipe, and a look at what it lost.

    python examples/data_loader.py

Anything that yields images works: a DataLoader of (images, labels), a list of tensors, a generator. Images are read
once and held within ``memory_limit``; with ``work_dir`` a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import ptq
from calibration.rules import Rule
from ptq.data import open_data
from ptq.diagnosis import diagnose
from ptq.recipe import dump_recipe
from ptq.recipes import named_recipe
from ptq.sources import load_model
from quantizers.spec import QuantSpec

FOLDER = Path(__file__).resolve().parent / "fashion_mnist_vit"


def main() -> None:
    """Run the example."""
    loaded = load_model(str(FOLDER))
    ((images, labels),) = open_data(str(FOLDER / "test.npz"), loaded.preprocessing, limit=96, seed=0).batches(96)
    loader = DataLoader(TensorDataset(images[:32], labels[:32]), batch_size=8)

    # A preset at 4 bits, with the widths of one layer raised: the first rule that matches a site wins.
    preset = named_recipe("repq", "w4a4")
    wider = (
        Rule(QuantSpec(8, granularity="channel", search="mse"), kind="weight", name="patch_embed.*"),
        Rule(QuantSpec(8, symmetric=False, search="output"), name="head.input"),
    )
    recipe = dataclasses.replace(preset, name="repq-w4a4-wide-ends", rules=(*wider, *preset.rules))
    quantized = ptq.quantize(loaded.module, loader, recipe=recipe, preprocessing=loaded.preprocessing)

    # On other images: where the loss is, and what brings it back.
    found = diagnose(quantized, images[32:], labels[32:], suggestions=3)
    worst = found.readings.worst()[0]
    float_top1, top1 = (found.top1(results) for results in found.readings.results)
    print(f"top-1 {top1:.1f} %, float {float_top1:.1f} %; most of the error comes from {worst.module}")
    for suggestion in found.suggestions:
        change = suggestion.change
        print(f"{change.site}: {change.describe()}: {suggestion.gain:+.2f} dB")

    # The change becomes a rule, the recipe a file that 'ptq quantize --recipe' takes.
    rules = tuple(Rule(entry.change.after, name=entry.change.site) for entry in found.suggestions)
    better = dataclasses.replace(recipe, name="repq-w4a4-repaired", rules=(*rules, *recipe.rules))
    print(dump_recipe(better).partition("rules:")[0].strip())
    repaired = ptq.quantize(loaded.module, loader, recipe=better, preprocessing=loaded.preprocessing)
    agreed = (repaired.integer(images[32:]).argmax(1) == quantized.float(images[32:]).argmax(1)).double().mean()
    print(f"with the suggestions, in integers: same first choice as float on {100 * float(agreed):.1f} % of the images")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
