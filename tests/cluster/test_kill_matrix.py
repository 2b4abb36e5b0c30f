"""One run goes through everything that can happen to it, and in the end is the run that nothing happened to."""

import itertools
import random
import time

import pytest

from tests.cluster.faults import FAULTS, LabRun, create_inputs, format_table, read_steps, reference_steps

pytestmark = pytest.mark.endurance
NUM_STEPS = 2000
EVERY = 10
MORE = (f"checkpoint.every={EVERY}", "checkpoint.keep_last=2", f"train.num_steps={NUM_STEPS}")


def struck(run, fault, generator):
    """Let a fault strike the run, and see it end: the row of the table."""
    run.await_steps(max(run.last_step, EVERY) + generator.randint(3, EVERY))
    row = {"fault": fault.name, "launcher": fault.launcher}
    said = fault.inject(run, generator)
    start = time.monotonic()
    if not fault.outcomes:
        run.last_step = len(read_steps(run.output_dir))
        return row | {"ended after s": "", "code": "", "restarted by": "", "struck at": run.last_step, "resumed at": ""}
    how = run.await_end(fault.within_s)
    elapsed_s = time.monotonic() - start
    assert how in fault.outcomes, f"{fault.name}: ended with {how}\n{run.tail()}"
    assert run.shared_memory() == []
    sound = [step for step in run.checkpoints() if f"step {step} is cut" not in str(said)]
    if fault.must_save:
        assert sound[-1] == run.last_step
    fault.restore(run)
    return row | {
        "ended after s": f"{elapsed_s:.1f}",
        "code": how,
        "restarted by": "SLURM" if how == "PENDING" else "the user",
        "struck at": run.last_step,
        "resumed at": sound[-1],
        "note": said if isinstance(said, str) else "",
    }


def test_whatever_ends_a_run_it_goes_on_as_if_nothing_had_been(lab, tmp_path_factory, capsys):
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
            row = struck(run, fault, generator)
            table.append(row)
            if row["restarted by"] == "the user":
                # The last command lets it end soon.
                run.start((after or fault).launcher, *([] if after else [f"train.num_steps={run.last_step + 10}"]))
            if fault.outcomes:
                assert run.await_resumed() == row["resumed at"]
            # Past where it was struck: all the steps in between have been trained again.
            run.await_steps(run.last_step + 3)
            so_far = read_steps(run.output_dir)
            row["losses equal"] = so_far == expected[: len(so_far)]
            assert row["losses equal"], f"{fault.name}: {so_far[-1]} at {len(so_far)}"
        assert run.await_end(120) in ("COMPLETED", "0")
    finally:
        with capsys.disabled():
            print("", *format_table(table), sep="\n")
    assert read_steps(run.output_dir) == expected[: run.last_step]
    assert run.partial() == []
