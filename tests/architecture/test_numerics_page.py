"""Each test that a page about numbers names as pinning a convention exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def missing(page: str) -> list[str]:
    """Return the named tests that are not defined in a file of that name."""
    defined = {
        (path.name, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    return [f"{file}::{name}" for file, name in NAMED.findall(page) if (file, name) not in defined]


@pytest.mark.parametrize("name", ["numerics.md", "integer-nonlinearities.md"])
def test_named_tests_exist(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert NAMED.search(page)
    assert not missing(page)


def test_every_section_names_a_test() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        assert NAMED.search(section), section.splitlines()[0]


def test_the_check_can_fail() -> None:
    assert missing("`test_numerics_page.py::test_of_nothing`") == ["test_numerics_page.py::test_of_nothing"]
