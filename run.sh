#!/usr/bin/env bash
# The quick start, alone on a fresh machine with Python >= 3.11: makes .venv, installs, runs
# quickstart.py. Arguments are passed on to it.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh report,serve  # matplotlib for the charts, starlette and uvicorn for serve.py
exec python quickstart.py "$@"
