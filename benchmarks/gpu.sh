#!/usr/bin/env bash
# Measure cogds on one GPU in two calls of at most 440 s: see benchmarks/gpu.py and docs/performance.md.
#
#     bash benchmarks/gpu.sh FOLDER 1|2 [--tiny] [--wheels DIR]
#
# FOLDER: gets call1.jsonl or call2.jsonl, one line per measurement, which survive if the call is killed.
# --wheels: wheels of packages that this machine lacks. They are installed without a network into a temporary folder.
# --tiny: rehearse with a tiny model, on a CPU too.
# PYTHON is the interpreter (default: that of .venv). COMMIT is recorded if this copy has no repository.
set -u
limit=440
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || echo python3)}
arguments=() wheels=''
while (($#)); do
    case $1 in
    --wheels)
        wheels=${2:?error: --wheels: no folder given. Name the folder of the wheels.}
        shift ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export HF_HUB_OFFLINE=1
left=$((limit - SECONDS))
timeout --kill-after=5 "$left" "$python" -u benchmarks/gpu.py "${arguments[@]}" --limit-s $((left - 5))
