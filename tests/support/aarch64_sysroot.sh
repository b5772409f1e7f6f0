#!/usr/bin/env bash
# Makes a folder with what a bundle needs on a 64-bit ARM machine: the distribution's Python, and numpy, safetensors
# and TVM's runtime in the versions of constraints.txt. qemu-aarch64 runs it on any machine.
#
#     aarch64_sysroot.sh PYTHON CONSTRAINTS FOLDER
#
# PYTHON is any Python with pip. Needs no root: apt works on lists and a cache of its own inside the folder, and
# packages are unpacked, not installed.
set -euo pipefail
python=$1 constraints=$(realpath "$2") root=$(realpath -m "$3")

for tool in apt-get dpkg-deb; do
    command -v $tool > /dev/null || { echo "$tool is missing: the sysroot is made of Debian packages" >&2; exit 1; }
done
rm -rf "$root"
mkdir -p "$root"/{lists,cache/archives,wheels}/partial
touch "$root/status"
# No package counts as installed, so apt fetches everything that Python depends on.
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=
    -o Dir::State="$root" -o Dir::State::Lists="$root/lists" -o Dir::State::status="$root/status"
    -o Dir::Cache="$root/cache" -o Acquire::Languages=none -o Acquire::http::Timeout=30 -o Debug::NoLocking=1)
"${apt[@]}" update
"${apt[@]}" install --yes --download-only --no-install-recommends python3 libstdc++6
for package in "$root"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$root"
done
# Where packages put everything under /usr, the loader is still looked for in /lib.
test -e "$root/lib" || ln -s usr/lib "$root/lib"

version=$(basename "$(realpath "$root/usr/bin/python3")")
version=${version#python}
site=$root/usr/lib/python3/dist-packages
pip=("$python" -m pip --quiet --disable-pip-version-check)
from=(--no-deps --only-binary=:all: --implementation cp --python-version "$version")
for glibc in 17 27 28 31 34; do
    from+=(--platform "manylinux_2_${glibc}_aarch64")
done
from+=(--platform manylinux2014_aarch64 --constraint "$constraints")
"${pip[@]}" install "${from[@]}" --upgrade --target "$site" apache-tvm-ffi numpy safetensors typing_extensions
# Of TVM only the runtime, three of its three hundred megabytes.
"${pip[@]}" download "${from[@]}" --dest "$root/wheels" apache-tvm
"$python" - "$root"/wheels/apache_tvm-*.whl "$site" <<'UNPACK'
import sys
import zipfile

archive, destination = zipfile.ZipFile(sys.argv[1]), sys.argv[2]
kept = [n for n in archive.namelist() if n.endswith(("/libtvm_runtime.so", ".dist-info/METADATA"))]
assert len(kept) == 2, f"{sys.argv[1]} holds another choice of files than expected: {kept}"
archive.extractall(destination, kept)
UNPACK
touch "$site/tvm/__init__.py"
rm -rf "$root"/{lists,cache,wheels,status}

# Old versions of QEMU show the host's /proc/cpuinfo; a file under its prefix is read instead.
mkdir -p "$root/proc"
echo 'Features : fp asimd asimddp' > "$root/proc/cpuinfo"
touch "$root/.ready"
