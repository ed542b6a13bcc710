#!/usr/bin/env bash
# What to run first where there is a CUDA GPU, in under 10 minutes: correctness, then speed. Needs no network and no virtual environment.
#   bash bench/gpu_first.sh [OUT] [TEXT]      figures go to OUT (bench/results); TEXT: tiny Shakespeare, else text of the embedded world is made
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.
out=${1:-bench/results}
text=${2:-out/gpu_first/text.txt}
mkdir -p "$out"
python3 -m pytest -q tests/test_cuda.py | tee "$out/gpu_tests.txt"
python3 -m pytest -q tests/test_kernels.py tests/test_model.py tests/test_optim.py | tail -3 | tee -a "$out/gpu_tests.txt"
if [ ! -f "$text" ]; then
    python3 -m data.world --out=out/gpu_first --overwrite && python3 -c 'import json, sys; [print(json.loads(line)["text"]) for line in open(sys.argv[1])]' out/gpu_first/pretrain.jsonl >"$text"
fi
timeout 400 python3 -m bench.shakespeare --text="$text" --size=gpu --steps=1000 --short=0.25 | tee "$out/shakespeare_gpu.txt"
