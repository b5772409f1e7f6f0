"""The forms in which ours runs: a method and the widths of weights and activations."""

from __future__ import annotations

from cpu_comparison.prepare import BITS, METHOD

from ptq.recipes import named_recipe
from quantizers.errors import UsageError

#: What everything is compared with, where it is asked for.
BASELINE = f"{METHOD} {BITS}"
#: Uniform codes; published non-linearities; narrow weights; searched and fixed logarithmic codebooks.
DEFAULT_FORMS = (BASELINE, "ivit w8a8", "minmax w4a4", "adalog w4a4", "repq w4a4")


def split_form(form: str) -> tuple[str, str]:
    """Return method and widths of a spelling such as ``minmax w8a8``.

    Raises:
        UsageError: another spelling, an unknown method or impossible widths.
    """
    parts = form.split()
    if len(parts) != 2:
        raise UsageError(f"form is {form!r}, expected a method and widths, as {BASELINE!r}")
    method, bits = parts
    named_recipe(method, bits)
    return method, bits


def baseline_of(forms: tuple[str, ...]) -> str:
    """Return the form that ratios are taken to: min-max at 8 bits, or the first one where that is not among them."""
    return BASELINE if BASELINE in forms else forms[0]


def form_title(form: str) -> str:
    """Return what tables and plots call ours in a form."""
    return f"vit-ptq {form}"
