#!/usr/bin/env bash
# Usage: system_packages.sh WHO PACKAGE...: installs Debian packages for tests, or says which are missing.
set -euo pipefail
who=$1
shift
if test "$(id -u)" -ne 0 || ! command -v apt-get > /dev/null; then
    echo "$who need $* (the names of Debian's packages): install them" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o Acquire::http::Timeout=30 update
apt-get -qq -o Acquire::http::Timeout=30 install --yes --no-install-recommends "$@"
