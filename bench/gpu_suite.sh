#!/usr/bin/env bash
# The stages of a day with a GPU, one after another; no network is needed:
#
#     bash bench/gpu_suite.sh build tests      these
#     bash bench/gpu_suite.sh                  all, in the order that gives the most first
#
# bench/GPU.md says what to run and what to look at, bench/suite.py what else can be set. PYTHON is the Python that has
# PyTorch. The folder bench/ must not come first in its path: there are modules in it that are called as some of Python's.
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-python3}" -u -c 'import runpy; runpy.run_path("bench/suite.py", run_name="__main__")' "$@"
