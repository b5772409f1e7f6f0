"""Linking for another architecture: found on the path, or said clearly what is missing."""

from __future__ import annotations

import stat

import pytest

from quantizers.errors import TargetError
from tvm_backend.link import linker
from tvm_backend.targets import TARGETS

ARM = TARGETS["aarch64"]


def add_tool(folder, name: str, script: str) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


def test_own_architecture_is_left_to_the_systems_compiler():
    assert linker(ARM, "aarch64") is None
    assert linker(TARGETS["x86-64-avx2"], "x86_64") is None


@pytest.mark.parametrize(
    ("target", "machine", "tool", "package"),
    [
        ("aarch64-dotprod", "x86_64", "aarch64-linux-gnu-ld", "binutils-aarch64-linux-gnu"),
        ("x86-64", "aarch64", "x86_64-linux-gnu-ld", "binutils-x86-64-linux-gnu"),
    ],
)
def test_missing_linkers_are_named_with_what_to_install(target, machine, tool, package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=rf"target {target} needs .*: found neither {tool} nor ld.lld.*{package}"):
        linker(TARGETS[target], machine)


@pytest.mark.parametrize("name", ["aarch64-linux-gnu-ld", "ld.lld"])
def test_linker_on_the_path_gets_the_objects(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    add_tool(tmp_path, name, f'echo "$@" > {tmp_path}/called')
    linker(ARM, "x86_64")("model.so", ["lib0.o", "devc.o"])
    assert (tmp_path / "called").read_text().split() == ["-shared", "-o", "model.so", "lib0.o", "devc.o"]


def test_what_the_linker_complains_of_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    add_tool(tmp_path, "ld.lld", "echo unknown emulation >&2; exit 1")
    with pytest.raises(TargetError, match=r"ld.lld cannot link for target aarch64: unknown emulation; check that"):
        linker(ARM, "x86_64")("model.so", ["lib0.o"])
