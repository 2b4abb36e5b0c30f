"""The command line that all entry points share."""

import base64
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cogds import cli, config
from cogds.errors import EXIT_HUNG, UserError
from tests.conftest import ROOT


def test_flags_may_stand_anywhere_between_overrides():
    args = cli.parse_args(
        [
            "--local_rank=1",
            "a=1",
            "--config",
            "r.yaml",
            "conditioning.image_noise_log_mean=-2",
            "--deepspeed",
            "d.json",
        ],
        "doc",
    )
    assert vars(args) == {
        "config": "r.yaml",
        "deepspeed": "d.json",
        "overrides": ["a=1", "conditioning.image_noise_log_mean=-2"],
    }
    assert vars(cli.parse_args([], "doc")) == {"config": None, "deepspeed": None, "overrides": []}
    assert cli.parse_args(["--out", "x"], "doc", lambda p: p.add_argument("--out") and None).out == "x"


words = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=5)


def pack(words):
    data = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    return "--packed=" + base64.urlsafe_b64encode(data).decode()


@given(words)
def test_packed_words_come_out_as_they_went_in(words):
    assert cli.unpacked(["--local_rank=1", pack(words), "a=b"]) == ["--local_rank=1", *words, "a=b"]


def test_packed_words_are_parsed_like_others():
    words = ["--config", "a b.yaml", "data.default_caption=it's\n$(x)", ""]
    args = cli.parse_args(["--local_rank=0", pack(words)], "doc")
    assert args.config == "a b.yaml"
    assert args.overrides == words[2:]
    # Bytes that are no text, as a file's name may be.
    assert cli.unpacked([pack([b"\xff=1".decode("utf-8", "surrogateescape")])]) == ["\udcff=1"]


@pytest.mark.parametrize("text", ["YQ==", "a", "YQ", "?", "é", "Y Q A=", "YQA=YQA"])
def test_a_damaged_packed_word_is_refused(text):
    with pytest.raises(UserError, match=r"--packed=.* is damaged: launch/hostfile\.sh makes it"):
        cli.unpacked(["--packed=" + text])


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--deepspeed_config", "x.json"], ["unknown flag --deepspeed_config", "did you mean '--deepspeed'?"]),
        (["--confg=x"], ["unknown flag --confg", "did you mean '--config'?"]),
        (["--conf", "x"], ["unknown flag --conf", "did you mean '--config'?"]),
        (["-q"], ["unknown flag -q"]),
        (["--deepspeed"], ["--deepspeed", "expected one argument"]),
    ],
)
def test_unknown_flags_are_refused_with_the_nearest(argv, parts):
    with pytest.raises(UserError) as error:
        cli.parse_args(argv, "doc")
    for part in [*parts, "on the command line", "--help"]:
        assert part in str(error.value)


def test_help_prints_usage_and_every_key(capsys):
    with pytest.raises(SystemExit) as done:
        cli.parse_args(["--help"], "Train a LoRA.")
    out = capsys.readouterr().out
    assert done.value.code == 0
    assert "usage: " in out
    assert "Train a LoRA." in out
    assert "local_rank" not in out
    assert config.help_text() in out


@pytest.mark.parametrize(
    "environ, says",
    [
        ({}, "error: the clip is torn\n"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "error: the clip is torn\n"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ""),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "error on rank 2 (node2): the clip is torn\n"),
        ({"RANK": "7", "WORLD_SIZE": "4"}, "error: the clip is torn\n"),
    ],
)
def test_a_user_error_is_one_line_a_node_and_code_2(environ, says, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node2")

    def main() -> None:
        raise UserError("the clip is torn")

    assert cli.run(main) == 2
    assert capsys.readouterr().err == says


def test_what_rank_0_says_too_is_said_once_and_a_ranks_own_trouble_is_always_told(monkeypatch, capsys):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "connected", lambda: True)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node1")
    error = UserError("the cache is damaged")

    def main() -> None:
        raise error

    assert cli.run(main) == 2
    assert capsys.readouterr().err == "error on rank 3 (node1): the cache is damaged\n"
    error.shared = True
    assert cli.run(main) == 2
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_success_is_0():
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(bug)
    assert cli.run(lambda: None) == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: cannot write into .*file/run"):
        cli.make_folders({"output_dir": str(tmp_path / "file/run")})
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write into"):
        cli.make_folders({"output_dir": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "file")})


def test_a_port_that_another_run_has_is_named(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert cli.run(lambda: dist.TCPStore("127.0.0.1", port, 2, is_master=True)) == EXIT_HUNG
    said = capsys.readouterr().err
    assert f"cannot open port {port}" in said
    assert "--master_port" in said
    assert "lost contact" not in said


def test_a_rank_that_has_died_is_told_as_lost(capsys):
    def main() -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    assert cli.run(main) == EXIT_HUNG
    assert "lost contact with another rank" in capsys.readouterr().err


VERBS = {"train": "train", "encode": "encode", "evaluate": "evaluate", "sample": "sample", "export": "export",
         "probe": "probe", "report.main": "report", "preflight.main": "preflight"}  # fmt: skip


@pytest.mark.parametrize("module", ["cogds", *(f"cogds.{name}" for name in VERBS)])
def test_a_module_is_no_command_and_says_so(module):
    """Its last line is what `python -m` runs; the imports before it take seconds, so one module is run whole."""
    verb = VERBS.get(module.partition(".")[2], "train")
    file = ROOT / (module.replace(".", "/") + ("/__main__.py" if module == "cogds" else ".py"))
    *_, guard, call = file.read_text().splitlines()
    assert guard == 'if __name__ == "__main__":'
    assert call.strip() == f'refuse_to_run("{module}", "{verb}")'
    assert (ROOT / f"launch/{verb}.py").is_file()


@pytest.mark.parametrize("module", ["cogds", "cogds.export"])
def test_running_a_module_fails_with_a_sentence(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: python -m {module}: ")
