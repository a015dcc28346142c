#!/usr/bin/env bash
# One command for a CUDA machine, which needs no network: builds in place, runs the GPU tests, then the benchmarks, in
# under 8 minutes, stopping at the first red test. JSON goes to bench/results/ (or $OUT). Needs torch, transformers, triton, pytest,
# hypothesis, pybind11 and a C++ compiler. ESFAST_SUITE_DEVICE=cpu tries the script itself, on tiny shapes, where there
# is no GPU; its figures mean nothing and go to $OUT or a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$root/$python ;; esac
device=${ESFAST_SUITE_DEVICE:-cuda}
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
if [ "$device" = cuda ]; then out=${OUT:-bench/results}; else out=${OUT:-$tree/results}; fi
out=$(mkdir -p "$out" && cd "$out" && pwd)

step() {
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    printf '== %s: %s s (%s s in all)\n' "$name" "$((SECONDS - began))" "$SECONDS"
}
esfast() { "$python" -c 'import sys; from esfast.cli import main; sys.exit(main(sys.argv[1:]))' "$@"; }
tests() { "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" "$@"; }

step build "$python" setup.py -q build_ext --inplace
# the package as it is when installed, bench/ and kernels/ inside esfast/; from elsewhere, as the checkout's esfast/ is not
mkdir "$tree/esfast"
ln -s "$root"/esfast/* "$root/bench" "$root/kernels" "$tree/esfast/"
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
cd "$tree"

sanitize() { # that the tool is slow, or has no test to run, is no reason to have no figures
    local status=0
    timeout 60 compute-sanitizer --tool "$1" --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider \
        -c "$root/pyproject.toml" "$root/tests/test_gpu.py" -k "equals_the_cpu_backend and cuda and 2-dtype1" || status=$?
    case $status in
        5) echo "compute-sanitizer $1: NOT RUN, no test of test_gpu.py has that name" ;;
        124) echo "compute-sanitizer $1: NOT DONE, given up after 60 s" ;;
        *) return "$status" ;;
    esac
}

step info esfast info
gpu_tests=("$root/tests/test_gpu.py" "$root/tests/test_bench_gpu.py" "$root/tests/test_gpu_rollout.py")
step "GPU tests" tests "${gpu_tests[@]}"
if [ "$device" = cuda ] && command -v compute-sanitizer >/dev/null; then
    step memcheck sanitize memcheck
    step racecheck sanitize racecheck
fi
if [ "$device" = cuda ]; then
    left=$((330 - SECONDS)) # what the steps before have left of the time
    step "bench gpu" esfast bench gpu --seconds "$((left > 60 ? left : 60))" --json "$out/noise_gpu.json"
else
    step "bench gpu" esfast bench gpu --device cpu --dtypes bfloat16 --repeats 1 --json "$out/noise_dry_run.json"
fi
if ! "$python" -c 'import transformers' 2>/dev/null; then
    echo "bench iteration: NOT RUN, transformers is not installed"
elif [ "$device" = cuda ]; then
    left=$((450 - SECONDS))
    step "bench iteration" esfast bench iteration --device cuda --repeats 3 --seconds "$((left > 30 ? left : 30))" \
        --json "$out/iteration_gpu.json" || echo "bench iteration: a row misses its limit, or there are no figures"
else
    step "bench iteration" esfast bench iteration --models tiny --repeats 1 --json "$out/iteration_dry_run.json"
fi
if ! "$python" -c 'import transformers' 2>/dev/null; then
    echo "bench dropin: NOT RUN, transformers is not installed"
elif [ "$device" = cuda ]; then
    step "bench dropin" esfast bench dropin --device cuda --numel 100000000 --seeds --json "$out/dropin_gpu.json"
else
    step "bench dropin" esfast bench dropin --numel 100000 --repeats 1 --seeds --json "$out/dropin_dry_run.json"
fi
# instructions as this machine's Triton compiles them; docs/benchmarks.md's, sass.json, are those of the newest
step "bench sass" esfast bench sass --json "$out/sass_here.json"
