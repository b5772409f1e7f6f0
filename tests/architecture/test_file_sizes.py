"""One concept a file: 200 lines is a smell, 400 an error. Tables of data may be longer and are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 400
PACKAGES = ("quantizers", "calibration", "tvm_backend", "ptq")

#: Files that are one literal table, which may be long, and what the table holds.
TABLES: dict[str, str] = {}


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / package).rglob("*.py")
    }
    long = [f"{name}:{LIMIT}: {count} lines" for name, count in lengths.items() if count > LIMIT and name not in TABLES]
    assert not long, "\n".join(sorted(long))


def test_exemptions_are_needed() -> None:
    for name in TABLES:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) > LIMIT, f"{name} needs no exemption"


def test_test_files_have_unique_names_and_shadow_no_package() -> None:
    tests = ROOT / "tests"
    names = [path.name for path in tests.rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
    assert not list(tests.rglob("__init__.py"))
