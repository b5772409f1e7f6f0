"""The table of targets and what is said about machines that do not fit."""

from __future__ import annotations

import platform

import pytest

from quantizers.errors import TargetError
from tvm_backend.kernels.cpu.byte_table import WIDTH
from tvm_backend.kernels.cpu.dot import DOTS
from tvm_backend.targets import TARGETS, check_runnable, cpu_features, get_target


def test_unknown_targets_list_the_known_ones():
    with pytest.raises(TargetError, match=r"unknown target 'z80'; known targets are native, x86-64, x86-64-avx2"):
        get_target("z80")


def test_names_and_keys_agree():
    assert all(name == target.name for name, target in TARGETS.items())


@pytest.mark.parametrize("name", [target.name for target in TARGETS.values() if target.byte_tables])
def test_byte_tables_come_with_products_that_add_what_they_return(name):
    """The attention sums the table's entries with the dot product, one whole lookup at a time."""
    dot = DOTS[TARGETS[name].dot]
    assert (dot.left, dot.lanes * dot.group) == ("uint8", WIDTH)


@pytest.mark.skipif(
    platform.machine() not in {target.arch for target in TARGETS.values()}, reason="no target has this architecture"
)
def test_native_is_the_strongest_that_fits():
    native = get_target("native")
    check_runnable(native.name, native.arch, native.features)
    after = list(TARGETS.values())[list(TARGETS).index(native.name) + 1 :]
    stronger = [target for target in after if target.arch == native.arch]
    assert all(not cpu_features().issuperset(target.features) for target in stronger)


def test_features_are_read_from_the_flags_line(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_features(listing) == {"fpu", "avx2", "fma"}
    assert cpu_features(tmp_path / "absent") == frozenset()


def test_missing_features_are_named():
    target = TARGETS["x86-64-avx512-vnni"]
    with pytest.raises(TargetError, match=r"missing avx512_vnni; build it again with target native"):
        check_runnable(
            target.name, target.arch, target.features, set(target.features) - {"avx512_vnni"}, machine=target.arch
        )
