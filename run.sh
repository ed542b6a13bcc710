#!/usr/bin/env bash
# The quick start, alone on a fresh machine with Python >= 3.11: makes .venv, installs, runs quickstart.py. Words given are passed on to it.
set -euo pipefail
cd "$(dirname "$0")"
source ./venv.sh ""  # no extras: without a word of its own it would see those given here
exec python quickstart.py "$@"
