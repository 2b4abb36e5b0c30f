"""Running a verb: exit codes, which rank reports an error, and the launcher that starts ranks."""

import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from cogds import cli
from cogds.arguments import VERBS, parse_args, unpack
from cogds.distributed.hostfile import Host
from cogds.errors import EXIT_BUG, EXIT_HUNG, EXIT_USER_ERROR, BugReported, UserError
from tests.conftest import ROOT
from tests.drawn import draw_clips


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


@pytest.fixture
def slurm_shell(no_launcher):
    """A process in the shell of `srun --pty` with 8 tasks."""
    with subprocess.Popen(["sh"], stdin=subprocess.PIPE) as shell:
        while not Path(f"/proc/{shell.pid}/cmdline").read_bytes():  # its program is being loaded
            time.sleep(0.01)
        variables = {"PROCID": "0", "STEP_NUM_TASKS": "8", "PTY_PORT": "4000", "TASK_PID": str(shell.pid)}
        for name, value in variables.items():
            no_launcher.setenv(f"SLURM_{name}", value)
        yield
        shell.stdin.close()


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


def test_the_hostfile_is_checked_and_passed_to_the_launcher(no_launcher, tmp_path):
    (tmp_path / "hosts").write_bytes("\ufeffme@n1 slots=2\r\nn2 slots=1 # old\r\n".encode())
    checked = []
    no_launcher.setattr(cli, "check_nodes", checked.append)
    words = ["lora.rank=4", "data.default_caption=a b; $(touch pwned) ä"]
    argv = [f"--hostfile={tmp_path / 'hosts'}", "--master_port", "4000", "--num-gpus=1", *words]
    command = cli.launcher_command(parse_args("encode", argv), argv)
    assert checked == [[Host("me@n1", 2), Host("n2", 1)]]
    flags = {flag: value for flag, value in itertools.pairwise(command) if flag.startswith("--")}
    assert Path(flags["--hostfile"]).read_text() == "me@n1 slots=2\nn2 slots=1\n"
    assert (flags["--master_addr"], flags["--master_port"], flags["--num_gpus"]) == ("n1", "4000", "1")
    assert {"--force_multi", "--no_ssh_check"} <= flags.keys()
    assert command[-4:-1] == ["--module", "cogds", "encode"]
    assert unpack(command[-1:]) == words


@pytest.mark.usefixtures("no_launcher")
def test_a_bad_hostfile_is_refused_before_anything_is_started(tmp_path):
    (tmp_path / "hosts").write_text("n1 lots=8\n")
    argv = ["--hostfile", str(tmp_path / "hosts")]
    with pytest.raises(UserError, match="hosts:1: "):
        cli.launcher_command(parse_args("train", argv), argv)


