#!/usr/bin/env bash
# Creates .venv with exact versions, or does nothing where it is up to date. Used by every make target.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "setup: the pinned versions are for Python 3.11; set PYTHON to such an interpreter" >&2
    exit 1
}

stamp=.venv/.metok-setup
inputs=$(cat requirements/cpu.txt scripts/setup.sh pyproject.toml $(git ls-files cpu 2>/dev/null || find cpu -type f) | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then
    exit 0
fi

echo "setup: creating .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Quiet, but for errors; some pip configurations warn about every package they do not hold themselves.
pip() {
    local output
    output=$(.venv/bin/python -m pip --disable-pip-version-check --quiet "$@" 2>&1) || {
        printf '%s\n' "$output" | grep -v '^WARNING: Location' >&2
        return 1
    }
}

# torch: the plain version is a CUDA build on PyPI. The CPU build comes from wherever pip is told to look, else from
# PyTorch's own index.
torch=2.13.0
if ! .venv/bin/python -c "import sys, torch; sys.exit(torch.__version__ != '$torch+cpu')" 2>/dev/null; then
    pip install --no-deps "torch==$torch+cpu" 2>/dev/null ||
        pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
fi
pip install --no-deps -r requirements/cpu.txt
# Build in a copy: setuptools leaves build folders behind.
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r cpu/engine cpu/vllm-metadata "$build"
pip install --no-deps --no-build-isolation --force-reinstall "$build/engine" "$build/vllm-metadata"
pip install --no-deps --no-build-isolation --editable .
.venv/bin/python -c 'import av, metok_vllm, torchvision, transformers, triton, vllm'
echo "$inputs" >"$stamp"
