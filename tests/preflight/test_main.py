"""The command on one rank, in which a check fails."""

import pytest

from cogds.arguments import parse_args
from cogds.errors import BugReported, UserError
from cogds.preflight import main as module


@pytest.fixture
def run(monkeypatch):
    """`run(error)`: run the command with an invalid config and an error in the check of versions."""

    def refuse(*_):
        raise UserError("invalid config")

    def run_with(error):
        def fail():
            raise error

        monkeypatch.setattr(module, "load_preflight_job", refuse)
        monkeypatch.setattr(module, "inspect_versions", fail)
        module.main(parse_args("preflight", ["--skip", "network"], ""))

    return run_with


@pytest.mark.parametrize("error", [TypeError("planted"), AttributeError("planted"), KeyError("planted")])
def test_a_bug_in_a_check_ends_with_its_traceback(run, capsys, error):
    with pytest.raises(BugReported):
        run(error)
    output = capsys.readouterr()
    assert "in fail\n" in output.err
    assert "not ready" in output.out


@pytest.mark.parametrize("error", [OSError("stale file handle"), RuntimeError("no CUDA driver")])
def test_a_fault_of_the_machine_is_a_finding(run, capsys, error):
    with pytest.raises(UserError):
        run(error)
    output = capsys.readouterr()
    assert str(error) in output.out
    assert "Traceback" not in output.err
