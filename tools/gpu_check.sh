#!/bin/sh
# Check on a machine with an NVIDIA GPU what cannot be checked without one, in under ten minutes.
#
#     tools/gpu_check.sh                # or `make gpu-check`
#     tools/gpu_check.sh --rehearse     # the same parts on CPU tensors, as far as they go
#     tools/gpu_check.sh --help
#
# Builds nothing and needs no network: `HOROVOD_GPU_OPERATIONS=NCCL make setup` comes before. Exit
# status: 0 all passed, 1 something failed or missed its target, 2 there is no GPU. PYTHON names
# another interpreter than .venv's.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "gpu_check: $python is not there; run \`make setup\`, or let PYTHON name an interpreter" >&2
    exit 2
fi
cd "$root"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" tools/gpu_check.py "$@"
