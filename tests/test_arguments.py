"""The command line of every verb, parsed without torch."""

import base64
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogds.arguments import VERBS, find_config, parse_args, shipped_config, unpack
from cogds.config.loading import load_config
from cogds.errors import UserError
from tests.conftest import ROOT

REQUIRED = {
    "gallery": ["run"],
    "sample": ["--model", "m", "--image", "i.png", "--prompt", "p"],
    "export": ["lora.safetensors", "--to", "diffusers", "--output", "o"],
}


def error_of(verb, argv):
    with pytest.raises(UserError) as error:
        parse_args(verb, argv)
    return str(error.value)


def test_flags_and_overrides_may_be_mixed():
    line = "--local_rank=1 a=1 --config r.yaml conditioning.image_noise_log_mean=-2 --deepspeed=d.json"
    args = parse_args("train", line.split())
    assert (args.config, args.deepspeed) == (["r.yaml"], "d.json")
    assert args.overrides == ["a=1", "conditioning.image_noise_log_mean=-2"]


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.takes_config])
def test_every_flag_may_be_written_with_underscores(verb):
    assert parse_args(verb, ["--config=a_b.yaml", "--local_rank=3", "lora.rank=4"]).config == ["a_b.yaml"]
    assert parse_args("report", ["--num_gpus", "8", "--gpu_memory=24"]).gpu_memory == 24.0
    assert parse_args("report", ["--gpu", "h100"]).gpu == "h100"
    with pytest.raises(UserError, match=r"--gpu: .*'h1'.*'h100'"):
        parse_args("report", ["--gpu", "h1"])
    assert parse_args("train", ["--dry_run"]).dry_run


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--deepspeed_config", "x.json"], ["--deepspeed-config", "'--deepspeed'"]),
        (["--confg=x"], ["--confg", "'--config'"]),
        (["--conf", "x"], ["--conf", "'--config'"]),
        (["-c", "run.yaml"], ["-c", "'--config'"]),
        (["-q"], ["-q", "'--quiet'"]),
        (["--deepspeed"], ["--deepspeed"]),
        (["run.yaml"], ["run.yaml", "--config"]),
        (["zero3.json"], ["zero3.json", "--deepspeed"]),
        (["--num-gpus", "0"], ["--num-gpus", "0"]),
        (["--num-gpus", "two"], ["--num-gpus", "'two'"]),
    ],
)
def test_an_unknown_argument_is_named_with_the_likely_one(argv, named):
    assert [text for text in named if text not in error_of("train", argv)] == []


@pytest.mark.parametrize("verb", REQUIRED)
def test_verbs_without_a_config_take_no_overrides(verb):
    assert vars(parse_args(verb, REQUIRED[verb]))["verb"] == verb
    if verb == "sample":
        assert "lora.rank=4" in error_of(verb, [*REQUIRED[verb], "lora.rank=4"])
    assert "--stepz" in error_of(verb, [*REQUIRED[verb], "--stepz=4"])


words = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=5)


def pack(words):
    data = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    return "--packed=" + base64.urlsafe_b64encode(data).decode()


@given(words)
def test_unpacking_restores_the_packed_words(words):
    assert unpack(["--local_rank=1", pack(words), "a=b"]) == ["--local_rank=1", *words, "a=b"]


def test_packed_words_are_parsed_like_others():
    words = ["--config", "a b.yaml", "data.default_caption=it's\n$(x)", ""]
    args = parse_args("train", ["--local_rank=0", pack(words)])
    assert (args.config, args.overrides) == (["a b.yaml"], words[2:])
    # Bytes that are not valid text, as in a file name.
    assert unpack([pack([b"\xff=1".decode("utf-8", "surrogateescape")])]) == ["\udcff=1"]


@pytest.mark.parametrize("text", ["YQ==", "a", "YQ", "?", "é", "Y Q A=", "YQA=YQA"])
def test_a_damaged_packed_word_is_refused(text):
    assert "--packed=" in error_of("train", ["--packed=" + text])


def test_shipped_configs_are_found_by_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    assert find_config("zero3", "ds_configs", ".json") == str(shipped_config("ds_configs", "zero3.json"))
    assert find_config("zero9", "ds_configs", ".json") == "zero9"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").touch()
    assert find_config("zero3", "ds_configs", ".json") == "zero3"
    assert load_config(str(shipped_config("run_configs", "demo.yaml")), [])[0].data.draw_demo_clips


def test_help_and_errors_answer_without_torch():
    """Importing torch would take seconds. The timeout only guards against a hang."""
    code = (
        "import sys, cogds.cli\n"
        "codes = []\n"
        "for argv in (['--help'], ['--version'], ['train', '--nonsense'], ['nonsense'], ['sample'],\n"
        "             ['train', 'no.key=1'], ['train', '--config', 'no'], ['train', '--deepspeed=no'],\n"
        "             ['train', 'eval.path=/nowhere']):\n"
        "    codes.append(cogds.cli.main(argv))\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'diffusers', 'transformers', 'peft', 'matplotlib'}\n"
        "print(codes, heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 2, 2, 2, 2, 2, 2] set()"


@pytest.mark.slow
def test_every_verb_has_help_that_lists_its_keys():
    for verb, spec in VERBS.items():
        done = subprocess.run(
            [sys.executable, "-m", "cogds", verb, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 0
        assert spec.summary in " ".join(done.stdout.split())
        assert ("train.num_steps" in done.stdout) == spec.takes_config
        assert "local-rank" not in done.stdout
