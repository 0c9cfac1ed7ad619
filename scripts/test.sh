#!/usr/bin/env bash
# The whole suite, in two processes side by side: the tests that start vLLM's engine, and all others.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export OMP_NUM_THREADS=1
.venv/bin/python -m pytest -q tests --ignore=tests/engine --ignore=tests/server >"$logs/other" 2>&1 &
other=$!
.venv/bin/python -m pytest -q tests/engine tests/server 2>&1
engine=$?
wait "$other"
others=$?
cat "$logs/other"
[ "$engine" -eq 0 ] && [ "$others" -eq 0 ]
