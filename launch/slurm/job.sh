# shellcheck shell=bash
# Shared by train.sbatch and encode.sbatch. Sourced inside a job; `run_job NAME ARGUMENTS...` runs launch/NAME.py with
# these arguments on every rank, requeues the job if that helps, and ends it with the exit code of the run.
# docs/operations.md explains its use. Optional environment variables, to export before sbatch:
#
#   COGDS_DIR             the checkout (default: the folder in which sbatch was called)
#   COGDS_PYTHON          the interpreter (default: .venv/bin/python of the checkout if it exists, else python)
#   COGDS_RANKS_PER_NODE  ranks per node (default: the number of GPUs per node, or --ntasks-per-node, or 1)
#   COGDS_SRUN_ARGS       more arguments for srun, split at spaces: --container-image=...
#   COGDS_WRAP            a command in front of the interpreter, split at spaces: apptainer exec --nv image.sif
#   COGDS_MAX_RESTARTS    restarts after crashes and hangs without a newer checkpoint (default: 10)

readonly EXIT_USER_ERROR=2 EXIT_INTERRUPTED=75 # as in cogds/errors.py

log() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

fail() {
  echo "error: $*" >&2
  exit $EXIT_USER_ERROR
}

num_ranks_per_node() {
  local num=${COGDS_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  [[ $num =~ ^[1-9][0-9]*$ ]] ||
    fail "COGDS_RANKS_PER_NODE: '$num' ranks per node. Export it as a positive whole number."
  echo "$num"
}

# CPUs of the node that has the fewest. SLURM lists them as 64(x3),32.
min_cpus_per_node() { tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1; }

# The id of this job alone. The plain number of the last task of an array also means the whole array.
job_id() {
  if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Whether the job should be requeued: nothing or only its time limit ends it. A cancelled job must not be requeued. A
# preempted job is RUNNING until its grace time ends; then SLURM requeues it by itself.
should_requeue() {
  local state
  state=$(scontrol show job -o "$(job_id)") || return 1
  [[ $state == *" JobState=RUNNING "* || $state == *" Reason=TimeLimit "* ]]
}

requeue() { # requeue REASON
  trap '' USR1 TERM # requeueing ends this job: let scontrol and this function finish first
  if ! should_requeue; then
    log "$1; not requeued: cancelled, or SLURM is already requeueing it"
  elif scontrol requeue "$(job_id)"; then
    log "$1; requeued"
  else
    log "$1; SLURM refused to requeue it. Submit it again to continue the run."
  fi
}

# Print the name of the run's newest checkpoint, or nothing. Python runs on a node and in the container, like the ranks,
# and answers through a file, because srun may prefix lines with labels.
newest_checkpoint() { # newest_checkpoint ARGUMENTS...
  local file=logs/.newest-$SLURM_JOB_ID
  timeout 300 srun --nodes=1 --ntasks=1 --cpus-per-task=1 --output=/dev/null --error=/dev/null "${srun_args[@]}" \
    "${wrap[@]}" "$python" - "$COGDS_DIR" "$file" "$@" <<'END' 2>/dev/null
import sys
from pathlib import Path

root, file, *argv = sys.argv[1:]
sys.path.insert(0, root)
from cogds.arguments import find_config, parse_args
from cogds.cli import choose_configs
from cogds.config.loading import load_config

args = parse_args("train", argv, "")
configs = [find_config(config, "run_configs", ".yaml") for config in choose_configs(args)]
cfg, _ = load_config(configs, args.overrides)
Path(file).write_text(Path(cfg.output_dir, "checkpoints/latest").read_text())
END
  cat "$file" 2>/dev/null
  rm -f "$file"
}

# Print the exit code of the rank that ended first. srun then ends the others, whose codes say nothing.
first_exit_code() { # first_exit_code SRUN_CODE SRUN_MESSAGES_FILE
  local first
  if grep -q '"srun --help"' "$2"; then # COGDS_SRUN_ARGS has an option that srun does not know
    echo $EXIT_USER_ERROR
    return
  fi
  first=$(grep -m 1 -E ': tasks? [0-9,-]+: ' "$2")
  if [[ $1 == 0 || ! $first =~ "Exited with exit code "([0-9]+)$ ]]; then
    echo "$1" # success, a signal, or an error of srun itself
  elif ((BASH_REMATCH[1] == EXIT_USER_ERROR)) && grep -q "Exited with exit code 1$" "$2"; then
    echo 1 # one rank crashed, and the others only report it
  else
    echo "${BASH_REMATCH[1]}"
  fi
}

# Print the ids of the job's steps with ranks. Fails if SLURM does not answer.
list_steps() {
  local all
  all=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i 2>/dev/null) || return 1
  grep -E '\.[0-9]+ *$' <<<"$all" || true
}

may_ranks_run() { # also true if SLURM does not answer
  local steps
  steps=$(list_steps) || return 0
  [[ $steps ]]
}

# Without srun, the ranks continue and keep the resources of the job's next step: let them save and end, or end them.
end_ranks() {
  local remaining_s=120 step steps
  scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null # to the ranks, not to this script
  while ((remaining_s-- > 0)) && may_ranks_run; do sleep 1; done
  steps=$(list_steps) || steps=$SLURM_JOB_ID.0 # the ranks are the first step of the batch script
  for step in $steps; do
    scancel "$step" 2>/dev/null
  done
}

run_job() {
  local name=$1 ranks cpus arg code=0 stopped=0 step=""
  shift
  # srun kills the ranks on SIGTERM but forwards SIGUSR1: they save and end with EXIT_INTERRUPTED.
  trap 'stopped=1; [[ ! $step ]] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
  local script=$COGDS_DIR/launch/$name.py
  local wrap srun_args python=${COGDS_PYTHON:-}
  read -ra wrap <<<"${COGDS_WRAP:-}"
  read -ra srun_args <<<"${COGDS_SRUN_ARGS:-}"
  if [[ ! $python ]]; then
    python=python
    [[ -x $COGDS_DIR/.venv/bin/python ]] && python=$COGDS_DIR/.venv/bin/python
  fi

  local args=()
  for arg in "$@"; do
    if [[ $arg == *"{task}"* ]]; then
      [[ ${SLURM_ARRAY_TASK_ID:-} ]] ||
        fail "{task}: used in '$arg', but this job is not part of an array. Submit an array: sbatch --array=0-7 ..."
      arg=${arg//"{task}"/$SLURM_ARRAY_TASK_ID}
    fi
    # A requeued job continues its own run; only its first start ignores older checkpoints.
    if [[ $arg == checkpoint.resume=none && ${SLURM_RESTART_COUNT:-0} != 0 ]]; then arg=checkpoint.resume=auto; fi
    args+=("$arg")
  done

  ranks=$(num_ranks_per_node) || exit $?
  cpus=$(($(min_cpus_per_node) / ranks))
  if ((cpus == 0)); then
    fail "CPUs: a node has $(min_cpus_per_node) for $ranks ranks. Add --exclusive or --cpus-per-gpu=8 to sbatch."
  fi
  if ((cpus > 1)); then cpus=$((cpus - cpus % 2)); fi # whole cores, if a core has two hardware threads
  if [[ ${SLURM_GPUS:-} =~ ^([^0-9].*:)?([0-9]+)$ && ${SLURM_GPUS_ON_NODE:-} ]]; then
    ((BASH_REMATCH[2] == SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES)) ||
      fail "GPUs: ${BASH_REMATCH[2]} on $SLURM_JOB_NUM_NODES nodes, unevenly. Use sbatch --nodes=N --gpus-per-node=M."
  fi

  # Task settings of sbatch would contradict those of srun. The ranks would take another launcher's variables for theirs.
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK \
    SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_GPUS_PER_TASK RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} PYTHONUNBUFFERED=1 PYTHONUTF8=1 # file names are UTF-8

  local count_file=logs/.restarts-$SLURM_JOB_ID messages=logs/.srun-$SLURM_JOB_ID
  mkdir -p logs || fail "$PWD/logs: cannot create it. Call sbatch in a folder that you may write to."
  [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -f "$count_file" # left by an older job with this id
  log "nodes: $SLURM_JOB_NUM_NODES, ranks per node: $ranks, CPUs per rank: $cpus; logs in logs/"

  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) --ntasks-per-node="$ranks" \
    --cpus-per-task="$cpus" --kill-on-bad-exit=1 --wait=60 --output=logs/%x-%j-%N.log --open-mode=append \
    "${srun_args[@]}" "${wrap[@]}" "$python" "$script" "${args[@]}" 2>"$messages" &
  step=$!
  if ((stopped)); then kill -USR1 "$step"; fi # it arrived before the trap could forward it
  # A trapped signal interrupts `wait`.
  while
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null
  do :; done
  code=$(first_exit_code "$code" "$messages")
  cat "$messages" >&2
  rm -f "$messages"
  # A signal ended srun or a rank (srun is ending the others), or SLURM does not answer.
  if ((code > 128)) && may_ranks_run; then
    log "code $code, but ranks may still be running; asking them to save and end"
    end_ranks
  fi

  if ((code == 0 || code == EXIT_USER_ERROR)); then
    rm -f "$count_file"
    log "ended with code $code"
  elif ((code == EXIT_INTERRUPTED || stopped)); then
    rm -f "$count_file"
    requeue "stopped with code $code"
  else
    local count=0 before="" now
    now=$(newest_checkpoint "${args[@]}")
    [[ -f $count_file ]] && { read -r count && IFS= read -r before; } <"$count_file"
    if [[ $now == "$before" ]]; then count=$((count + 1)); else count=1; fi
    if ((count > ${COGDS_MAX_RESTARTS:-10})); then
      log "ended with code $code; not requeued: $((count - 1)) restarts without a newer checkpoint. Check the logs."
    else
      printf '%s\n' "$count" "$now" >"$count_file"
      requeue "ended with code $code (restart $count of ${COGDS_MAX_RESTARTS:-10} without a newer checkpoint)"
    fi
  fi
  exit "$code"
}
