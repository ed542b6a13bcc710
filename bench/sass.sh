#!/usr/bin/env bash
# bench.sass under triton 3.6 and under the installed triton; both tables go to
# bench/results/sass.txt. Exit status 1 if a rule is broken. PyTorch's own requirement of one triton
# does not matter here: nothing is launched, and a folder ahead of it on PYTHONPATH has the other.
set -uo pipefail
cd "$(dirname "$0")/.."
source ./venv.sh "" || exit 1  # no extras, and not the arguments given here
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
other=$(mktemp -d)
trap 'rm -rf "$other"' EXIT
python -m pip install -q --no-deps --target "$other" triton==3.6.0 || exit 1
status=0
{
    echo "commit $(git describe --always --dirty); bash bench/sass.sh"
    echo
    PYTHONPATH=$other python -m bench.sass "$@" || status=1
    echo
    python -m bench.sass "$@" || status=1
    exit $status
} | tee bench/results/sass.txt
