"""launch/slurm/job.sh when SLURM does not answer. Shell functions replace its commands; tests/cluster has the rest."""

import subprocess

import pytest

from tests.conftest import ROOT

FAKE_SLURM = """
source launch/slurm/job.sh
SLURM_JOB_ID=7
sleep() { echo sleep; }
scancel() { echo "scancel $*"; }
"""


def run_with_fake_slurm(script):
    """Run a script and return the lines that the fake commands print."""
    done = subprocess.run(["bash", "-c", FAKE_SLURM + script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ranks_that_end_after_the_signal_are_not_cancelled():
    answers = "squeue() { echo 7.batch; [[ -f $file ]] || { echo 7.0; touch $file; }; }"
    script = f"file=$(mktemp -u); {answers}; end_ranks; rm -f $file"
    assert run_with_fake_slurm(script) == ["scancel --signal=USR1 7", "sleep"]


def test_ranks_that_do_not_end_are_cancelled():
    lines = run_with_fake_slurm("squeue() { echo 7.batch; echo 7.0; echo 7.1; }; end_ranks")
    assert lines == ["scancel --signal=USR1 7", *["sleep"] * 120, "scancel 7.0", "scancel 7.1"]


def test_if_slurm_does_not_answer_the_first_step_is_cancelled():
    lines = run_with_fake_slurm("squeue() { return 1; }; end_ranks")
    assert lines == ["scancel --signal=USR1 7", *["sleep"] * 120, "scancel 7.0"]


@pytest.mark.parametrize("squeue, code", [("return 1", "0"), ("echo 7.0", "0"), ("echo 7.batch", "1"), (":", "1")])
def test_ranks_may_run_unless_slurm_lists_no_step(squeue, code):
    assert run_with_fake_slurm(f"squeue() {{ {squeue}; }}; may_ranks_run && echo 0 || echo 1") == [code]
