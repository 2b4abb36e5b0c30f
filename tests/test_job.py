"""launch/slurm/job.sh where SLURM does not answer: its commands are played by functions. tests/cluster has the rest."""

import subprocess

import pytest

from tests.conftest import ROOT

PLAYED = """
source launch/slurm/job.sh
SLURM_JOB_ID=7
sleep() { echo sleep; }
scancel() { echo "scancel $*"; }
"""


def played(script):
    """What the functions print, line by line."""
    done = subprocess.run(["bash", "-c", PLAYED + script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ranks_that_save_and_end_are_only_asked():
    answers = "squeue() { echo 7.batch; [[ -f $file ]] || { echo 7.0; touch $file; }; }"
    script = f"file=$(mktemp -u); {answers}; end_ranks; rm -f $file"
    assert played(script) == ["scancel --signal=USR1 7", "sleep"]


def test_ranks_that_do_not_end_are_ended():
    found = played("squeue() { echo 7.batch; echo 7.0; echo 7.1; }; end_ranks")
    assert found == ["scancel --signal=USR1 7", *["sleep"] * 120, "scancel 7.0", "scancel 7.1"]


def test_where_slurm_does_not_answer_the_step_that_is_known_is_ended():
    found = played("squeue() { return 1; }; end_ranks")
    assert found == ["scancel --signal=USR1 7", *["sleep"] * 120, "scancel 7.0"]


@pytest.mark.parametrize("squeue, may", [("return 1", "0"), ("echo 7.0", "0"), ("echo 7.batch", "1"), (":", "1")])
def test_whether_ranks_may_still_be_there(squeue, may):
    assert played(f"squeue() {{ {squeue}; }}; ranks_may_run && echo 0 || echo 1") == [may]
