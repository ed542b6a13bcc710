#!/usr/bin/env bash
# What to run first on a machine with a CUDA GPU: correctness, then speed. Every part has its time
# and is cut off after it, ten minutes in all; the benches keep what they have by then. Needs no
# network and no virtual environment, only Python 3 with torch, triton, numpy, tiktoken, regex,
# safetensors, pytest.
#   bash bench/gpu_first.sh [OUT] [TEXT]
# Figures go to OUT (bench/results). TEXT: tiny Shakespeare; without it text of the embedded world is
# made.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.
out=${1:-bench/results}
text=${2:-out/gpu_first/text.txt}
mkdir -p "$out"
part() {  # seconds, file, command...: runs the command, its output on screen and in the file
    local seconds=$1 file=$out/$2
    shift 2
    echo "=== $* (at most $seconds s)" | tee "$file"
    timeout "$seconds" "$@" 2>&1 | tee -a "$file"
    [ "${PIPESTATUS[0]}" -ne 124 ] || echo "cut off after $seconds s" | tee -a "$file"
}
nvidia-smi | tee "$out/gpu.txt"
part 120 gpu_tests.txt python3 -m pytest -q tests/test_cuda.py --durations=5
tests=(tests/test_kernels.py tests/test_attention.py tests/test_model.py tests/test_optim.py)
part 90 gpu_tests_native.txt python3 -m pytest -q "${tests[@]}" --durations=5
part 130 kernels_gpu.txt python3 -m bench.kernels --rounds=2 --out="$out"
part 90 train_gpu.txt python3 -m bench.train --depths=12 --contexts=1024,8192 --steps=3 --out="$out"
part 60 rollout_gpu.txt python3 -m bench.rollout --depth=12 --width=768 --vocab=50304 --slots=128 \
    --prompts=256 --news=256 --waves=2 --rounds=1
part 40 rl_gpu.txt python3 -m bench.rl
if [ ! -f "$text" ]; then
    python3 -m data.world --out=out/gpu_first --overwrite
    python3 -c 'import json, sys; [print(json.loads(line)["text"]) for line in open(sys.argv[1])]' \
        out/gpu_first/pretrain.jsonl >"$text"
fi
part 60 shakespeare_gpu.txt python3 -m bench.shakespeare --text="$text" --size=gpu --steps=500 --short=0.25
