"""``package.module:factory``: a function that returns a module, its example input and its preprocessing."""

from __future__ import annotations

from torch import Tensor, nn

from ptq.importing import import_callable
from ptq.preprocessing import Preprocessing
from ptq.sources.parts import Parts, image_size
from quantizers.errors import ModelError, UsageError


def load_made(spec: str) -> Parts:
    """Call a factory.

    Args:
        spec: ``package.module:factory``. It returns (module, example input (batch, channels, height, width) or a
            tuple with it, preprocessing); the last is a dict, a :class:`ptq.Preprocessing`, or None.

    Raises:
        ModelError: it cannot be imported, raises, or returns something else.
    """
    factory = import_callable(spec, ModelError)
    try:
        made = factory()
    # This is the user's code, which may raise anything.
    except Exception as error:
        raise ModelError(f"{spec}: raised {type(error).__name__}: {error}") from error
    wanted = f"{spec}: expected (module, example input, preprocessing)"
    if not isinstance(made, tuple) or len(made) != 3:
        raise ModelError(f"{wanted}, got {type(made).__name__}")
    module, example, settings = made
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    if not isinstance(module, nn.Module) or not isinstance(example, Tensor) or example.ndim != 4:
        raise ModelError(f"{wanted} with an input (batch, channels, height, width)")
    return Parts(module, _preprocessing(spec, settings, image_size(example)), example=example, measure_classes=True)


def _preprocessing(spec: str, settings: object, size: tuple[int, int, int]) -> Preprocessing:
    if settings is None:
        return Preprocessing.identity(size)
    if isinstance(settings, Preprocessing):
        return settings
    if isinstance(settings, dict):
        try:
            return Preprocessing.from_config({"input_size": size, **settings})
        except UsageError as error:
            raise ModelError(f"{spec}: preprocessing: {error}") from error
    raise ModelError(
        f"{spec}: the preprocessing must be a dict, a ptq.Preprocessing or None, got {type(settings).__name__}"
    )
