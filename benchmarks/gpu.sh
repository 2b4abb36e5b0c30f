#!/usr/bin/env bash
# What to measure first on one GPU: in under ten minutes, the most important first, each with a limit of its own.
#
#     bash benchmarks/gpu.sh [FOLDER] [PART ...]
#
# Parts: agree peers step short (without any: these four, 590 s at most), then zero3, precision, loss, profile for
# another fourteen minutes. `agree` comes first: what computes something else need not be timed. Logs, with a line of
# JSON at the end of each, go to FOLDER (outputs/gpu). It needs no model, no clips and no network: weights are random.
# With SIZE=tiny it tries itself out on a CPU. PYTHON is the interpreter, by default that of .venv. The code is 1 where
# a part failed.
set -u
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu}
shift || true
parts=${*:-agree peers step short}
size=${SIZE:-real}
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)} failed=0
long=81x768x1360 short=49x480x720,81x480x720 compile=on,off compiled=--compile type=bf16 slower=1
if [ "$size" = tiny ]; then
    long=17x64x96 short=5x64x64,9x64x64 compile=off compiled='' type=fp32 slower=10 # a CPU compiles for minutes
fi
export HF_HUB_OFFLINE=1
mkdir -p "$folder"

# NAME LIMIT SCRIPT ARGUMENTS...
run() {
    local name=$1 limit=$(($2 * slower)) script=$3 before=$SECONDS
    shift 3
    echo "== $name: $script $*"
    timeout "$limit" "$python" -u "benchmarks/$script" "$@" >"$folder/$name.log" 2>&1
    local code=$?
    echo "   exit $code after $((SECONDS - before)) s"
    ((code == 0)) || failed=1
    grep -E '^(size|real|tiny|bf16|fp32|type|  attention|peak )' "$folder/$name.log" | cut -c1-250
    grep -q '^{"benchmark"' "$folder/$name.log" || tail -n 8 "$folder/$name.log"
}

# NAME LIMIT ARGUMENTS...: step.py begins nothing new 45 s before its limit, so that it prints its table.
step() { run "$1" "$2" step.py --limit-s $(($2 * slower - 45)) --sizes "$size" --precisions "$type" "${@:3}"; }

for part in $parts; do
    case $part in
    agree) # checkpointing, kernels and compilation against float32, on a model of 0.14 billion parameters
        # shellcheck disable=SC2086
        run agree 80 agree.py --limit-s $((80 * slower - 25)) --size "${size/real/mid}" --precision "$type" $compiled ;;
    peers) # ours, compiled, against the common step, at the size that matters; the fastest kernel there for both
        # shellcheck disable=SC2086 # $compiled is a word or none
        run peers 230 peers.py --limit-s $((230 * slower - 45)) --sizes "$size" --precision "$type" \
            --checkpointing selective --kernel auto $compiled --rounds 2 ;;
    step) # checkpointing and compilation, the fastest kernel; whether it stays below 24 GB is full+offload's row
        step step 180 --buckets "$long" --kernels auto --compile "$compile" --rounds 2 \
            --checkpointing selective,full,full+offload ;;
    short) # the shorter buckets, where more may be kept
        step short 100 --buckets "$short" --checkpointing selective,none --kernels auto --compile "${compile%%,*}" \
            --rounds 3 ;;
    zero3)
        step zero3 150 --buckets "${short%%,*}" --checkpointing selective --rounds 3 \
            --deepspeed zero2,zero3,zero3_offload ;;
    precision) # needs torchao and bitsandbytes; what cannot be had is a row that says so
        step precision 300 --buckets "$long" --checkpointing selective --kernels auto --rounds 1 \
            --quantizations none,int8,fp8,nf4 --fp8-matmul off,on ;;
    loss) # what the same quantizations do to the loss, on random weights
        run loss 240 quantized_loss.py --size "$size" --bucket "${short%%,*}" ;;
    profile) # where the time of a step goes
        step profile 150 --buckets "${short##*,}" --checkpointing selective --kernels auto --rounds 2 --profile ;;
    *)
        echo "no part is called $part: there are agree, peers, step, short, zero3, precision, loss, profile" >&2
        exit 2 ;;
    esac
done
exit "$failed"
