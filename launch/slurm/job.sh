# shellcheck shell=bash
# What train.sbatch and encode.sbatch share. Sourced inside a job; `run_job NAME WORDS...` runs launch/NAME.py with
# these words on every rank, puts the job back into the queue where that helps, and ends it with the run's exit code.
# docs/operations.md tells the rest. Set before sbatch, each of them may be left out:
#
#   COGDS_DIR             the checkout (default: where sbatch was called)
#   COGDS_PYTHON          the interpreter (default: .venv/bin/python of the checkout if it is there, else python)
#   COGDS_RANKS_PER_NODE  ranks a node (default: the GPUs of a node, or --ntasks-per-node, or 1)
#   COGDS_SRUN_ARGS       more words for srun, split at blanks: --container-image=...
#   COGDS_WRAP            words in front of the interpreter, split at blanks: apptainer exec --nv image.sif
#   COGDS_MAX_RESTARTS    restarts without a newer checkpoint after crashes and hangs (default: 10)

readonly EXIT_USER_ERROR=2 EXIT_INTERRUPTED=75 # as in cogds/errors.py

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

refuse() {
  echo "error: $*" >&2
  exit $EXIT_USER_ERROR
}

num_ranks_per_node() {
  local num=${COGDS_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
  [[ $num =~ ^[1-9][0-9]*$ ]] || refuse "'$num' ranks a node: export COGDS_RANKS_PER_NODE with a whole number"
  echo "$num"
}

# The CPUs of the node that has the fewest; SLURM writes them as 64(x3),32.
min_cpus_per_node() { tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1; }

# The name of this job alone: the number of the last task of an array stands for the whole array too.
own_name() {
  if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

# Whether nobody is ending this job, or only its time limit does. A job that was cancelled would come back if asked to;
# one that is made way of is RUNNING until its grace time is over, and then comes back by itself.
may_come_back() {
  local facts
  facts=$(scontrol show job -o "$(own_name)") || return 1
  [[ $facts == *" JobState=RUNNING "* || $facts == *" Reason=TimeLimit "* ]]
}

come_back() { # come_back WHY
  trap '' USR1 TERM # requeueing ends this very job: let scontrol and this function finish
  if ! may_come_back; then
    say "$1; cancelled, or already on its way back: it is left at that"
  elif scontrol requeue "$(own_name)"; then
    say "$1; back into the queue"
  else
    say "$1; SLURM did not take it back into the queue: submit it again, it goes on where it stopped"
  fi
}

# The newest checkpoint of the run that these words describe, "" where there is none. Asked on a node as the ranks are
# started, in their container; through a file, as srun may put labels in front of lines.
newest_checkpoint() { # newest_checkpoint WORDS...
  local file=logs/.newest-$SLURM_JOB_ID
  timeout 300 srun --nodes=1 --ntasks=1 --cpus-per-task=1 --output=/dev/null --error=/dev/null "${srun_args[@]}" \
    "${wrap[@]}" "$python" - "$COGDS_DIR" "$file" "$@" <<'END' 2>/dev/null
import sys
from pathlib import Path

root, file, *argv = sys.argv[1:]
sys.path.insert(0, root)
from cogds.cli import parse_args
from cogds.config.loading import load_config

args = parse_args(argv, "")
cfg, _ = load_config(args.config or f"{root}/launch/configs/demo.yaml", args.overrides)
Path(file).write_text(Path(cfg.output_dir, "checkpoints/latest").read_text())
END
  cat "$file" 2>/dev/null
  rm -f "$file"
}

# Why the run ended: the exit code of the rank that ended first. The others are ended for it, with codes of their own.
cause_of() { # cause_of CODE-OF-SRUN FILE-OF-ITS-MESSAGES
  local first
  if grep -q '"srun --help"' "$2"; then # COGDS_SRUN_ARGS holds what srun does not know
    echo $EXIT_USER_ERROR
    return
  fi
  first=$(grep -m 1 -E ': tasks? [0-9,-]+: ' "$2")
  if [[ $1 == 0 || ! $first =~ "Exited with exit code "([0-9]+)$ ]]; then
    echo "$1" # done, or a signal, or srun itself
  elif ((BASH_REMATCH[1] == EXIT_USER_ERROR)) && grep -q "Exited with exit code 1$" "$2"; then
    echo 1 # a crash of one rank, which the others only report
  else
    echo "${BASH_REMATCH[1]}"
  fi
}

# The job's steps of ranks, as SLURM knows them; fails where SLURM does not answer.
steps() {
  local all
  all=$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i 2>/dev/null) || return 1
  grep -E '\.[0-9]+ *$' <<<"$all" || true
}

ranks_may_run() { # or SLURM does not answer, and they may
  local found
  found=$(steps) || return 0
  [[ $found ]]
}

# Without srun the ranks train on, and hold what the job's next step needs: let them save and end, or end them.
end_ranks() {
  local left=120 step found
  scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null # to the ranks, not to this script
  while ((left-- > 0)) && ranks_may_run; do sleep 1; done
  found=$(steps) || found=$SLURM_JOB_ID.0 # the ranks are the first step that this script starts
  for step in $found; do
    scancel "$step" 2>/dev/null
  done
}

run_job() {
  local name=$1 ranks cpus word code=0 stopped=0 step=""
  shift
  # srun takes SIGTERM as an order to kill the ranks, SIGUSR1 it hands on: they save, and end with EXIT_INTERRUPTED.
  trap 'stopped=1; [[ ! $step ]] || kill -USR1 "$step" 2>/dev/null' USR1 TERM
  local script=$COGDS_DIR/launch/$name.py
  local wrap srun_args python=${COGDS_PYTHON:-}
  read -ra wrap <<<"${COGDS_WRAP:-}"
  read -ra srun_args <<<"${COGDS_SRUN_ARGS:-}"
  if [[ ! $python ]]; then
    python=python
    [[ -x $COGDS_DIR/.venv/bin/python ]] && python=$COGDS_DIR/.venv/bin/python
  fi

  local words=()
  for word in "$@"; do
    if [[ $word == *"{task}"* ]]; then
      [[ ${SLURM_ARRAY_TASK_ID:-} ]] || refuse "{task} in '$word', but this is no array: sbatch --array=0-7 ..."
      word=${word//"{task}"/$SLURM_ARRAY_TASK_ID}
    fi
    # A job that comes back goes on with its run: it has begun afresh already.
    if [[ $word == checkpoint.resume=none && ${SLURM_RESTART_COUNT:-0} != 0 ]]; then word=checkpoint.resume=auto; fi
    words+=("$word")
  done

  ranks=$(num_ranks_per_node) || exit $?
  cpus=$(($(min_cpus_per_node) / ranks))
  if ((cpus == 0)); then
    refuse "the job has $(min_cpus_per_node) CPUs on a node for $ranks ranks: sbatch --exclusive, or --cpus-per-gpu=8"
  fi
  if ((cpus > 1)); then cpus=$((cpus - cpus % 2)); fi # whole cores where a core is two CPUs
  if [[ ${SLURM_GPUS:-} =~ ^([^0-9].*:)?([0-9]+)$ && ${SLURM_GPUS_ON_NODE:-} ]]; then
    ((BASH_REMATCH[2] == SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES)) ||
      refuse "${BASH_REMATCH[2]} GPUs lie unevenly on $SLURM_JOB_NUM_NODES nodes: sbatch --nodes=N --gpus-per-node=M"
  fi

  # What sbatch was told about tasks would contradict srun; what another launcher left would be taken for the ranks'.
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK \
    SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_GPUS_PER_TASK RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} PYTHONUNBUFFERED=1

  local count_file=logs/.restarts-$SLURM_JOB_ID messages=logs/.srun-$SLURM_JOB_ID
  mkdir -p logs || refuse "cannot make $PWD/logs: submit from a folder that you may write into"
  [[ ${SLURM_RESTART_COUNT:-0} != 0 ]] || rm -f "$count_file" # of an older job with this number
  say "$SLURM_JOB_NUM_NODES nodes, $ranks ranks and $cpus CPUs a rank on each; logs/$SLURM_JOB_NAME-$SLURM_JOB_ID-NODE.log"

  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) --ntasks-per-node="$ranks" \
    --cpus-per-task="$cpus" --kill-on-bad-exit=1 --wait=60 --output=logs/%x-%j-%N.log --open-mode=append \
    "${srun_args[@]}" "${wrap[@]}" "$python" "$script" "${words[@]}" 2>"$messages" &
  step=$!
  if ((stopped)); then kill -USR1 "$step"; fi # it came too early for the trap to hand on
  # A trapped signal ends `wait` early.
  while
    wait "$step" && code=0 || code=$?
    kill -0 "$step" 2>/dev/null
  do :; done
  code=$(cause_of "$code" "$messages")
  cat "$messages" >&2
  rm -f "$messages"
  # A signal ended srun, or a rank (its others are being ended), or SLURM does not answer.
  if ((code > 128)) && ranks_may_run; then
    say "code $code, and ranks may still be there: they are asked to save and end"
    end_ranks
  fi

  if ((code == 0 || code == EXIT_USER_ERROR)); then
    rm -f "$count_file"
    say "ended with code $code"
  elif ((code == EXIT_INTERRUPTED || stopped)); then
    rm -f "$count_file"
    come_back "stopped with code $code"
  else
    local count=0 before="" now
    now=$(newest_checkpoint "${words[@]}")
    [[ -f $count_file ]] && { read -r count && IFS= read -r before; } <"$count_file"
    if [[ $now == "$before" ]]; then count=$((count + 1)); else count=1; fi
    if ((count > ${COGDS_MAX_RESTARTS:-10})); then
      say "ended with code $code, restart $((count - 1)) without a newer checkpoint: it is given up"
    else
      printf '%s\n' "$count" "$now" >"$count_file"
      come_back "ended with code $code (restart $count of ${COGDS_MAX_RESTARTS:-10} without a newer checkpoint)"
    fi
  fi
  exit "$code"
}
