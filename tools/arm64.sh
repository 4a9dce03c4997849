#!/bin/bash
# Tests the kernels as arm64 has them, on a machine with another processor, under QEMU:
#
#     tools/arm64.sh FOLDER [arguments of pytest]
#
# Debian and root, and its packages qemu-user-static, g++-aarch64-linux-gnu and debootstrap. FOLDER
# gets Debian's arm64 Python once, and a copy of what is committed. No time is measured. A few tests
# start Python anew, which works where the kernel runs arm64 programs by itself (binfmt_misc).
set -euo pipefail

cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a folder is needed}")
shift
tests=("$@")
if [ ${#tests[@]} = 0 ]; then
    for name in quantizers two_hop packing philox special_values overflow threads elias repelling; do
        tests+=("tests/single/test_$name.py")
    done
fi

if [ ! -d "$folder/site" ]; then
    debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 bookworm "$folder/root"
    for package in "$folder"/root/var/cache/apt/archives/*.deb; do
        dpkg -x "$package" "$folder/root"
    done
    PIP_REQUIRE_HASHES=0 .venv/bin/python -m pip install --quiet --target "$folder/site" \
        --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform any \
        --python-version 3.11 --only-binary :all: --constraint requirements.txt \
        numpy ml_dtypes pytest hypothesis setuptools
fi

rm -rf "$folder/tree"
mkdir "$folder/tree"
git archive HEAD | tar -x -C "$folder/tree"
cd "$folder/tree"
export QEMU_LD_PREFIX=$folder/root PYTHONPATH=$folder/site:.
python=(qemu-aarch64-static "$folder/root/usr/bin/python3.11")
CXX=aarch64-linux-gnu-g++ "${python[@]}" setup.py --quiet build_ext --inplace
exec "${python[@]}" -m pytest -q -p no:cacheprovider "${tests[@]}"
