#!/usr/bin/env python
"""One SLURM job of 2,000 steps on two nodes of this machine, struck by something every hundred, and left to its own.

    python tests/cluster/soak.py [--steps 2000] [--every 100] [--seed N] [--only NAME] [--faults N] [--folder DIR]

As root, with the packages of install.sh. Nobody gives the command again: what ends the job, its own script mends. It
must come to its last step with every loss and gradient norm as in a run that was never disturbed, bit for bit, and its
memory must not grow. Prints a table and a line of JSON; the code is 0 or 1.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.cluster.faults import (
    RANDOM_FAULTS,
    Fault,
    LabRun,
    create_inputs,
    format_table,
    growth_mb,
    memory_of_ranks,
    read_steps,
    reference_steps,
)
from tests.cluster.lab import Lab

WARM_UP = 500  # steps of the undisturbed run before its memory is looked at
FIRST_STEPS = 40  # of a start
MAX_GROWTH_MB = 5.0  # of a rank, per 1000 steps


def chosen(generator: random.Random, only: str) -> Iterator[Fault]:
    """Faults, drawn at random: each once before any comes again; or one, by its name."""
    while True:
        kinds = [fault for fault in RANDOM_FAULTS if only.replace("_", " ") in ("", fault.name)]
        generator.shuffle(kinds)
        yield from kinds


def strike(run: LabRun, fault: Fault, generator: random.Random) -> dict[str, object]:
    """Let a fault strike the run, and wait until it has trained past that step again: the row of the table."""
    start = time.monotonic()
    said = fault.inject(run, generator)
    struck = time.monotonic()
    if fault.outcomes:
        how = run.await_end(fault.within_s)
        ended = time.monotonic()
        assert how in fault.outcomes, f"{fault.name}: ended with {how}\n{run.tail()}"
        fault.restore(run)
        run.await_resumed()
        assert not fault.must_save or run.resumed_at == run.last_step, f"{fault.name}: {run.last_step} was not saved"
    else:
        run.last_step, ended = len(read_steps(run.output_dir)), time.monotonic()
        run.resumed_at = run.last_step
    run.await_steps(run.last_step + 1)
    return {
        "fault": fault.name,
        "struck at": run.last_step,
        "ended after s": f"{ended - struck:.1f}" if fault.outcomes else "",
        "resumed at": run.resumed_at,
        "past it after s": f"{time.monotonic() - start:.1f}",
        "note": said if isinstance(said, str) else "",
    }


class MemoryLog:
    """What the ranks of a run take, looked at every second: `samples` by process."""

    def __init__(self, run: LabRun) -> None:
        self.samples: dict[int, list[tuple[int, int]]] = {}
        self._run, self._closing = run, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._closing.wait(1.0):
            step = len(read_steps(self._run.output_dir))
            for pid, num_bytes in memory_of_ranks(self._run.root).items():
                self.samples.setdefault(pid, []).append((step, num_bytes))

    def median_growth_mb(self) -> float | None:
        """Of all processes, without their start and first steps: rough, as few of them live for long."""
        growths = []
        for samples in self.samples.values():
            rewound = min(range(len(samples)), key=lambda place: samples[place])
            first = samples[rewound][0] + FIRST_STEPS
            steady = [sample for sample in samples[rewound:] if sample[0] >= first]
            if steady and steady[-1][0] > steady[0][0]:
                growths.append(growth_mb(steady))
        return round(statistics.median(growths), 2) if growths else None

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()
        self._thread.join()


def soak(
    lab: Lab, folder: Path, num_steps: int, every: int, seed: int, only: str = "", num_faults: int | None = None
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The table, and what came out: `ok`, and the figures. folder: where the materials and the reference are kept."""
    words, generator = create_inputs(folder), random.Random(seed)
    expected = reference_steps(lab, folder, words, num_steps)
    growth = [
        growth_mb([sample for sample in samples if sample[0] >= min(WARM_UP, num_steps // 4)])
        for samples in json.loads((folder / "reference/memory.json").read_text())
    ]
    run = LabRun(lab, folder / f"soak-{seed}", [*words, "checkpoint.every=25", f"train.num_steps={num_steps}"])
    table: list[dict[str, object]] = []
    start = time.monotonic()
    run.start("sbatch")
    job, memory = run.job, MemoryLog(run)
    try:
        if num_faults is not None:
            every = min(every, num_steps // (num_faults + 1))
        target, faults = every, chosen(generator, only)
        while target < num_steps - every // 2 and len(table) != num_faults:
            run.await_steps(max(target, run.last_step + 1))
            table.append(strike(run, next(faults), generator))
            print(list(format_table([table[-1]]))[-1], flush=True)
            target = max(target + every, run.last_step + 1) + generator.randint(-every // 4, every // 4)
        run.await_steps(num_steps)
        state = run.await_end(120)
    finally:
        memory.close()
        print("", *format_table(table), sep="\n", flush=True)
    lines = read_steps(run.output_dir)
    wrong = [ours[0] for ours, theirs in zip(lines, expected) if ours != theirs]
    result = {
        "state": state,
        "steps": len(lines),
        "steps_that_differ": len(wrong),
        "faults": len(table),
        "restarts": int(lab.show(job)["Restarts"]),
        "soak_s": round(time.monotonic() - start),
        "growth_mb_per_1000_steps": [round(one, 2) for one in growth],
        "median_growth_within_restarts": memory.median_growth_mb(),
        "left_behind": [str(path) for path in run.partial()] + run.shared_memory(),
    }
    result["ok"] = (
        state == "COMPLETED"
        and lines == expected
        and max(growth) < MAX_GROWTH_MB
        and not result["left_behind"]
        and not run.processes()
    )
    return table, result


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps between two faults, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=", ".join(fault.name.replace(" ", "_") for fault in RANDOM_FAULTS))
    parser.add_argument("--faults", type=int, help="so many")
    parser.add_argument("--folder", type=Path, help="keeps the undisturbed run for the next time")
    args = parser.parse_args()
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="soak-") as own:
        folder = args.folder or Path(own)
        folder.mkdir(exist_ok=True)
        _, result = soak(lab, folder, args.steps, args.every, args.seed, args.only, args.faults)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
