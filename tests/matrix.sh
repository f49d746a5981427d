#!/usr/bin/env bash
# One wheel, many torches: builds it once and loads that same file under several versions of torch and Python.
#   tests/matrix.sh                        builds for sm_80 with the Python and torch of .venv
#   tests/matrix.sh dist/fused_lm-*.whl    tests a wheel that is there
# Fetches a torch of each version, gigabytes each, into a temporary folder that is removed again.
set -euo pipefail
cd "$(dirname "$0")/.."

# Python and torch; an empty version is the newest.
MATRIX=("3.10 2.10.*" "3.11 2.13.*" "3.12 2.13.*" "3.13 ")
if [ -n "${ONLY:-}" ]; then MATRIX=("$ONLY"); fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=${1:-}
if [ -z "$wheel" ]; then
  FUSED_LM_CUDA_ARCHS=${FUSED_LM_CUDA_ARCHS:-80} FUSED_LM_FORCE_CUDA=1 \
    .venv/bin/python -m pip wheel -q --no-deps -w "$work" .
  wheel=$(ls "$work"/*.whl)
fi
wheel=$(realpath "$wheel")

cat > "$work/check.py" <<'PYTHON'
import platform, sys
import torch, fused_lm
from fused_lm import _C
from fused_lm.cuda import extension
from fused_lm.ops.schemas import CUDA_SCHEMAS

sys.path.insert(0, sys.argv[1])
from test_cuda_build import test_inner_ops  # opcheck, and the fakes on a GPU's tensors

assert _C.__file__.endswith("_C.abi3.so") and extension.why_not() is None, extension.why_not()
for name in CUDA_SCHEMAS:
    test_inner_ops(name)
print(f"ok: Python {platform.python_version()}, torch {torch.__version__}, {len(CUDA_SCHEMAS)} ops")
PYTHON

# pyenv's, where it is; else the system's.
python_of() {
  local found
  found=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null | sort -V | tail -n 1)
  [ -n "$found" ] && echo "$found" || command -v "python$1"
}

failed=0
for row in "${MATRIX[@]}"; do
  read -r version torch <<< "$row"
  python=$(python_of "$version") || { echo "skipped: no Python $version"; continue; }
  "$python" -m venv "$work/venv"
  pip=("$work/venv/bin/python" -m pip --disable-pip-version-check install -q)
  if "${pip[@]}" "torch${torch:+==$torch}" pytest numpy setuptools && "${pip[@]}" --no-deps "$wheel" &&
    PYTHONPATH=$PWD/tests "$work/venv/bin/python" "$work/check.py" "$PWD"; then
    :
  else
    echo "FAILED: Python $version, torch ${torch:-newest}"
    failed=1
  fi
  rm -rf "$work/venv"
done
exit $failed
