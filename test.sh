#!/usr/bin/env bash
# Run every test, alone on a fresh machine with Python >= 3.11: makes .venv, installs, tests. Words given are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh test,report
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # the tests are many small things: processes beat threads (and nproc would count OMP_NUM_THREADS: one)
exec python -m pytest -q -n "$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)" --dist=loadgroup "$@"
