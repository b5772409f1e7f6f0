#!/usr/bin/env bash
# Installs a linker for 64-bit ARM and QEMU's emulator of user programs, or says what is missing.
set -euo pipefail
missing=()
command -v aarch64-linux-gnu-ld > /dev/null || command -v ld.lld > /dev/null || missing+=(binutils-aarch64-linux-gnu)
command -v qemu-aarch64 > /dev/null || command -v qemu-aarch64-static > /dev/null || missing+=(qemu-user)
test ${#missing[@]} -eq 0 && exit
if test "$(id -u)" -ne 0 || ! command -v apt-get > /dev/null; then
    echo "the tests of the ARM targets need ${missing[*]} (the names of Debian's packages): install them" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o Acquire::http::Timeout=30 update
apt-get -qq -o Acquire::http::Timeout=30 install --yes --no-install-recommends "${missing[@]}"
