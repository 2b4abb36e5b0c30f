#!/usr/bin/env python
"""One SLURM job of 2,000 steps on two nodes of this machine, with a fault about every hundred steps.

    python tests/cluster/soak.py [--steps 2000] [--every 100] [--seed N] [--only NAME] [--faults N] [--folder DIR]

Needs root and the packages of install.sh. The job is submitted once: its own script must requeue it after each fault.
It must reach its last step with losses and gradient norms that equal the reference run's bit for bit, and its memory
must not grow. Prints a table and a line of JSON; the exit code is 0 or 1.
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

WARM_UP = 500  # steps of the reference run before its memory is measured
NUM_FIRST_STEPS = 40  # steps after each start before the memory is measured
MAX_GROWTH_MB = 5.0  # per rank and 1000 steps


def draw_faults(generator: random.Random, only: str) -> Iterator[Fault]:
    """Yield faults in random order, each once before any repeats. only: the name of the only fault to yield."""
    while True:
        kinds = [fault for fault in RANDOM_FAULTS if only.replace("_", " ") in ("", fault.name)]
        generator.shuffle(kinds)
        yield from kinds


def inject_fault(run: LabRun, fault: Fault, generator: random.Random) -> dict[str, object]:
    """Inject a fault and wait until the run has trained beyond that step. Returns the row of the table."""
    start = time.monotonic()
    note = fault.inject(run, generator)
    injected = time.monotonic()
    if fault.outcomes:
        outcome = run.await_end(fault.within_s)
        ended = time.monotonic()
        assert outcome in fault.outcomes, f"{fault.name}: ended with {outcome}\n{run.tail()}"
        fault.repair(run)
        run.await_resumed()
        assert not fault.must_save or run.resumed_at == run.last_step, f"{fault.name}: {run.last_step} was not saved"
    else:
        run.last_step, ended = len(read_steps(run.output_dir)), time.monotonic()
        run.resumed_at = run.last_step
    run.await_steps(run.last_step + 1)
    return {
        "fault": fault.name,
        "injected at": run.last_step,
        "ended after [s]": f"{ended - injected:.1f}" if fault.outcomes else "",
        "resumed at": run.resumed_at,
        "recovered after [s]": f"{time.monotonic() - start:.1f}",
        "note": note if isinstance(note, str) else "",
    }


class MemoryLog:
    """Measures the memory of a run's ranks every second. samples: pid -> (step, bytes)."""

    def __init__(self, run: LabRun) -> None:
        self.samples: dict[int, list[tuple[int, int]]] = {}
        self._run, self._is_closing = run, threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)
        self._thread.start()

    def _measure(self) -> None:
        while not self._is_closing.wait(1.0):
            step = len(read_steps(self._run.output_dir))
            for pid, num_bytes in memory_of_ranks(self._run.root).items():
                self.samples.setdefault(pid, []).append((step, num_bytes))

    def median_growth_mb(self) -> float | None:
        """Return the median over all processes, without their first steps. Rough, because few of them live long."""
        growths = []
        for samples in self.samples.values():
            rewound = min(range(len(samples)), key=lambda index: samples[index])
            first = samples[rewound][0] + NUM_FIRST_STEPS
            steady = [sample for sample in samples[rewound:] if sample[0] >= first]
            if steady and steady[-1][0] > steady[0][0]:
                growths.append(growth_mb(steady))
        return round(statistics.median(growths), 2) if growths else None

    def close(self) -> None:
        """Stop measuring."""
        self._is_closing.set()
        self._thread.join()


def soak(
    lab: Lab, folder: Path, num_steps: int, every: int, seed: int, only: str = "", num_faults: int | None = None
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Run the soak test. Returns the table and the results.

    folder: keeps the inputs and the reference run.
    """
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
        target, faults = every, draw_faults(generator, only)
        while target < num_steps - every // 2 and len(table) != num_faults:
            run.await_steps(max(target, run.last_step + 1))
            table.append(inject_fault(run, next(faults), generator))
            print(list(format_table([table[-1]]))[-1], flush=True)
            target = max(target + every, run.last_step + 1) + generator.randint(-every // 4, every // 4)
        run.await_steps(num_steps)
        state = run.await_end(120)
    finally:
        memory.close()
        print("", *format_table(table), sep="\n", flush=True)
    lines = read_steps(run.output_dir)
    differing_steps = [line[0] for line, reference in zip(lines, expected) if line != reference]
    result = {
        "state": state,
        "steps": len(lines),
        "steps_that_differ": len(differing_steps),
        "faults": len(table),
        "restarts": int(lab.show(job)["Restarts"]),
        "soak_s": round(time.monotonic() - start),
        "growth_mb_per_1000_steps": [round(slope, 2) for slope in growth],
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
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="approximate number of steps between faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help=", ".join(fault.name.replace(" ", "_") for fault in RANDOM_FAULTS))
    parser.add_argument("--faults", type=int, help="number of faults")
    parser.add_argument("--folder", type=Path, help="folder that keeps the reference run for later calls")
    args = parser.parse_args()
    with Lab() as lab, tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        _, result = soak(lab, folder, args.steps, args.every, args.seed, args.only, args.faults)
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
