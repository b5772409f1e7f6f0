"""The quick start of the guide runs as it is written, and the guide's recipe is one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ptq.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def test_the_quick_start_runs(tmp_path: Path) -> None:
    section = GUIDE.partition("## Quick start")[2].partition("\n## ")[0]
    commands = re.findall(r"^    ptq (.*)$", section, re.MULTILINE)
    assert len(commands) > 5
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command in commands:
        found = subprocess.run(
            [sys.executable, "-m", "ptq", *shlex.split(command)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, (command, found.stderr)
    assert (tmp_path / "fashion.html").is_file()


def test_its_recipe_is_one() -> None:
    recipe = parse_recipe(re.search(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[1], "guide")  # type: ignore[index]
    assert recipe.name == "mine"
    assert len(recipe.rules) == 6


@pytest.mark.parametrize("page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target
