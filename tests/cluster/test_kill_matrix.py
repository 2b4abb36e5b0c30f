"""A run with every fault in turn must equal the reference run."""

import itertools
import random
import time

import pytest

from tests.cluster.faults import FAULTS, NUM_STEPS, LabRun, create_inputs, format_table, read_steps, reference_steps

pytestmark = pytest.mark.cluster
EVERY = 10
MORE = (f"checkpoint.every={EVERY}", "checkpoint.keep_last=2", f"train.num_steps={NUM_STEPS}")


def inject_fault(run, fault, generator):
    """Inject a fault and wait for the end of the run. Returns the row of the table."""
    run.await_steps(max(run.last_step, EVERY) + generator.randint(3, EVERY))
    row = {"fault": fault.name, "launcher": fault.launcher}
    note = fault.inject(run, generator)
    start = time.monotonic()
    if not fault.outcomes:
        run.last_step = len(read_steps(run.output_dir))
        unknown = dict.fromkeys(("ended after [s]", "code", "restarted by", "resumed at"), "")
        return row | unknown | {"injected at": run.last_step}
    outcome = run.await_end(fault.within_s)
    elapsed_s = time.monotonic() - start
    assert outcome in fault.outcomes, f"{fault.name}: ended with {outcome}\n{run.tail()}"
    assert run.shared_memory() == []
    checkpoints = [step for step in run.checkpoints() if f"step {step} is truncated" not in str(note)]
    if fault.must_save:
        assert checkpoints[-1] == run.last_step
    fault.repair(run)
    return row | {
        "ended after [s]": f"{elapsed_s:.1f}",
        "code": outcome,
        "restarted by": "SLURM" if outcome == "PENDING" else "the user",
        "injected at": run.last_step,
        "resumed at": checkpoints[-1],
        "note": note if isinstance(note, str) else "",
    }


def test_a_run_equals_the_reference_after_every_fault(lab, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "endurance"
    folder.mkdir(exist_ok=True)
    words, generator = create_inputs(folder), random.Random(0)
    expected = reference_steps(lab, folder, words, NUM_STEPS)
    assert len(expected) == NUM_STEPS
    run = LabRun(lab, folder / "matrix", [*words, *MORE])
    table = []
    try:
        run.start(FAULTS[0].launcher)
        for fault, after in itertools.pairwise((*FAULTS, None)):
            row = inject_fault(run, fault, generator)
            table.append(row)
            if row["restarted by"] == "the user":
                # The last start ends after a few steps.
                run.start((after or fault).launcher, *([] if after else [f"train.num_steps={run.last_step + 10}"]))
            if fault.outcomes:
                assert run.await_resumed() == row["resumed at"]
            # Beyond the step of the fault: all steps in between have been repeated.
            run.await_steps(run.last_step + 3)
            steps = read_steps(run.output_dir)
            row["losses equal"] = steps == expected[: len(steps)]
            assert row["losses equal"], f"{fault.name}: {steps[-1]} at {len(steps)}"
        assert run.await_end(120) in ("COMPLETED", "0")
    finally:
        with capsys.disabled():
            print("", *format_table(table), sep="\n")
    assert read_steps(run.output_dir) == expected[: run.last_step]
    assert run.partial() == []
