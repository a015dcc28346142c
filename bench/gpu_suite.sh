#!/usr/bin/env bash
# One command for a CUDA machine, which needs no network: builds in place, runs the GPU tests, then the benchmarks, and
# leaves JSON in bench/results/ (or $OUT). Needs torch, triton, pytest, hypothesis, pybind11 and a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
out=$(mkdir -p "${OUT:-bench/results}" && cd "${OUT:-bench/results}" && pwd)

"$python" setup.py -q build_ext --inplace
# the package as it is when installed, bench/ and kernels/ inside esfast/; from elsewhere, as the checkout's esfast/ is not
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/esfast"
ln -s "$root"/esfast/* "$root/bench" "$root/kernels" "$tree/esfast/"
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
cd "$tree"
esfast() { "$python" -c 'import sys; from esfast.cli import main; sys.exit(main(sys.argv[1:]))' "$@"; }

esfast info
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/test_triton_gpu.py"
# 1.5e9 weights in 300 tensors: a model of 1.5 billion, its base and what today's way needs beside it
esfast bench noise --device cuda --numel 1.5e9 --tensors 300 --today-seconds 10 --json "$out/noise_gpu.json"
