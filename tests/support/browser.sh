#!/usr/bin/env bash
# Installs Chromium, or says that it is missing.
set -euo pipefail
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null && exit
exec "$(dirname "$0")/system_packages.sh" "the tests of the report in a browser" chromium fonts-dejavu-core
