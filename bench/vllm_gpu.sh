#!/usr/bin/env bash
# What to run on a machine with a GPU and vLLM: are members at once right there, and how fast are they?
#
#     pip install 'esfast[vllm,ray]' && bash bench/vllm_gpu.sh [FOLDER OF RESULTS]
#
# MODELS names the models, PYTHON the Python that has vLLM. A step that fails is said and the next one runs.
cd "$(dirname "$0")/.." || exit
python="${PYTHON:-python3}"; out="${1:-bench/results/vllm_gpu}"; failed=0
mkdir -p "$out"
step() { name="$1"; shift; echo "== $name: $*"; "$@" 2>&1 | tee "$out/$name.log"; [ "${PIPESTATUS[0]}" = 0 ] || { echo "== $name FAILED"; failed=1; }; }

# What vLLM is here, and whether the functions that esfast replaces are those it knows.
step versions "$python" -c 'import torch, vllm, esfast; print(vllm.__version__, torch.__version__, torch.cuda.get_device_name())'
step patches "$python" -m pytest -q tests/with_vllm/test_members.py -k patches
# The random model; vLLM's LoRA kernels for GPUs take 16 bits, in which texts of the two ways may differ.
step small "$python" -m esfast bench vllm --dtype bfloat16 --json "$out/small.json"
for model in ${MODELS:-Qwen/Qwen2.5-0.5B-Instruct Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-7B-Instruct}; do
    for shape in "30 16 1" "64 16 1" "64 16 8" "256 4 1"; do
        read -r members prompts rank <<<"$shape"
        name="$(basename "$model")-$members-$prompts-$rank"
        step "$name" "$python" -m esfast bench vllm --model "$model" --dtype bfloat16 --members "$members" \
            --prompts "$prompts" --rank "$rank" --new-tokens 128 --json "$out/$name.json"
    done
done
# A run in which both ways are measured; its log says which one was kept.
step run "$python" -m esfast train --engine vllm --noise low_rank --members-at-once auto --model \
    "${TRAIN:-Qwen/Qwen2.5-0.5B-Instruct}" --generations 6 --population-size 30 --out "$out/run" --no-progress
echo "== results in $out"; exit "$failed"
