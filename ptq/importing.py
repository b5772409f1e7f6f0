"""``package.module:attribute`` arguments, and the extras that a plain installation lacks."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from quantizers.errors import PtqError, UsageError

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_callable_spec(spec: str) -> bool:
    """Whether an argument looks like ``package.module:attribute``."""
    return _SPEC.fullmatch(spec) is not None


def import_callable(spec: str, error_type: type[PtqError]) -> Callable[..., Any]:
    """Import ``package.module:attribute``; modules of the current directory are found too.

    Raises:
        error_type: the module or the attribute does not exist, fails to import, or is not callable.
    """
    module_name, attribute = spec.split(":")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    try:
        module = importlib.import_module(module_name)
    # Importing runs the user's code, which may raise anything.
    except Exception as error:
        raise error_type(f"{spec}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise error_type(f"{spec}: module {module_name} has no callable {attribute!r}; it has {', '.join(names[:10])}")
    function: Callable[..., Any] = found
    return function


def import_extra(module_name: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".", maxsplit=1)[0]:
            raise
        raise UsageError(f"{module_name} is not installed: pip install 'vit-ptq[{extra}]'") from None
