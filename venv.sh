# Sourced by run.sh and test.sh: makes .venv with the dependencies and the extras that are named
# ("test,report"), and activates it. A second run takes a second. A PyTorch that is installed already
# is used as it is, never replaced; without an NVIDIA GPU the CPU build is installed, a tenth of the
# CUDA build's size.
python=""
for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "Python 3.11 or newer is needed (python3 --version)" >&2; exit 1; }
if [ ! -e .venv/bin/activate ]; then  # written last: without pip, python3 -m venv leaves half of it
    system=""
    "$python" -c 'import torch' 2>/dev/null && system=--system-site-packages  # its PyTorch is seen from the environment
    "$python" -m venv $system .venv
fi
source .venv/bin/activate
wanted="$(cksum < pyproject.toml) ${1:-}"
if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
    if ! python -c 'import torch' 2>/dev/null; then
        torch="torch>=2.10,<2.14"
        if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
            # The CPU build: from PyTorch's own index, or from where pip is told to look here
            # (PIP_FIND_LINKS and the like); the CUDA build only if neither has it.
            python -m pip install -q --retries 0 --timeout 15 --only-binary=:all: "$torch" \
                --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
                python -m pip install -q "$torch"
        else
            python -m pip install -q "$torch"
        fi
    fi
    python -m pip freeze --all | grep -i '^torch==' >.venv/torch.txt || true
    # The constraint keeps pip from replacing the PyTorch that is there.
    python -m pip install -q -c .venv/torch.txt -e ".${1:+[$1]}"
    echo "$wanted" >>.venv/installed
fi
