#!/usr/bin/env bash
# launch/hostfile.sh HOSTFILE [--script encode] [--deepspeed DS.json] [--config RUN.yaml] [key=value ...]
#
# Runs `deepspeed --hostfile HOSTFILE launch/train.py ...` over pdsh and ssh, with what long runs need:
# - Arguments reach the ranks unchanged, whatever characters they contain: they are packed into one word that no shell
#   on the way splits or evaluates.
# - The ranks get the environment variables they need: OMP_*, HF_*, NCCL_* and the others listed below, those that
#   COGDS_PASS names, and the lines of .deepspeed_env. Variables named like a secret are left out, because every user of
#   a node can read command lines.
# - If a node is lost, the job ends within half a minute, and no process stays behind on the other nodes.
# - SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 make the ranks save and end with code 75. A second signal ends them at
#   once.
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

# Signal the processes of this run on all nodes. The pattern does not match the command line that contains it.
signal_all_nodes() { # signal_all_nodes SIGNAL PATTERN
  PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="-o ConnectTimeout=5 $PDSH_SSH_ARGS_APPEND" timeout 30 pdsh -f 1024 -w "$hosts" "pkill -$1 -f -- '$2'" </dev/null >/dev/null 2>&1
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
[[ -f $hostfile ]] || fail "hostfile: no such file: $hostfile. Write one like hostfile.example."
[[ $script =~ ^[a-z_]+$ && -f $root/launch/$script.py ]] ||
  fail "--script: no such script: launch/$script.py. Pass the name of a script of launch/: --script encode"
command -v pdsh >/dev/null || fail "pdsh: not found. Install it on this machine; it starts the ranks on the nodes."
for path in "$PWD" "$root" "$(command -v "$python")"; do
  [[ $path =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] ||
    fail "path '$path': it contains characters that remote shells change. Use only letters, digits and _@+=:,./-"
done
hosts=$(sed -nE 's/^[[:space:]]*([^#[:space:]]+)[[:space:]]+slots=[0-9].*/\1/p' "$hostfile" | paste -sd, -)
[[ $hosts ]] || fail "$hostfile: it lists no node. Write one line per node, such as 'node1 slots=8'."
read -ra deepspeed_args <<<"${COGDS_DEEPSPEED_ARGS:-}"

packed=
if (($#)); then packed=$(printf '%s\0' "$@" | base64 -w 0 | tr '+/' '-_'); fi
env_file=$(mktemp) || exit 1 # readable only by its owner
messages=$(mktemp) || exit 1
trap 'rm -f "$env_file" "$messages"' EXIT
print_variables >"$env_file"
export DS_ENV_FILE=$env_file
# A connection without an answer for 9 s is lost. By default, ssh waits for hours.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=3 -o ServerAliveCountMax=3 -o ConnectTimeout=20 ${PDSH_SSH_ARGS_APPEND:-}"

ranks="$script\\.py --local_rank=[0-9]+ --packed=$packed\$"
launchers="^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*${script}[.]py --packed=$packed\$"
kill_all() { signal_all_nodes KILL "$ranks|$launchers"; }
num_signals=0
stop() {
  num_signals=$((num_signals + 1))
  if ((num_signals == 1)); then
    echo "asking all ranks to save and stop; a second signal stops them at once" >&2
    signal_all_nodes USR1 "$ranks" &
  else
    kill_all &
  fi
}
trap stop TERM INT HUP USR1

set -m # start a new process group: otherwise Ctrl-C would end pdsh before the ranks have saved
"$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi --master_addr "${hosts%%,*}" \
  --master_port $((20000 + RANDOM % 12000)) "${deepspeed_args[@]}" "$root/launch/$script.py" "--packed=$packed" \
  </dev/null 2> >(tee >(grep --line-buffered '^pdsh@' >"$messages") >&2) &
runner=$!
set +m
# pdsh reports the node that has failed but waits for the others, whose ranks may be waiting for that node.
kill_at='' killed=0
while kill -0 "$runner" 2>/dev/null; do
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
done
wait "$runner"
code=$?
trap '' TERM INT HUP USR1
if [[ $(head -n 1 "$messages") =~ exit\ code\ ([0-9]+)$ ]]; then
  code=${BASH_REMATCH[1]} # of the node that failed first; the other nodes were stopped because of it
fi
if ((code != 0 && !killed)); then kill_all; fi
exit "$code"
