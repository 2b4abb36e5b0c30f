"""Full fine-tuning runs of 2 ranks that are killed while they write checkpoints, and resumed each time.

    python tests/dist/kills.py --folder DIR [--kills 20] [--configs zero2 zero3]

For each DeepSpeed config, the tiny model is trained once without a fault, and once more with kills: SIGKILL hits rank
0, rank 1 or both, at a random moment of a save, by turns while the state is written and while the model is. After each
kill, the newest checkpoint must be complete, with the model that belongs to it. The losses of all steps and the final
state must be those of the uninterrupted run, bit for bit. With ZeRO-2, training waits while the state is saved; with
ZeRO-3, it is saved in the background.

Prints a line per kill and a line of JSON. The exit code is 1 if something differs.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

NUM_RANKS, CONFIGS, TIMEOUT_S = 2, ("zero2", "zero3"), 240
WAITING = ("zero2",)  # configs with which training waits while the state is saved
VICTIMS = {"rank 0": [0], "rank 1": [1], "both ranks": [0, 1]}


def work(folder, deepspeed, words):
    """Train in a rank."""
    from cogds.distributed.process_group import connect, disconnect
    from cogds.distributed.world import read_world
    from cogds.process.signals import StopRequest
    from cogds.train import full_saving
    from cogds.train.trainer import Trainer
    from tests.jobs import make_job

    world = read_world()
    if deepspeed in WAITING:
        full_saving.available_memory_bytes = lambda: 0
    pid_file(folder, world.rank).write_text(str(os.getpid()))
    connect(world, 120)
    Trainer(make_job(*words, config=ROOT / "tests/tiny.yaml", deepspeed=deepspeed, world=world), StopRequest()).run()
    disconnect()


def pid_file(folder, rank):
    return folder / f"rank-{rank}.pid"


def unfinished(run):
    """Return the temporary folders of saves, with the times of their last changes."""
    folders = {}
    for path in run.glob("checkpoints/step-*[0-9].tmp"):  # not step-N.old.tmp, an old one that is being removed
        with contextlib.suppress(FileNotFoundError):
            folders[path.name, path.stat().st_ctime_ns] = path
    return folders


def phase(run, name):
    """Return what a save is doing, by its files in the temporary folders."""
    models, checkpoint = list(run.glob(f"model*/{name}")), run / "checkpoints" / name
    if (checkpoint / "state.json").exists() or not models:
        return "commit"
    if any(file for model in models for file in model.glob("transformer/*")):
        return "model"
    return "state"


@dataclass
class Kill:
    """A kill. number: of the save since the start of the ranks, from 1. moment: time after a phase has begun [s]."""

    victim: str
    number: int
    after: str
    moment: float
    saving: str = ""  # the save's temporary folder
    phase: str = ""


class Killer(threading.Thread):
    """Kills ranks at a moment of a save. If the save is finished by then, at half that moment of the next one."""

    def __init__(self, run, kill):
        super().__init__(daemon=True)
        self.run_folder, self.kill = run, kill
        self.old, self.is_ended = set(unfinished(run)), threading.Event()
        for rank in range(NUM_RANKS):
            pid_file(run.parent, rank).unlink(missing_ok=True)

    def run(self):
        saves, number, moment = [], self.kill.number, self.kill.moment
        while not self.is_ended.wait(0.001):
            saves += [name for name, _ in unfinished(self.run_folder).keys() - self.old if name not in saves]
            if len(saves) < number or (self.kill.after == "model" and phase(self.run_folder, saves[-1]) == "state"):
                continue
            time.sleep(moment)
            pids = [int(pid_file(self.run_folder.parent, rank).read_text()) for rank in VICTIMS[self.kill.victim]]
            send(signal.SIGSTOP, pids)
            if any(name == saves[-1] for name, _ in unfinished(self.run_folder).keys() - self.old):
                self.kill.saving, self.kill.phase = saves[-1], phase(self.run_folder, saves[-1])
                send(signal.SIGKILL, pids)
                return
            send(signal.SIGCONT, pids)
            number, moment = len(saves) + 1, moment / 2


def send(number, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def overrides(folder, output, num_steps):
    return [
        f"model.path={folder / 'model'}", f"data.path={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}",
        "data.buckets=[9x64x64, 1x64x64]", "data.num_workers=0", f"output_dir={folder / output}",
        "train.method=full", "full.ema_decay=0.5", "optimizer.lr=1e-3", "optimizer.warmup_steps=2",
        f"train.num_steps={num_steps}", "checkpoint.every=1", "checkpoint.keep_last=2", "metrics.progress_bar=false",
        "eval.every=null",
    ]  # fmt: skip


def launch(server, folder, deepspeed, output, num_steps):
    """Run the ranks. Returns their exit codes and their messages."""
    from tests.conftest import free_port

    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    job = [deepspeed, overrides(folder, output, num_steps)]
    arguments = ["--folder", folder, "--job", json.dumps(job)]
    return server.run(__file__, arguments, NUM_RANKS, TIMEOUT_S, free_port(), ROOT, log), log.read_text()


def newest(run):
    """Return the step and the whole state of the newest checkpoint, after comparing the model with it; 0 if none."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    from cogds.engine import checkpoint as checkpoints
    from cogds.engine.shards import ShardReader

    found = checkpoints.find(run / "checkpoints", "auto")
    if found is None:
        return 0, {}
    assert found.path == checkpoints.complete_checkpoints(run / "checkpoints")[-1], "the newest checkpoint is damaged"
    header = found.header
    with ShardReader(found.path, header["num_shards"]) as reader:
        state = {
            f"{kind}/{name}": reader.read(kind, name, 0, math.prod(shape)).view(shape)
            for name, shape in header["shapes"].items()
            for kind in header["kinds"]
        }
    for folder, kind in (("model", "weight"), ("model_ema", "ema")):
        model = CogVideoXTransformer3DModel.from_pretrained(run / folder / found.path.name, subfolder="transformer")
        different = [n for n, weight in model.state_dict().items() if not torch.equal(weight, state[f"{kind}/{n}"])]
        assert not different, f"{folder}/{found.path.name} is not the model of the checkpoint: {different}"
    return header["step"], state


