#!/usr/bin/env bash
# Makes .venv from a pinned closure (cpu.txt or gpu.txt, whichever the machine is) and installs thinkimg into it.
# usage: setup.sh [test]   with "test" also what the tests need
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
started=$(date +%s)

if ! command -v "$python" >/dev/null; then
  echo "thinkimg needs Python 3.11 and there is no '$python' here: install it, or name one with PYTHON=…" >&2
  exit 2
fi
closure=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then closure=gpu; fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)

if [ "$closure" = cpu ]; then
  torch=$(grep '^torch==' requirements/cpu.txt)
  if ! "${pip[@]}" install --no-deps --dry-run "$torch" >/dev/null 2>&1; then
    echo "pip finds no $torch: set the environment variable PIP_EXTRA_INDEX_URL to the index of CPU builds that PyTorch's install page (\"Start Locally\", Compute Platform: CPU) gives, and run this again." >&2
    exit 2
  fi
fi

if [ ! -e .venv/ready ] || [ "requirements/$closure.txt" -nt .venv/ready ]; then
  echo "Installing requirements/$closure.txt into .venv (about 4 GB; two minutes on a fast line) …"
  "${pip[@]}" install --no-deps -r "requirements/$closure.txt"
fi
# torchaudio and torchcodec come as CUDA builds only; beside a CPU torch they take transformers down with them, and nothing here needs them.
"${pip[@]}" install --no-deps --no-build-isolation --editable .
.venv/bin/python -m thinkimg.torchvision_hook >/dev/null
touch .venv/ready
if [ "${1:-}" = test ]; then
  "${pip[@]}" install --no-deps -r requirements/test.txt
  touch .venv/ready-test
fi
echo "Set up in $(($(date +%s) - started)) s ($closure)."
