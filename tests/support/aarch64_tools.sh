#!/usr/bin/env bash
# Installs a linker for 64-bit ARM and QEMU's emulator of user programs, or says what is missing.
set -euo pipefail
missing=()
command -v aarch64-linux-gnu-ld > /dev/null || command -v ld.lld > /dev/null || missing+=(binutils-aarch64-linux-gnu)
command -v qemu-aarch64 > /dev/null || command -v qemu-aarch64-static > /dev/null || missing+=(qemu-user)
test ${#missing[@]} -eq 0 && exit
exec "$(dirname "$0")/system_packages.sh" "the tests of the ARM targets" "${missing[@]}"
