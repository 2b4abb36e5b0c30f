import pytest

from cogds.process.environment import environment_variables, find_ninja, set_library_defaults

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
