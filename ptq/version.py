"""The version of the installed distribution."""

from importlib.metadata import PackageNotFoundError, version


def tool_version() -> str:
    """Return the version, or ``0+unknown`` when run from a tree that is not installed."""
    try:
        return version("vit-ptq")
    except PackageNotFoundError:
        return "0+unknown"