def test_ranks_are_not_started_twice(no_launcher):
    for environ in ({"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}):
        for name, value in environ.items():
            no_launcher.setenv(name, value)
        assert cli.launcher_command(parse_args("train", []), []) == []
        with pytest.raises(UserError, match="--num-gpus"):
            cli.launcher_command(parse_args("train", ["--num-gpus", "2"]), ["--num-gpus", "2"])
        for name in environ:
            no_launcher.delenv(name)


@pytest.mark.usefixtures("slurm_shell")
def test_the_shell_of_several_slurm_tasks_is_refused_unless_ranks_are_started(capsys):
    assert cli.run(lambda: cli.call("train", [])) == EXIT_USER_ERROR
    assert cli.run(lambda: cli.call("train", ["--num-gpus=2"], starts_ranks=False)) == EXIT_USER_ERROR
    assert capsys.readouterr().err.count("error: SLURM_STEP_NUM_TASKS: ") == 2
    argv = ["--num-gpus=2"]
    assert cli.launcher_command(parse_args("train", argv), argv)


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


@pytest.mark.parametrize("verb", sorted(VERBS))
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


IN_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": ""}


def run_in(environ, *command, **options):
    """Run an interpreter in another locale. Returns the finished process, with bytes."""
    environ = {name: value for name, value in {**os.environ, **environ}.items() if value}
    return subprocess.run([sys.executable, *command], env=environ, capture_output=True, timeout=60, **options)


def test_a_verb_uses_utf_8_in_any_locale(tmp_path):
    config = tmp_path / "bär 😀.yaml"
    config.write_text("{model: {path: m}, data: {path: d}, train: {precision: grün 😀}}\n", encoding="utf-8")
    done = run_in(IN_ASCII, "-u", "-m", "cogds", "train", "--config", str(config).encode())
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.decode().startswith("error: train.precision: ")
    assert f"but is grün 😀 in {config}" in done.stderr.decode()


@pytest.mark.slow
def test_clips_with_names_that_the_locale_does_not_know_are_found(tmp_path, tiny_model):
    folder = tmp_path / "größe 😀"
    draw_clips(folder)
    captions = {path.name: path.with_suffix(".txt").read_text() for path in folder.glob("*.mp4")}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for name, caption in captions.items():
            (folder / name).rename(folder / f"文 {name}")
            file.write(json.dumps({"file_name": f"文 {name}", "text": f"{caption} 😀"}, ensure_ascii=False) + "\n")
    for path in [*folder.glob("*.txt"), *folder.glob("*.png")]:
        path.unlink()
    words = [f"model.path={tiny_model}", f"data.path={folder}", f"data.cache_dir={tmp_path / 'cäche'}"]
    words += ["data.buckets=[17x64x96, 9x96x64, 1x64x64]", f"output_dir={tmp_path / 'aus'}"]
    words = [word.encode() for word in ["--config", "cogvideox1.5_i2v_lora", *words]]
    done = run_in(IN_ASCII, str(ROOT / "launch/report.py"), *words)
    assert done.returncode == 0, done.stderr.decode()
    assert "of 6 clips" in done.stdout.decode()


@pytest.mark.parametrize(
    "verb, words, expected",
    [
        ("train", [], ["demo"]),
        ("preflight", [], ["demo"]),
        ("demo", ["train.num_steps=3"], ["demo"]),
        ("train", ["--config", "run.yaml", "data.path=d"], ["run.yaml"]),
        ("train", ["model.path=m", "data.path=d"], []),
        ("encode", ["--stats", "data.cache_dir=c"], ["demo"]),
        ("prepare", ["--output=clips.parquet", "data.path=d"], ["demo"]),
    ],
)
def test_the_demo_runs_only_when_it_is_asked_for(verb, words, expected):
    assert cli.choose_configs(parse_args(verb, words)) == expected


@pytest.mark.parametrize(
    "verb, overrides, start",
    [
        ("train", ["data.path=d"], "command line: neither --config nor model.path "),
        ("report", [], "command line: neither --config nor model.path "),
        ("report", ["train.num_steps=3"], "command line: neither --config nor model.path "),
        ("demo", ["data.path=d"], "data.path: the demo has its own config, model and clips. "),
        ("demo", ["model.path=m"], "model.path: the demo has its own config, model and clips. "),
        ("demo", ["--config", "run.yaml"], "--config: the demo has its own config, model and clips. "),
    ],
)
def test_clips_without_a_model_are_refused(verb, overrides, start):
    with pytest.raises(UserError) as error:
        cli.call(verb, overrides, starts_ranks=False)
    assert str(error.value).startswith(start)


@pytest.mark.parametrize(
    "verb, words, start",
    [
        ("init", ["gone"], "CLIPS: no such file or folder: gone. "),
        (
            "sample",
            ["--model", "m", "--prompt", "p", "--image", "gone.png"],
            "--image: no such file or folder: gone.png. ",
        ),
        ("sample", ["--model", "m", "--list", "gone.jsonl"], "--list: no such file or folder: gone.jsonl. "),
    ],
)
def test_missing_inputs_are_found_before_anything_slow(verb, words, start, monkeypatch):
    monkeypatch.setattr(cli, "install_log_filters", lambda: pytest.fail("libraries would be loaded"))
    with pytest.raises(UserError) as error:
        cli.call(verb, words, starts_ranks=False)
    assert str(error.value).startswith(start)
