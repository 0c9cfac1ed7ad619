#!/usr/bin/env bash
# The whole suite, in two processes side by side that take about as long: the tests that run vLLM's engine in their own
# process, and all others.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export OMP_NUM_THREADS=1
# vLLM binds its worker to cores, and by default every vLLM on the machine to the same one.
first=() second=()
if [ "$(nproc)" -ge 2 ]; then
    first=(env VLLM_CPU_OMP_THREADS_BIND=0)
    second=(env VLLM_CPU_OMP_THREADS_BIND=1)
fi
"${second[@]}" .venv/bin/python -m pytest -q tests --ignore=tests/engine >"$logs/other" 2>&1 &
other=$!
"${first[@]}" .venv/bin/python -m pytest -q tests/engine 2>&1
engine=$?
wait "$other"
others=$?
cat "$logs/other"
[ "$engine" -eq 0 ] && [ "$others" -eq 0 ]
