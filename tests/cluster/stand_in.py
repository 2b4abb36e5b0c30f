"""Replaces launch/train.py in tests of the launch scripts: records its arguments and environment, then ends.

The variable STAND_IN selects how it ends, with one word for each start of the job (default: `0`):
    an exit code
    `kill`: sends SIGKILL to itself
    `wait`: waits for SIGUSR1 or SIGTERM, "saves" for 2 s, and exits with code 75
    `stay`: ignores signals and never ends
    `CODE@HOST`: exits with this code on that host, and acts like `wait` on the others
A `+` at the end of a word: first writes a newer checkpoint to output_dir.
Every rank appends a line of JSON to `records.jsonl` in the working folder.
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
received = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))

record = {
    "argv": sys.argv[1:],
    "start": start,
    "host": os.uname().nodename,
    "python": sys.executable,
    "env": {
        name: text
        for name, text in os.environ.items()
        if name.startswith(("SLURM_", "OMP_", "HF_", "PYTHON_", "RANK", "MASTER_", "WRAPPED", "NOT_"))
    },
}
with open("records.jsonl", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(record) + "\n")
print(f"started {act}", flush=True)
if act == "wait":
    while not received:
        signal.pause()
    print(f"stopped by {signal.Signals(received[0]).name}", flush=True)
    time.sleep(2)
    print("saved", flush=True)
    sys.exit(75)
while act == "stay":
    signal.pause()
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(act))
