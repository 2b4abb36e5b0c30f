#!/usr/bin/env bash
# launch/hostfile.sh HOSTFILE [--script encode] [--deepspeed DS.json] [--config RUN.yaml] [key=value ...]
#
# Runs `deepspeed --hostfile HOSTFILE launch/train.py ...` over pdsh and ssh, with what long runs need:
# - Arguments reach the ranks unchanged, whatever characters they contain: they are packed into one word that no shell
#   on the way splits or evaluates.
# - The ranks get the environment variables they need: OMP_*, HF_*, NCCL_* and the others listed below, those that
#   COGDS_PASS names, and the lines of .deepspeed_env. Variables named like a secret are left out, because every user of
#   a node can read command lines.
# - Before anything is started, the hostfile is checked, and every node must answer within half a minute.
# - If a node is lost, the job ends within half a minute, and no process stays behind on the other nodes.
# - SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 make the ranks save and end with code 75. A second signal, or the first
#   if no rank exists yet, ends everything at once.
#
# The exit code is that of the ranks. Optional environment variables:
#
#   COGDS_PYTHON           the interpreter, under the same path on all nodes (default: .venv/bin/python of the checkout
#                          if it exists, else python)
#   COGDS_DEEPSPEED_ARGS   more arguments for DeepSpeed's launcher, split at spaces: --ssh_port 2222
#   COGDS_PASS             more variables to pass on, split at spaces; `MY_*` is a prefix
#   PDSH_SSH_ARGS_APPEND   more options for ssh
set -uo pipefail
set -f # the patterns below and in COGDS_PASS match names of variables, not of files

pass=(OMP_* MKL_* KMP_* TORCH* PYTORCH* TRITON_* HF_* HUGGINGFACE_* TRANSFORMERS_* DIFFUSERS_* DEEPSPEED_* NCCL_* GLOO_*
  TP_* UCX_* FI_* CUDA_HOME CUDA_LAUNCH_BLOCKING XDG_CACHE_HOME TMPDIR PATH LD_LIBRARY_PATH PYTHON* CC CXX)
secret='TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY'

fail() {
  echo "error: $*" >&2
  exit 2
}

# Escape a value for double quotes in the remote shell, in a command of pdsh, which replaces %h, %u and %n.
escape() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//\$/\\\$}
  text=${text//\`/\\\`}
  printf '%s' "${text//%/%%}"
}

# Print the lines of DeepSpeed's file of variables. Its reader fails on blank lines and comments, and evaluates $().
print_variables() {
  local name pattern selected file
  for file in ~/"${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
    [[ -f $file ]] && grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file"
  done
  read -ra selected <<<"${COGDS_PASS:-}"
  for name in $(compgen -e); do
    for pattern in "${pass[@]}"; do
      # shellcheck disable=SC2053 # an unquoted pattern is intended
      [[ $name == $pattern && ! $name =~ $secret ]] && selected+=("$name") && break
    done
  done
  for pattern in "${selected[@]}"; do
    for name in $(compgen -e); do
      # shellcheck disable=SC2053
      [[ $name == $pattern ]] || continue
      if [[ ${!name} == *$'\n'* ]]; then
        echo "warning: $name: not passed to the ranks, because its value has several lines" >&2
      else
        printf '%s=%s\n' "$name" "$(escape "${!name}")"
      fi
    done
  done
}

# Signal the processes of this run on all nodes, and print `none` for every node that has no such process. The pattern
# does not match the command line that contains it.
signal_all_nodes() { # signal_all_nodes SIGNAL PATTERN
  PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="-o ConnectTimeout=5 $PDSH_SSH_ARGS_APPEND" timeout 30 \
    pdsh -N -f 1024 -w "$hosts" "pkill -$1 -f -- '$2'; test \$? -ne 1 || echo none" </dev/null 2>/dev/null
}

