#!/usr/bin/env bash
# Lint and run every test, alone on a fresh machine with Python >= 3.11: makes .venv, installs, tests.
# Words given are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh test,report,serve,export
ruff check --quiet .
ruff format --quiet --check . || { echo "ruff format . would change files; run it" >&2; exit 1; }
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1  # the tests are many small things: processes beat threads
workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)  # nproc would count OMP_NUM_THREADS: one
exec python -m pytest -q -n "$workers" --dist=loadgroup "$@"
