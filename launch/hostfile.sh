#!/usr/bin/env bash
# launch/hostfile.sh HOSTFILE [--script encode] [--deepspeed DS.json] [--config RUN.yaml] [key=value ...]
#
# `deepspeed --hostfile HOSTFILE launch/train.py ...` over pdsh and ssh, for long runs:
# - words reach the ranks as they are, whatever is in them: packed into one word that no shell on the way splits or runs;
# - variables that ranks need come along: OMP_*, HF_*, NCCL_* and others below (not those named like a secret, as every
#   user of a node can read command lines), those that COGDS_PASS names, and the lines of .deepspeed_env;
# - a node that is gone ends the job within half a minute, and nothing of it stays behind on the others;
# - SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 make the ranks save and end with code 75; a second one ends them at once.
#
# It ends with the code of the ranks. May be set: COGDS_PYTHON (default: .venv/bin/python of the checkout if it is there,
# else python; the same path on all nodes), COGDS_DEEPSPEED_ARGS (more words for DeepSpeed's launcher, split at blanks:
# --ssh_port 2222), COGDS_PASS (more variables, split at blanks; `MY_*` is a prefix), PDSH_SSH_ARGS_APPEND.
set -uo pipefail
set -f # patterns here and in COGDS_PASS are for names of variables, not of files

pass=(OMP_* MKL_* KMP_* TORCH* PYTORCH* TRITON_* HF_* HUGGINGFACE_* TRANSFORMERS_* DIFFUSERS_* DEEPSPEED_* NCCL_* GLOO_*
  TP_* UCX_* FI_* CUDA_HOME CUDA_LAUNCH_BLOCKING XDG_CACHE_HOME TMPDIR PATH LD_LIBRARY_PATH PYTHON* CC CXX)
secret='TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY'

refuse() {
  echo "error: $*" >&2
  exit 2
}

# A value between double quotes of the remote shell, in a command of pdsh, which fills in %h, %u and %n.
escaped() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//\$/\\\$}
  text=${text//\`/\\\`}
  printf '%s' "${text//%/%%}"
}

# The lines of DeepSpeed's file of variables: its reader breaks on blank lines and comments, and runs what is in $().
variables() {
  local name pattern chosen file
  for file in ~/"${DS_ENV_FILE:-.deepspeed_env}" "${DS_ENV_FILE:-.deepspeed_env}"; do
    [[ -f $file ]] && grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file"
  done
  read -ra chosen <<<"${COGDS_PASS:-}"
  for name in $(compgen -e); do
    for pattern in "${pass[@]}"; do
      # shellcheck disable=SC2053 # it is a pattern
      [[ $name == $pattern && ! $name =~ $secret ]] && chosen+=("$name") && break
    done
  done
  for pattern in "${chosen[@]}"; do
    for name in $(compgen -e); do
      # shellcheck disable=SC2053
      [[ $name == $pattern ]] || continue
      if [[ ${!name} == *$'\n'* ]]; then
        echo "warning: $name is not passed on: it has several lines" >&2
      else
        printf '%s=%s\n' "$name" "$(escaped "${!name}")"
      fi
    done
  done
}

# Signal processes of this run alone, on all nodes. The pattern does not find the command line that it stands in.
on_all_nodes() { # on_all_nodes SIGNAL PATTERN
  PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="-o ConnectTimeout=5 $PDSH_SSH_ARGS_APPEND" timeout 30 pdsh -f 1024 -w "$hosts" "pkill -$1 -f -- '$2'" </dev/null >/dev/null 2>&1
}

[[ $# -ge 1 && ${1:-} != -* ]] || refuse "the hostfile comes first: launch/hostfile.sh HOSTFILE [key=value ...]"
hostfile=$1
shift
script=train
if [[ ${1:-} == --script ]]; then
  script=${2:-}
  shift 2 || refuse "--script names a file of launch/: --script encode"
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
python=${COGDS_PYTHON:-}
if [[ ! $python ]]; then
  python=python
  [[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
fi
[[ -f $hostfile ]] || refuse "there is no hostfile $hostfile: hostfile.example shows what is in it"
[[ $script =~ ^[a-z_]+$ && -f $root/launch/$script.py ]] || refuse "--script $script: there is no launch/$script.py"
command -v pdsh >/dev/null || refuse "pdsh is not installed on this node: it is what reaches the others"
for path in "$PWD" "$root" "$(command -v "$python")"; do
  [[ $path =~ ^[A-Za-z0-9_@+=:,./-]+$ ]] ||
    refuse "'$path' has characters that do not survive remote shells: use letters, digits and any of _@+=:,./- in paths"
done
hosts=$(sed -nE 's/^[[:space:]]*([^#[:space:]]+)[[:space:]]+slots=[0-9].*/\1/p' "$hostfile" | paste -sd, -)
[[ $hosts ]] || refuse "$hostfile names no node: one line a node, such as 'node1 slots=8'"
read -ra deepspeed_args <<<"${COGDS_DEEPSPEED_ARGS:-}"

packed=
if (($#)); then packed=$(printf '%s\0' "$@" | base64 -w 0 | tr '+/' '-_'); fi
env_file=$(mktemp) || exit 1 # readable by its owner alone
messages=$(mktemp) || exit 1
trap 'rm -f "$env_file" "$messages"' EXIT
variables >"$env_file"
export DS_ENV_FILE=$env_file
# A connection that is silent for 9 s is lost; without it ssh waits for hours.
export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=3 -o ServerAliveCountMax=3 -o ConnectTimeout=20 ${PDSH_SSH_ARGS_APPEND:-}"

ranks="$script\\.py --local_rank=[0-9]+ --packed=$packed\$"
launchers="^[^ ]+ -u -m deepspeed[.]launcher[.]launch .*${script}[.]py --packed=$packed\$"
end_all() { on_all_nodes KILL "$ranks|$launchers"; }
num_signals=0
stop() {
  num_signals=$((num_signals + 1))
  if ((num_signals == 1)); then
    echo "asking all ranks to save and stop; again to stop at once" >&2
    on_all_nodes USR1 "$ranks" &
  else
    end_all &
  fi
}
trap stop TERM INT HUP USR1

set -m # a group of its own, or Ctrl-C would end pdsh before the ranks have saved
"$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --force_multi --master_addr "${hosts%%,*}" \
  --master_port $((20000 + RANDOM % 12000)) "${deepspeed_args[@]}" "$root/launch/$script.py" "--packed=$packed" \
  </dev/null 2> >(tee >(grep --line-buffered '^pdsh@' >"$messages") >&2) &
runner=$!
set +m
# pdsh says which node has failed, but waits for the others, whose ranks may be waiting for that node.
end_at='' ended=0
while kill -0 "$runner" 2>/dev/null; do
  sleep 1
  if [[ -s $messages && ! $end_at ]]; then
    end_at=$((SECONDS + 10)) # time to end by themselves, but not where a connection broke, ssh's 255
    if grep -q 'exit code 255$' "$messages"; then end_at=$SECONDS; fi
  fi
  if [[ $end_at ]] && ((SECONDS >= end_at)); then
    end_all
    ended=1
    end_at=$((SECONDS + 60)) # once more should that have come to nothing
  fi
done
wait "$runner"
code=$?
trap '' TERM INT HUP USR1
if [[ $(head -n 1 "$messages") =~ exit\ code\ ([0-9]+)$ ]]; then
  code=${BASH_REMATCH[1]} # of the node that failed first; the others were ended for it
fi
if ((code != 0 && !ended)); then end_all; fi
exit "$code"
