#!/usr/bin/env bash
# What to run first on a machine with a CUDA GPU: does it run, is it right, how fast is it, beside
# what bench/predict.py says. Every part has its time and is interrupted after it, 580 s in all; a
# part that fails ends nothing but the smoke test. Every number is printed as soon as it is there.
# Needs no network and no virtual environment, only Python 3 with torch, triton, numpy, tiktoken,
# regex, safetensors, pytest (pytest-xdist: tests on 8 cores).
#   bash bench/gpu_first.sh [OUT]          figures go to OUT (bench/results)
#   TINY=1 bash bench/gpu_first.sh OUT     the script itself at toy sizes, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.
out=${1:-bench/results}
tiny=${TINY:+--tiny --device=cpu}
mkdir -p "$out"
part() { # seconds, file, command...: runs the command, its output on screen and in the file
    local seconds=$1 file=$out/$2 begin=$SECONDS
    shift 2
    echo "=== $* (at most $seconds s)" | tee "$file"
    # SIGINT: pytest and the benches then still say what they have
    timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee -a "$file"
    local status=${PIPESTATUS[0]}
    [ "$status" -ne 124 ] || echo "cut off after $seconds s" | tee -a "$file"
    echo "=== status $status after $((SECONDS - begin)) s" | tee -a "$file"
    return "$status"
}
cores=()
python3 -c "import xdist" 2>/dev/null && cores=(-n 8)
command -v nvidia-smi >/dev/null && nvidia-smi | tee "$out/gpu.txt"

part 40 smoke_gpu.txt python3 -m bench.gpu --part=smoke $tiny || exit 1
part 20 floors_gpu.txt python3 -m bench.gpu --part=floors $tiny
if [ -z "$tiny" ]; then
    part 90 tests_gpu.txt python3 -m pytest -q "${cores[@]}" tests/test_cuda.py --durations=5
    native=(tests/test_kernels.py tests/test_attention.py tests/test_draw.py tests/test_kl.py)
    part 60 tests_native_gpu.txt python3 -m pytest -q "${cores[@]}" "${native[@]}" --durations=5
fi
part 50 decode_gpu.txt python3 -m bench.gpu --part=decode $tiny
part 60 micro_gpu.txt python3 -m bench.gpu --part=micro $tiny
part 40 profile_gpu.txt python3 -m bench.gpu --part=profile $tiny
part 60 sweep_gpu.txt python3 -m bench.gpu --part=sweep $tiny
part 60 kernels_gpu.txt python3 -m bench.kernels --rounds=1 --out="$out" $tiny
size=(--depths=12 --contexts=1024 --steps=3)
part 70 train_gpu.txt python3 -m bench.train "${size[@]}" --out="$out" $tiny
size=(--depth=12 --vocab=50304 --steps=2)
[ -z "$tiny" ] || size=(--depth=1 --width=32 --vocab=512 --answers=4 --group=2 --max_new_tokens=8 --steps=2 --device=cpu)
part 30 rl_gpu.txt python3 -m bench.rl "${size[@]}"
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv 2>/dev/null | tee -a "$out/gpu.txt"
echo "=== done after $SECONDS s"
