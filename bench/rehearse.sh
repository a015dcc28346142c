#!/usr/bin/env bash
# Rehearses bench/gpu_suite.sh where there is no GPU, as nearly as that can be done: the versions that the machine with the
# GPU has, no network, every stage on tiny shapes on the CPU.
#
#     bash bench/rehearse.sh                   all stages
#     bash bench/rehearse.sh build tests       some of them
#
# The environment (5 GB) is made once, in ESFAST_REHEARSAL or ~/.cache/esfast-rehearsal, and the tree is copied there. The
# results are in its folder out, status.json among them. The exit status is the suite's.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${ESFAST_REHEARSAL:-${XDG_CACHE_HOME:-$HOME/.cache}/esfast-rehearsal}
mkdir -p "$folder/tree" "$folder/out"
folder=$(cd "$folder" && pwd)
env=$folder/env

# The versions of the machine. PyTorch's build for CUDA brings 4 GB; without room for it the checkout's own must do.
python=$(command -v "${PYTHON:-python3.12}" || command -v python3)
"$python" -c '' 2>/dev/null || python=$(command -v python3)
if [ ! -e "$env/made" ]; then
    "$python" -c 'import sys; sys.version_info[:2] == (3, 12) or print("not Python 3.12 but", sys.version.split()[0])'
    if [ "$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }')" -ge 12 ]; then
        pinned=(torch==2.11.0 triton==3.6.0)
    else
        echo "no room for PyTorch's build for CUDA: its newest CPU build instead"
        pinned=(-c constraints.txt torch triton)
    fi
    "$python" -m venv "$env"
    "$env/bin/pip" install --quiet "${pinned[@]}" transformers==5.17.0 numpy==2.5.2 accelerate matplotlib psutil \
        pytest pytest-xdist pytest-timeout hypothesis pybind11 ninja 'setuptools>=77' wheel
    touch "$env/made"
fi
"$env/bin/python" -c 'import torch, triton, transformers, numpy, sys
print("Python", sys.version.split()[0], *(f"{m.__name__} {m.__version__}" for m in (torch, triton, transformers, numpy)))'

# What git does not ignore, as it would be copied to that machine; what was built there before stays.
git ls-files -z --cached --others --exclude-standard >"$folder/files"
(cd "$folder/tree" && find . -type f -not -path './build/*' -not -name '*.so' -delete)
xargs -0 sh -c 'for f; do [ ! -e "$f" ] || printf "%s\0" "$f"; done' _ <"$folder/files" |
    tar --null --files-from=- -cf - | tar -xf - -C "$folder/tree"

without_network=(unshare --map-root-user --net)
if ! "${without_network[@]}" true 2>/dev/null; then
    echo "the network can't be taken away here: it stays"
    without_network=(env)
fi
rm -rf "$folder/out" && mkdir "$folder/out"
export ESFAST_SUITE_DEVICE=cpu ESFAST_CUDA_ARCHS=${ESFAST_CUDA_ARCHS:-90} OUT=$folder/out PYTHON=$env/bin/python
ESFAST_COMMIT=$(git rev-parse HEAD)$([ -z "$(git status --porcelain)" ] || echo +)
export ESFAST_COMMIT
unset PYTHONPATH
exec "${without_network[@]}" bash "$folder/tree/bench/gpu_suite.sh" "$@"
