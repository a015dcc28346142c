#!/usr/bin/env bash
# The ends of what pyproject.toml promises, each in an environment of its own: run by hand before a release, and note the
# outcome in tests/floors.md.
#
#   bash tests/floors.sh torch-2.8       the oldest PyTorch, with the Python of `make`
#   bash tests/floors.sh python-3.10     the oldest Python; it must be on PATH
#   bash tests/floors.sh python-3.13     the newest
#
# PyTorch from PyPI brings gigabytes of CUDA; PIP_INDEX_URL=https://download.pytorch.org/whl/cpu with
# PIP_EXTRA_INDEX_URL=https://pypi.org/simple takes the builds for CPUs. Further words go to pytest, such as -m "".
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?torch-2.8, python-3.10 or python-3.13}
shift
python=${PYTHON:-python3} torch="torch>=2.8"
case $what in
    torch-*) torch="torch==${what#torch-}.*" ;;
    python-*) python=python${what#python-} ;;
    *) echo "expected torch-2.8, python-3.10 or python-3.13, got $what" >&2; exit 2 ;;
esac
environment=.venv-floor-$what
test -x "$environment/bin/python" || "$python" -m venv "$environment"
"$environment/bin/python" -m pip install --quiet "$torch" 'setuptools>=77' -e '.[dev]'
"$environment/bin/python" -c 'import platform, torch, transformers
print("Python", platform.python_version(), "PyTorch", torch.__version__, "Transformers", transformers.__version__)'
"$environment/bin/python" -m pytest -n auto --dist worksteal -m "not slow" "$@"
