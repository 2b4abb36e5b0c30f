import pytest

from cogds.process.environment import environment_variables, find_ninja


def test_variables_are_selected_by_prefix():
    environ = {"NCCL_B": "1", "NCCL_A": "2", "X_NCCL_": "3", "GLOO_C": "4"}
    assert environment_variables("NCCL_", "GLOO_", environ=environ) == {"GLOO_C": "4", "NCCL_A": "2", "NCCL_B": "1"}


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
