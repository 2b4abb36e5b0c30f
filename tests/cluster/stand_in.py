"""In place of launch/train.py where only its launching is looked at: writes down its words, then ends as told.

STAND_IN says how, one word for every start of the job, `0` where it is not set:
    an exit code; `kill`: SIGKILL to itself; `wait`: for SIGUSR1 or SIGTERM, then 2 s of saving, then code 75;
    `stay`: whatever signal comes; `CODE@HOST`: that host ends with this code, the others `wait`;
    with a `+` at its end: a newer checkpoint is left in output_dir first.
Every rank adds a line of JSON to `told.jsonl` in the working folder.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
act = (os.environ.get("STAND_IN") or "0").split()[start]
if act.endswith("+"):
    act = act[:-1]
    folder = Path(next(word for word in sys.argv if word.startswith("output_dir=")).partition("=")[2], "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest").write_text(f"step-{start + 1:06d}\n")
if "@" in act:
    act, host = act.split("@")
    act = act if host == os.uname().nodename else "wait"
got = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))

fact = {
    "argv": sys.argv[1:],
    "start": start,
    "host": os.uname().nodename,
    "python": sys.executable,
    "env": {
        name: text
        for name, text in os.environ.items()
        if name.startswith(("SLURM_", "OMP_", "HF_", "PYTHON_", "RANK", "WRAPPED", "NOT_"))
    },
}
with open("told.jsonl", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(fact) + "\n")
print(f"started {act}", flush=True)
if act == "wait":
    while not got:
        signal.pause()
    print(f"stopped by {signal.Signals(got[0]).name}", flush=True)
    time.sleep(2)
    print("saved", flush=True)
    sys.exit(75)
while act == "stay":
    signal.pause()
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(act))
