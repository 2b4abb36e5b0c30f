import os
import shutil
import subprocess
import sys

import pytest

from cogds.process.environment import command, environment_variables, find_ninja, set_library_defaults
from tests.conftest import ROOT

SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def defaults(local_size, **environ):
    set_library_defaults(local_size, environ)
    return environ


def test_variables_are_selected_by_prefix():
    environ = {"NCCL_B": "1", "NCCL_A": "2", "X_NCCL_": "3", "GLOO_C": "4"}
    assert environment_variables("NCCL_", "GLOO_", environ=environ) == {"GLOO_C": "4", "NCCL_A": "2", "NCCL_B": "1"}


def test_ranks_of_a_node_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(64)))
    assert defaults(8) == {"OMP_NUM_THREADS": "8", "TORCHINDUCTOR_COMPILE_THREADS": "8", **SEGMENTS}
    assert defaults(1) == {"TORCHINDUCTOR_COMPILE_THREADS": "32", **SEGMENTS}  # torch itself uses all cores
    assert defaults(128)["OMP_NUM_THREADS"] == "1"


def test_a_task_of_slurm_has_cores_of_its_own(monkeypatch):
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_CPUS_PER_TASK": "16"}
    for visible in (16, 128):  # with and without binding
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid, visible=visible: set(range(visible)))
        environ = defaults(8, **task)
        assert (environ["OMP_NUM_THREADS"], environ["TORCHINDUCTOR_COMPILE_THREADS"]) == ("16", "16")
    assert defaults(4, **task, RANK="0")["OMP_NUM_THREADS"] == "32"  # of a launcher inside the task
    del task["SLURM_CPUS_PER_TASK"]
    assert defaults(4, **task)["OMP_NUM_THREADS"] == "32"


def test_variables_of_the_user_are_kept():
    chosen = {"OMP_NUM_THREADS": "3", "TORCHINDUCTOR_COMPILE_THREADS": "2", "PYTORCH_ALLOC_CONF": "backend:native"}
    assert defaults(2, **chosen) == chosen


def test_the_single_thread_of_torchrun_is_not_a_choice(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)))
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    assert defaults(2, **torchrun)["OMP_NUM_THREADS"] == "8"
    assert defaults(2, **torchrun | {"OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def test_wsl2_has_no_expandable_segments(monkeypatch):
    monkeypatch.setattr("platform.release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in defaults(1)


@pytest.mark.parametrize("on_path, beside, expected", [(0, 0, "a"), (0, 1, "a:b"), (1, 0, "a"), (1, 1, "a")])
def test_ninja_is_found_beside_the_interpreter(on_path, beside, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, exists in (("a", on_path), ("b", beside)):
        (tmp_path / folder).mkdir()
        if exists:
            (tmp_path / folder / "ninja").touch(mode=0o755)
    environ = {"PATH": "a"}
    find_ninja(environ, python="b/python")
    assert environ["PATH"] == expected


UTF8 = """
import os, sys
from cogds.process.environment import use_utf8
use_utf8()
print("\\U0001f600")
print(sys.flags.utf8_mode, os.environ.get("PYTHONUTF8"), sys.argv[2:] == ["", "a b"], os.path.exists("b\\u00e4r"))
sys.stdout.flush()
sys.stdout.buffer.write(os.fsencode(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "environ, printed",
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "😀\n1 1 True True\n"),
        ({"LC_ALL": "C"}, "😀\n1 None True True\n"),
        ({"LC_ALL": "C.UTF-8"}, "😀\n0 None True True\n"),
        # A terminal that cannot show a character must not end the run.
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}, "\\U0001f600\n0 None True True\n"),
    ],
)
def test_utf_8_in_any_locale_with_the_same_arguments(environ, printed, tmp_path):
    (tmp_path / "bär").touch()
    odd = bytes(range(1, 256))
    done = run_utf8(environ, [odd, "", "a b"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed.encode() + odd


@pytest.mark.parametrize("charmap, locale", [("ISO-8859-1", "en_US"), ("GBK", "zh_CN")])
def test_utf_8_in_a_locale_with_another_encoding(charmap, locale, tmp_path):
    name = f"{locale}.{charmap}"
    compiled = shutil.which("localedef") and subprocess.run(
        ["localedef", "-i", locale, "-f", charmap, tmp_path / name], capture_output=True, timeout=60
    )
    if not compiled or not (tmp_path / name / "LC_CTYPE").exists():
        pytest.skip("not available: localedef with its sources (the package `locales`)")
    (tmp_path / "bär").touch()
    odd = "größe 文😀".encode() + bytes(range(1, 256))
    done = run_utf8({"LC_ALL": name, "LOCPATH": str(tmp_path)}, [odd, "", "a b"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "😀\n1 1 True True\n".encode() + odd


def test_an_interpreter_that_cannot_use_utf_8_is_refused(tmp_path):
    done = run_utf8({"LC_ALL": "C"}, [], tmp_path, "-X", "utf8=0")
    assert b"UserError: locale: Python uses ascii" in done.stderr


def run_utf8(environ, arguments, cwd, *options):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [sys.executable, *options, "-c", UTF8.encode(), *arguments]
    environ = {**kept, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, timeout=60)


def test_printed_commands_work_in_the_users_shell(tmp_path, monkeypatch):
    """Whether the environment is on PATH, only in a folder, or has no script; and another environment is on PATH."""
    monkeypatch.chdir(tmp_path)
    python, other = tmp_path / "my env/bin/python", tmp_path / "other"
    for folder in (python.parent, other):
        folder.mkdir(parents=True)
        (folder / "tool").touch(0o755)
    printed = {}
    for path in (python.parent, other, tmp_path):
        monkeypatch.setenv("PATH", str(path))
        printed[path] = command("tool", "tool.main", str(python))
    assert printed == {python.parent: "tool", other: "'my env/bin/tool'", tmp_path: "'my env/bin/tool'"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command("missing", "tool.main", "/usr/bin/python") == "/usr/bin/python -m tool.main"
