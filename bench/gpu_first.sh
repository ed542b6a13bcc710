#!/usr/bin/env bash
# What to run first on a machine with a CUDA GPU: does it run, is it right, how fast is it, beside
# what bench/predict.py says, and does it learn. Every part has its time and is interrupted after
# it, 19 minutes in all at most; a part that fails ends nothing but the smoke test. Every number is
# printed as soon as it is there.
# Needs no network and no virtual environment, only Python 3 with torch, triton, numpy, tiktoken,
# regex, jinja2, safetensors, pytest (pytest-xdist: tests on all cores but two; matplotlib: report).
#   bash bench/gpu_first.sh [OUT]                  figures go to OUT (bench/results)
#   ONLY="train rl" bash bench/gpu_first.sh OUT    only these parts
#   TINY=1 bash bench/gpu_first.sh OUT             the script itself at toy sizes, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
out=${1:-bench/results}
tiny=${TINY:+--tiny --device=cpu}
mkdir -p "$out"
part() { # name, seconds, command...: runs the command, its output on screen and in a file
    local name=$1 seconds=$2 file=$out/$1_gpu.txt begin=$SECONDS
    shift 2
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
    echo "=== $* (at most $seconds s)" | tee "$file"
    # SIGINT: pytest and the benches then still say what they have
    timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee -a "$file"
    local status=${PIPESTATUS[0]}
    [ "$status" -ne 124 ] || echo "cut off after $seconds s" | tee -a "$file"
    echo "=== status $status after $((SECONDS - begin)) s" | tee -a "$file"
    return "$status"
}
cores=()
python3 -c "import xdist" 2>/dev/null && cores=(-n "$(($(nproc) > 2 ? $(nproc) - 2 : 1))")
command -v nvidia-smi >/dev/null && nvidia-smi | tee "$out/gpu.txt"

if [ -z "$tiny" ]; then # first, and side by side: they compile what the other parts then find compiled
    natively=(tests/test_kernels.py tests/test_attention.py tests/test_draw.py tests/test_kl.py)
    part tests 120 python3 -m pytest -q "${cores[@]}" tests/test_cuda.py "${natively[@]}" --durations=8
fi
part smoke 80 python3 -m bench.gpu --part=smoke $tiny || exit 1
part floors 20 python3 -m bench.gpu --part=floors $tiny
part decode 50 python3 -m bench.gpu --part=decode $tiny
part micro 60 python3 -m bench.gpu --part=micro $tiny
part profile 40 python3 -m bench.gpu --part=profile $tiny
part contexts 20 python3 -m bench.gpu --part=contexts $tiny
part sweep 100 python3 -m bench.gpu --part=sweep $tiny
size=(--depths=12 --contexts=1024 --steps=3 --contenders=baseline,kernels,kernels+compile)
part train 100 python3 -m bench.train "${size[@]}" --out="$out" $tiny
part quickstart 300 python3 quickstart.py --out="out/quickstart_gpu${TINY:+_tiny}" ${TINY:+--fast}
size=(--depth=12 --vocab=50304 --steps=2 --answers=128 --max_new_tokens=256)
[ -z "$tiny" ] || size=(--depth=1 --width=32 --vocab=512 --answers=4 --group=2 --max_new_tokens=8 --steps=2 --device=cpu)
part rl 100 python3 -m bench.rl "${size[@]}"
part kernels 110 python3 -m bench.kernels --rounds=1 --out="$out" $tiny
nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv 2>/dev/null | tee -a "$out/gpu.txt"
echo "=== done after $SECONDS s"
