"""The Dockerfile, without building it. tests/container builds and runs it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from cogds.arguments import find_config, parse_args
from cogds.config.loading import load_config
from tests.conftest import ROOT

TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
STEPS = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line]


def steps(name):
    return [text for step, text in STEPS if step == name]


def test_every_installation_is_pinned_and_leaves_no_cache():
    installs = [part for text in steps("RUN") for part in text.split("&&") if "pip install" in part]
    assert len(installs) == 2
    for part in installs:
        assert "--constraint /opt/cogds/constraints.txt" in part
        assert "--no-cache-dir" in part


def test_any_user_can_write_to_the_home_and_the_working_directory():
    (user,) = steps("USER")
    (folder,) = steps("WORKDIR")
    assert user not in ("root", "0")
    home = re.search(r"HOME=(\S+)", TEXT)[1]
    (writable,) = re.findall(r"install --directory --mode 1777 (.*)", TEXT)
    assert {home, folder} <= set(writable.split())


def test_the_default_command_is_a_check_that_exists():
    program, verb, *arguments = json.loads(steps("CMD")[0])
    args = parse_args(verb, arguments, "")
    assert (program, verb) == ("cogds", "preflight")
    load_config([find_config(text, "run_configs", ".yaml") for text in args.config], args.overrides)


@pytest.fixture
def build_context(tmp_path):
    """A copy of the files that .dockerignore lets into the image."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    for line in lines:
        if line.startswith("!"):
            source = ROOT / line[1:]
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, tmp_path / line[1:])
    return tmp_path


def test_the_build_context_has_all_that_an_installation_needs(build_context):
    for source in steps("COPY"):
        assert (build_context / source.split()[0]).exists()
    folder = build_context / "info"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder],
        cwd=build_context,
        check=True,
        timeout=60,
    )
    files = (folder / "cogds.egg-info/SOURCES.txt").read_text().splitlines()
    for file in [*ROOT.glob("launch/configs/*.yaml"), *ROOT.glob("ds_configs/*.json"), ROOT / "cogds/cli.py"]:
        assert file.relative_to(ROOT).as_posix() in files
