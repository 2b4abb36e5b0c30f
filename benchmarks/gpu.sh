#!/usr/bin/env bash
# The first measurements on one GPU, the most important first, in under ten minutes. Each part has its own time limit.
#
#     bash benchmarks/gpu.sh [FOLDER] [PART ...]
#
# Parts: agree, peers, step, short (the default, at most 590 s), and zero3, precision, loss, profile (another 14 min).
# `agree` comes first, because the speed of a wrong result is of no interest. Logs go to FOLDER (default: outputs/gpu).
# Each ends with a line of JSON. Weights are random, so no model, clips or network are needed. SIZE=tiny tries the
# script out on a CPU. PYTHON is the interpreter (default: that of .venv). The exit code is 1 if a part fails.
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

# NAME LIMIT ARGUMENTS...: step.py starts nothing new in its last 45 s, so that it can print its table.
step() { run "$1" "$2" step.py --limit-s $(($2 * slower - 45)) --sizes "$size" --precisions "$type" "${@:3}"; }

for part in $parts; do
    case $part in
    agree) # checkpointing, kernels and compilation against float32, on a model of 0.14 billion parameters
        # shellcheck disable=SC2086
        run agree 80 agree.py --limit-s $((80 * slower - 25)) --size "${size/real/mid}" --precision "$type" $compiled ;;
    peers) # our step, compiled, against the common step, both with the fastest kernel
        # shellcheck disable=SC2086 # $compiled is one word or none
        run peers 230 peers.py --limit-s $((230 * slower - 45)) --sizes "$size" --precision "$type" \
            --checkpointing selective --kernel auto $compiled --rounds 2 ;;
    step) # checkpointing and compilation with the fastest kernel; full+offload shows whether 24 GB are enough
        step step 180 --buckets "$long" --kernels auto --compile "$compile" --rounds 2 \
            --checkpointing selective,full,full+offload ;;
    short) # shorter buckets, in which more activations can be kept
        step short 100 --buckets "$short" --checkpointing selective,none --kernels auto --compile "${compile%%,*}" \
            --rounds 3 ;;
    zero3)
        step zero3 150 --buckets "${short%%,*}" --checkpointing selective --rounds 3 \
            --deepspeed zero2,zero3,zero3_offload ;;
    precision) # needs torchao and bitsandbytes; a quantization that is not available is a row with its error
        step precision 300 --buckets "$long" --checkpointing selective --kernels auto --rounds 1 \
            --quantizations none,int8,fp8,nf4 --fp8-matmul off,on ;;
    loss) # the effect of these quantizations on the loss, with random weights
        run loss 240 quantized_loss.py --size "$size" --bucket "${short%%,*}" ;;
    profile) # the time of a step by operation
        step profile 150 --buckets "${short##*,}" --checkpointing selective --kernels auto --rounds 2 --profile ;;
    *)
        echo "error: $part: no such part. Choose from agree, peers, step, short, zero3, precision, loss, profile." >&2
        exit 2 ;;
    esac
done
exit "$failed"