[[ $# -ge 1 && ${1:-} != -* ]] ||
  fail "hostfile: missing. Pass it as the first argument: launch/hostfile.sh HOSTFILE [key=value ...]"
hostfile=$1
shift
script=train
if [[ ${1:-} == --script ]]; then
  script=${2:-}
  shift 2 || fail "--script: no name. Pass the name of a script of launch/: --script encode"
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
python=${COGDS_PYTHON:-}
if [[ ! $python ]]; then
  python=python
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
[[ $script =~ ^[a-z_]+$ && -f $root/launch/$script.py ]] ||
  fail "--script: no such script: launch/$script.py. Pass the name of a script of launch/: --script encode"
command -v "$python" >/dev/null || fail "COGDS_PYTHON: not found: $python. Export the path of an interpreter."
read -ra deepspeed_args <<<"${COGDS_DEEPSPEED_ARGS:-}"

packed=
if (($#)); then packed=$(printf '%s\0' "$@" | base64 -w 0 | tr '+/' '-_'); fi
ranks="$script\\.py --local_rank=[0-9]+ --packed=$packed\$"
launchers="^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*${script}[.]py --packed=$packed\$"
folder=$(mktemp -d) || exit 1 # readable only by its owner
trap 'rm -rf "$folder"' EXIT
messages=$folder/messages env_file=$folder/variables
# A connection without an answer for 9 s is lost. By default, ssh waits for hours.
# Of several values for an option, ssh takes the first.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=3 -o ServerAliveCountMax=3 -o ConnectTimeout=20"
export PYTHONUTF8=1 # file names are UTF-8, whatever the locale

# Start a command in a process group of its own: otherwise Ctrl-C would end pdsh before the ranks have saved.
start_in_group() { # start_in_group COMMAND... sets `child`
  set -m
  "$@" &
  child=$!
  set +m
}

# `wait` keeps the shell from reporting the killed child.
kill_child() { { kill -KILL -- "-$child" && wait "$child"; } 2>/dev/null; }

# Called in the background after the first signal.
ask_ranks() {
  echo "asking all ranks to save and stop; a second signal stops them at once" >&2
  # If every node answers that it has no rank, there is nothing to save, and nobody to ask.
  if [[ $(signal_all_nodes USR1 "$ranks" | grep -c '^none$') == "$num_nodes" ]]; then
    echo "no rank has started yet; stopping at once" >&2
    : 2>/dev/null >"$folder/no_ranks"
  fi
}

num_signals=0 hosts='' child=''
stop() {
  num_signals=$((num_signals + 1))
  if ((num_signals == 1)) && [[ $hosts ]]; then
    ask_ranks &
  elif [[ $child ]]; then
    kill_child
  fi
}
trap stop TERM INT HUP USR1

# Set `code` to the exit code of the child. A trapped signal interrupts `wait`.
wait_for_child() {
  while
    wait "$child" 2>/dev/null
    code=$?
    kill -0 "$child" 2>/dev/null
  do :; done
}
exit_if_stopped() {
  ((num_signals == 0)) || {
    echo "stopped before anything was started" >&2
    exit 75
  }
}

# The check of the hostfile and the nodes.
start_in_group env PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m cogds.distributed.hostfile \
  "$hostfile" "$folder/hostfile" "$root" "${deepspeed_args[@]}" </dev/null >"$folder/nodes"
wait_for_child
exit_if_stopped
((code == 0)) || exit "$code"
{ IFS= read -r checked && IFS= read -r port_option; } <"$folder/nodes"
num_nodes=$(tr ',' '\n' <<<"$checked" | wc -l)
master=${checked%%,*}
export PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND $port_option"
print_variables >"$env_file"
export DS_ENV_FILE=$env_file

kill_all() { signal_all_nodes KILL "$ranks|$launchers" >/dev/null; }
start_runner() {
  exec "$python" -m deepspeed.launcher.runner --hostfile "$folder/hostfile" --force_multi --no_ssh_check \
    --master_addr "${master##*@}" --master_port $((20000 + RANDOM % 12000)) "${deepspeed_args[@]}" \
    "$root/launch/$script.py" "--packed=$packed" </dev/null 2> >(tee >(grep --line-buffered '^pdsh@' >"$messages") >&2)
}
exit_if_stopped
hosts=$checked # from now on, a signal goes to the nodes
start_in_group start_runner
# pdsh reports the node that has failed but waits for the others, whose ranks may be waiting for that node.
kill_at='' killed=0
while kill -0 "$child" 2>/dev/null; do
  sleep 1
  if [[ -s $messages && ! $kill_at ]]; then
    kill_at=$((SECONDS + 10)) # the ranks get time to end, unless a connection broke (code 255 of ssh)
    if grep -q 'exit code 255$' "$messages"; then kill_at=$SECONDS; fi
  fi
  if [[ $kill_at ]] && ((SECONDS >= kill_at)); then
    kill_all
    killed=1
    kill_at=$((SECONDS + 60)) # try again if this had no effect
  fi
  if [[ -e $folder/no_ranks ]]; then kill_child; fi
done
wait_for_child
trap '' TERM INT HUP USR1
if [[ -s $messages && $(head -n 1 "$messages") =~ exit\ code\ ([0-9]+)$ ]]; then
  code=${BASH_REMATCH[1]} # of the node that failed first; the other nodes were stopped because of it
fi
if ((code != 0 && !killed)); then kill_all; fi
if ((num_signals > 1)); then code=137; fi # SIGKILL
# The signal came before the ranks existed, or ended a rank that had not begun to handle signals (246, 138).
if ((num_signals == 1)) && [[ -e $folder/no_ranks || $code == 246 || $code == 138 ]]; then code=75; fi
exit "$code"
