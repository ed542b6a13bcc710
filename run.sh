#!/usr/bin/env bash
# The quick start, alone on a fresh machine with Python >= 3.11: makes .venv, installs, runs
# quickstart.py. Arguments are passed on to it.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh report  # matplotlib, for the charts
exec python quickstart.py "$@"
