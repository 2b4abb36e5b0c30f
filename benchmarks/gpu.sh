#!/usr/bin/env bash
# What to measure first on one GPU: in under ten minutes, the most important first, each with a limit of its own.
#
#     bash benchmarks/gpu.sh [FOLDER] [PART ...]
#
# Parts: peers step short (without any: these three, 570 s at most), then zero3, precision, profile for another ten
# minutes. Logs, with a line of JSON at the end of each, go to FOLDER (outputs/gpu). It needs no model, no clips and no
# network: weights are random. With SIZE=tiny it tries itself out on a CPU.
set -u
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu}
shift || true
parts=${*:-peers step short}
size=${SIZE:-real}
python=${PYTHON:-python3}
long=81x768x1360 short=49x480x720,81x480x720 compile=off,on type=bf16
if [ "$size" = tiny ]; then
    long=17x64x96 short=5x64x64,9x64x64 compile=off type=fp32
fi
export HF_HUB_OFFLINE=1
mkdir -p "$folder"

# NAME LIMIT SCRIPT ARGUMENTS...: the script begins nothing new 45 s before its limit, so that it prints its table.
run() {
    local name=$1 limit=$2 script=$3 before=$SECONDS
    shift 3
    echo "== $name: $script $*"
    timeout "$limit" "$python" -u "benchmarks/$script" --limit-s $((limit - 45)) --precision"$plural" "$type" "$@" \
        >"$folder/$name.log" 2>&1
    echo "   exit $? after $((SECONDS - before)) s"
    grep -E '^(size|real|tiny|  attention|peak )' "$folder/$name.log" | cut -c1-250
    grep -q '^{"benchmark"' "$folder/$name.log" || tail -n 8 "$folder/$name.log"
}

for part in $parts; do
    plural=s
    case $part in
    peers) # ours against the common step, at the size that matters
        plural='' && run peers 240 peers.py --sizes "$size" --levels attention_kept --rounds 2 ;;
    step) # levels, compilation and the fastest kernel there; whether it stays below 24 GB is block+offload's row
        run step 210 step.py --sizes "$size" --buckets "$long" --kernels auto --compile "$compile" \
            --levels attention_kept,block,block+offload --rounds 2 ;;
    short) # the shorter buckets, where more may be kept
        run short 120 step.py --sizes "$size" --buckets "$short" --levels attention_kept,none --kernels auto --rounds 3 ;;
    zero3)
        run zero3 150 step.py --sizes "$size" --buckets "${short%%,*}" --levels attention_kept --rounds 3 \
            --deepspeed zero2,zero3,zero3_offload ;;
    precision) # needs torchao and bitsandbytes; a base that cannot be had is a row that says so
        run precision 200 step.py --sizes "$size" --buckets "$long" --levels attention_kept --rounds 1 \
            --bases full,int8,float8,nf4 ;;
    profile) # where the time of a step goes
        run profile 150 step.py --sizes "$size" --buckets "${short##*,}" --levels attention_kept --kernels auto \
            --rounds 2 --profile ;;
    *)
        echo "no part is called $part: there are peers, step, short, zero3, precision, profile" >&2
        exit 2 ;;
    esac
done
