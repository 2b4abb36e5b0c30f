"""Nodes without internet: installation from a folder of wheels, a model in a folder, and the error for a hub id."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Reads everything from a model folder without resolving any host name. Then a hub id, which must fail.
SCRIPT = """
import sys

requests = []
events = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
sys.addaudithook(lambda event, arguments: requests.append((event, arguments)) if event in events else None)
import torch
from diffusers import CogVideoXImageToVideoPipeline
from cogds.errors import UserError
from cogds.model import load

model = load.find_model(sys.argv[1])
load.load_alphas_cumprod(model)
load.load_transformer(model, torch.float32)
load.load_vae(model, torch.float32, "cpu")
load.TextEncoder(model, torch.float32, "cpu").encode("a red circle")
CogVideoXImageToVideoPipeline.from_pretrained(model.path, use_safetensors=True)
assert not requests, requests
try:
    load.find_model("somebody/some-model")
except UserError as error:
    print("error:", error)
assert requests  # the hook works
"""


def without_network():
    """Return words in front of a command that remove its network access; [] if the system does not allow that."""
    words = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
        return words
    return []


@pytest.mark.slow
def test_a_model_folder_needs_no_network_and_a_hub_id_is_a_user_error(tiny_model, tmp_path):
    environ = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environ.pop("HF_HUB_OFFLINE")
    done = subprocess.run(
        [*without_network(), sys.executable, "-c", SCRIPT, str(tiny_model)],
        cwd=ROOT,
        env={**environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "error: model.path: " in done.stdout
    assert "`hf download somebody/some-model --local-dir FOLDER`" in done.stdout


def make(*words):
    """Return the output of make and its exit code."""
    done = subprocess.run(["make", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr, done.returncode


@pytest.fixture
def new_venv(tmp_path):
    return f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"


def test_a_wheelhouse_has_everything_that_an_installation_needs(new_venv):
    plan, _ = make("-n", "install", *new_venv)
    packages = plan.partition("--editable ")[2].splitlines()[0]
    plan, _ = make("-n", "wheelhouse", *new_venv)
    (wheels,) = (line for line in plan.splitlines() if "pip wheel" in line)
    assert packages
    assert packages in wheels
    assert "--constraint constraints.txt" in wheels
    assert "setuptools" in wheels  # needed to build this package
    assert "index" not in plan  # the user configures the index
    assert "http" not in plan


def test_an_installation_from_a_wheelhouse_uses_no_index(new_venv):
    plan, _ = make("-n", "install", "WHEELHOUSE=wheelhouse", *new_venv)
    (install,) = (line for line in plan.splitlines() if "pip install" in line)
    assert f"--no-index --find-links {ROOT}/wheelhouse --constraint" in install
    assert "--no-index" not in make("-n", "install", *new_venv)[0]


def test_an_incompatible_wheelhouse_is_refused_before_anything_is_installed(new_venv, tmp_path):
    output, code = make("install", f"WHEELHOUSE={tmp_path}", *new_venv)
    assert code != 0
    assert f"error: WHEELHOUSE: {tmp_path}" in output
    (tmp_path / "fits").write_text("cpython-27 linux-vax\n")
    output, code = make("install", f"WHEELHOUSE={tmp_path}", *new_venv)
    assert code != 0
    assert f"error: WHEELHOUSE: {tmp_path}" in output
    assert "cpython-27 linux-vax" in output
    assert sys.implementation.cache_tag in output
    assert not (tmp_path / "venv").exists()
