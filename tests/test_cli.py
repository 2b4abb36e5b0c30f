"""Running a verb: exit codes, which rank reports an error, and the launcher that starts ranks."""

import gc
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from cogds import cli
from cogds.arguments import VERBS, parse_args
from cogds.errors import EXIT_BUG, EXIT_HUNG, EXIT_USER_ERROR, BugReported, UserError
from tests.conftest import ROOT


def test_imported_objects_are_excluded_from_garbage_collection():
    try:
        with cli.gc_disabled():
            assert not gc.isenabled()
            kept = [[]]
        assert gc.isenabled()
        assert not any(item is kept for item in gc.get_objects())
        with pytest.raises(ModuleNotFoundError), cli.gc_disabled():
            import cogds.nothing  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.fixture
def no_launcher(monkeypatch):
    """A process that no launcher has started."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "num_gpus, flags, num_ranks", [(0, [], 1), (1, [], 1), (8, [], 8), (8, ["--num-gpus", "2"], 2)]
)
def test_one_rank_is_started_per_gpu_or_as_many_as_num_gpus_says(num_gpus, flags, num_ranks, no_launcher):
    no_launcher.setattr("torch.cuda.device_count", lambda: num_gpus)
    argv = ["--config", "a.yaml", *flags, "train.num_steps=3"]
    command = cli.launcher_command(parse_args("train", argv), argv)
    if num_ranks == 1:
        assert command == []
        return
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == str(num_ranks)
    # The ranks get all arguments except the launcher's.
    assert command[-6:] == ["--module", "cogds", "train", "--config", "a.yaml", "train.num_steps=3"]


@pytest.mark.usefixtures("no_launcher")
def test_the_hostfile_is_passed_to_the_launcher():
    argv = ["--hostfile=hosts", "--master_port", "4000", "lora.rank=4"]
    command = cli.launcher_command(parse_args("encode", argv), argv)
    assert command[3:7] == ["--hostfile", "hosts", "--master_port", "4000"]
    assert command[-4:] == ["--module", "cogds", "encode", "lora.rank=4"]


def test_ranks_are_not_started_twice(no_launcher):
    for environ in ({"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}):
        for name, value in environ.items():
            no_launcher.setenv(name, value)
        assert cli.launcher_command(parse_args("train", []), []) == []
        with pytest.raises(UserError, match="--num-gpus"):
            cli.launcher_command(parse_args("train", ["--num-gpus", "2"]), ["--num-gpus", "2"])
        for name in environ:
            no_launcher.delenv(name)


@pytest.mark.parametrize(
    "environ, printed",
    [
        ({}, "error: the clip is damaged\n"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "error: the clip is damaged\n"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ""),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "error on rank 2 (node2): the clip is damaged\n"),
        ({"RANK": "7", "WORLD_SIZE": "4"}, "error: the clip is damaged\n"),
    ],
)
def test_a_user_error_is_printed_once_per_node_with_code_2(environ, printed, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node2")

    def main() -> None:
        raise UserError("the clip is damaged")

    assert cli.run(main) == 2
    assert capsys.readouterr().err == printed


def test_a_bug_that_is_already_reported_is_code_1_without_output(capsys):
    def main() -> None:
        raise BugReported("rank 3 failed: TypeError: planted")

    assert cli.run(main) == EXIT_BUG == 1
    assert capsys.readouterr() == ("", "")


def test_a_shared_error_is_printed_by_rank_0_only_and_a_ranks_own_error_always(monkeypatch, capsys):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cogds.distributed.process_group.is_connected", lambda: True)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node1")

    def fail(shared):
        raise UserError("the cache is damaged", shared=shared)

    assert cli.run(lambda: fail(shared=False)) == 2
    assert capsys.readouterr().err == "error on rank 3 (node1): the cache is damaged\n"
    assert cli.run(lambda: fail(shared=True)) == 2
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_success_is_0():
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug)
    assert cli.run(lambda: None) == 0


def test_a_port_in_use_is_named(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert cli.run(lambda: dist.TCPStore("127.0.0.1", port, 2, is_master=True)) == EXIT_HUNG
    text = capsys.readouterr().err
    assert str(port) in text
    assert "--master_port" in text


def test_a_lost_connection_has_its_own_exit_code(capsys):
    def main() -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    assert cli.run(main) == EXIT_HUNG
    assert "Connection reset by peer" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"demo"}))  # the demo is in the module of train
def test_a_module_of_a_verb_is_not_a_command(verb):
    """Compares the last lines, because running each module takes seconds of imports."""
    module = VERBS[verb].module
    *_, guard, call = (ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines()
    assert guard == 'if __name__ == "__main__":'
    assert call.strip() == f'refuse_to_run("{module}", "{verb}")'


@pytest.mark.slow
@pytest.mark.parametrize("module", ["cogds.export", "cogds.encode", "cogds.preflight", "cogds.report", "cogds.train"])
def test_running_a_module_fails_with_a_message(module):
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.splitlines()[-1].startswith(f"error: python -m {module}: ")