def losses(run):
    from cogds.metrics.jsonl import step_lines

    return [line["train/loss"] for line in step_lines((run / "metrics.jsonl").read_text())]


def save_duration_s(run):
    """Return the median duration of a save."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    durations = sorted(line["checkpoint/write_s"] for line in lines if "checkpoint/write_s" in line)
    return durations[len(durations) // 2]


def run_with_kills(server, folder, deepspeed, num_kills, seed=0):
    """Train with and without kills. Returns the kills, the step of the newest checkpoint after each, and errors."""
    import torch

    num_steps = 2 * num_kills + 4  # a kill hits the first or second save after a start, or rarely a later one
    whole, killed = folder / f"{deepspeed}-whole", folder / f"{deepspeed}-killed"
    codes, output = launch(server, folder, deepspeed, whole.name, num_steps)
    if any(code != 0 for code in codes):
        raise RuntimeError(f"the uninterrupted run ended with {codes}:\n{output[-6000:]}")
    duration_s, numbers = save_duration_s(whole), random.Random(f"{deepspeed} {seed}")
    kills, steps, errors = [], [0], []
    for number in range(num_kills):
        moment = numbers.uniform(0, duration_s / 2)
        kill = Kill(numbers.choice(list(VICTIMS)), numbers.choice((1, 2)), ("state", "model")[number % 2], moment)
        killer = Killer(killed, kill)
        killer.start()
        codes, output = launch(server, folder, deepspeed, killed.name, num_steps)
        killer.is_ended.set()
        killer.join()
        expected = [-signal.SIGKILL if rank in VICTIMS[kill.victim] else codes[rank] for rank in range(NUM_RANKS)]
        if not kill.saving or codes != expected:
            raise RuntimeError(f"kill {number + 1}, {kill}: the ranks ended with {codes}:\n{output[-6000:]}")
        step, _ = newest(killed)
        saving = int(kill.saving.removesuffix(".tmp").rpartition("-")[2])
        if step < steps[-1] or step < saving - 1:
            errors.append(f"kill {number + 1}: after a kill in {kill.saving}, the newest checkpoint is of step {step}")
        kills.append(kill)
        steps.append(step)
        where = f"{kill.victim}, in {kill.saving} ({kill.phase})"
        print(f"{deepspeed}, kill {number + 1}: {where}; newest checkpoint: {step}", flush=True)
    codes, output = launch(server, folder, deepspeed, killed.name, num_steps)
    if any(code != 0 for code in codes):
        raise RuntimeError(f"the last start ended with {codes}:\n{output[-6000:]}")
    if losses(killed) != losses(whole) or len(losses(whole)) != num_steps:
        errors.append(f"{deepspeed}: losses {losses(killed)} instead of {losses(whole)}")
    (_, state), (_, expected_state) = newest(killed), newest(whole)
    if state.keys() != expected_state.keys() or any(not torch.equal(state[key], expected_state[key]) for key in state):
        errors.append(f"{deepspeed}: the final state differs")
    if left := [str(path) for path in killed.glob("*/*.tmp")]:
        errors.append(f"{deepspeed}: left {left}")
    return kills, steps[1:], errors


def create_inputs(folder):
    from tests.drawn import draw_clips
    from tests.tiny import create_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    create_tiny_model(folder / "model")
    draw_clips(folder / "clips")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="empty folder for all files")
    parser.add_argument("--kills", type=int, default=20, help="number of kills per config")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(args.folder, *args.job)
        return
    from tests.warm import Server

    folder, server = args.folder.resolve(), Server()
    create_inputs(folder)
    results = {config: run_with_kills(server, folder, config, args.kills) for config in args.configs}
    server.close()
    kills = [kill for kills, _, _ in results.values() for kill in kills]
    counts = {key: Counter(getattr(kill, key) for kill in kills) for key in ("victim", "phase")}
    errors = [error for _, _, errors in results.values() for error in errors]
    print(json.dumps({"kills": len(kills), **counts, "wrong": errors}))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    main()
