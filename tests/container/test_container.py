"""The image of the Dockerfile, built and run by buildah as root.

Its base is made of Debian's packages, as debian:bookworm-slim is, because no registry may be reachable. What needs a
GPU or Docker's own runtime is not tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAMS = ("buildah", "mmdebstrap")
MISSING = [*([] if os.geteuid() == 0 else ["root"]), *(name for name in PROGRAMS if not shutil.which(name))]
pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(bool(MISSING), reason=f"not available: {MISSING}. Run tests/container/install.sh as root."),
]

BUILD_TIMEOUT_S, RUN_TIMEOUT_S = 3000, 900
PYTHON = "/opt/venv/bin/python"
UNKNOWN_USER = "4242:4242"  # has no name and no home in the image
PIP_FOLDER = "/run/pip"  # in the container, during the build


def run(*words, timeout_s=RUN_TIMEOUT_S, **options):
    """Run a command. Returns its output, or fails with it."""
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, errors="replace", timeout=timeout_s, **options
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def read_pip_settings():
    """Return how pip on this machine reaches packages."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = {
        name.rpartition(".")[2]: value.strip("'\"") for name, _, value in (line.partition("=") for line in lines)
    }
    names = ("index-url", "extra-index-url", "find-links", "cert", "proxy", "trusted-host", "default-timeout")
    return {name: settings[name] for name in names if name in settings}


def pip_volumes(folder):
    """Return the volumes with which pip in a container reaches what pip on this machine reaches.

    They hold this machine's settings of pip, and the certificates and folders of packages that these name.
    """
    lines, volumes = ["[global]"], []
    for key, value in read_pip_settings().items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                folder_or_file = path.parent if "index" in key else path  # an index may link to files beside it
                volumes.append(f"{folder_or_file}:{PIP_FOLDER}{folder_or_file}:ro")
                word = word.replace(str(path), f"{PIP_FOLDER}{path}")
            words.append(word)
        lines.append(f"{key} = {' '.join(words)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return [f"{folder / 'pip.conf'}:/etc/pip.conf:ro", *dict.fromkeys(volumes)]


class Image:
    """The image, in a folder with all that belongs to it."""

    def __init__(self, folder):
        self.folder = folder
        self.storage = ["--root", folder / "images", "--runroot", folder / "run", "--storage-driver", "overlay"]

    def buildah(self, *words, **options):
        return run("buildah", *self.storage, *words, **options)

    def build(self):
        run("mmdebstrap", "--variant=minbase", "bookworm", self.folder / "base.tar", timeout_s=BUILD_TIMEOUT_S)
        (self.folder / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
        self._build("base", self.folder)
        (self.folder / "base.tar").unlink()
        volumes = [word for volume in pip_volumes(self.folder) for word in ("--volume", volume)]
        self._build("cogds", ROOT, "--build-arg", "BASE=localhost/base", *volumes)
        self.config = json.loads(self.buildah("inspect", "--type", "image", "cogds"))["OCIv1"]["config"]

    def _build(self, tag, folder, *words):
        # This isolation needs no cgroups and no runtime, only root.
        self.buildah("build", "--isolation", "chroot", "--tag", tag, *words, folder, timeout_s=BUILD_TIMEOUT_S)

    def run(self, *words, user=None, options=()):
        """Run a command in a new container with the image's environment and working directory."""
        options = [*options, *(["--user", user] if user else [])]
        container = self.buildah("from", "cogds").strip()
        try:
            return self.buildah("run", "--isolation", "chroot", *options, container, "--", *words)
        finally:
            self.buildah("rm", container)

    def remove(self):
        for words in (["rm", "--all"], ["rmi", "--all", "--force"]):
            subprocess.run(["buildah", *map(str, self.storage), *words], capture_output=True, timeout=RUN_TIMEOUT_S)


@pytest.fixture(scope="module")
def image():
    with tempfile.TemporaryDirectory(prefix="cogds-image-", ignore_cleanup_errors=True) as folder:
        image = Image(Path(folder))
        try:
            image.build()
            yield image
        finally:
            image.remove()


def normalize(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normalize(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def test_the_image_has_the_pinned_versions(image):
    installed = dict(line.split("==") for line in image.run(PYTHON, "-m", "pip", "freeze").splitlines() if "==" in line)
    installed = {normalize(name): version for name, version in installed.items()}
    if installed["torch"].endswith("+cpu"):
        warnings.warn(f"torch {installed['torch']} of this machine stands in for the CUDA wheels", stacklevel=1)
    pins = read_pins()
    # torch's CUDA wheels name the exact versions of these.
    own = {name for name in installed if re.match("nvidia-|cuda-|triton$", name)}
    differing = {name: version for name, version in installed.items() if pins.get(name) != version.partition("+")[0]}
    assert {name: version for name, version in differing.items() if name not in own} == {}
    assert {"torch", "deepspeed", "diffusers", "pillow-heif", "s3fs", "aiohttp"} <= set(installed)


@pytest.mark.parametrize("user", [None, UNKNOWN_USER], ids=["the image's user", "a user without a name"])
def test_the_default_command_checks_the_machine(image, user):
    assert "\nready: " in "\n" + image.run(*image.config["Cmd"], user=user)


def test_torchrun_trains_as_the_docs_say(image):
    train = "torchrun --standalone --nproc_per_node 2 -m cogds train --config demo train.num_steps=2 eval.every=null"
    output = image.run("sh", "-c", f"{train} && ls outputs/demo/lora/step-000002", user=UNKNOWN_USER)
    assert "\npytorch_lora_weights.safetensors" in output


def test_the_image_asks_for_gpus_and_runs_as_an_ordinary_user(image):
    assert "NVIDIA_VISIBLE_DEVICES=all" in image.config["Env"]
    assert image.run("id", "--user").strip() not in ("", "0")


COMPILE = """
import torch
from deepspeed.ops.op_builder.cpu import CPUAdamBuilder
x = torch.arange(10.0)
torch.testing.assert_close(torch.compile(lambda x: x.sin() + 1)(x), x.sin() + 1)
CPUAdamBuilder().load(verbose=False)  # the builder that DeepSpeed uses with CUDA, too
print("compiled")
"""


def test_what_is_compiled_at_run_time_compiles(image):
    assert "compiled" in image.run(PYTHON, "-c", COMPILE, user=UNKNOWN_USER)


def test_a_slurm_job_runs_the_code_of_the_checkout_in_the_image(image, tmp_path):
    """As launch/slurm/job.sh does with COGDS_WRAP and COGDS_PYTHON."""
    checkout = tmp_path / "checkout"
    for name in ("cogds", "ds_configs", "launch"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    verb = checkout / "cogds/arguments.py"
    verb.write_text(verb.read_text() + "\nprint('the code of the checkout')\n")
    mount = ["--volume", f"{checkout}:{checkout}"]
    output = image.run(PYTHON, checkout / "launch/train.py", "--help", user=UNKNOWN_USER, options=mount)
    assert "the code of the checkout" in output
    assert "usage: launch/train.py" in output


def test_the_pinned_torch_comes_with_a_cudnn_that_the_vae_can_use(tmp_path):
    """Resolves torch's CUDA wheels without downloading them. The minimum is that of cogds/model/cudnn.py."""
    settings = read_pip_settings()
    settings.pop("find-links", None)  # may hold a build of torch for CPUs
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}
    environment["PIP_CONFIG_FILE"] = os.devnull  # no other settings
    report = tmp_path / "report.json"
    words = ["--dry-run", "--ignore-installed", "--quiet", "--only-binary", ":all:", "--report", report]
    pinned = ["--constraint", ROOT / "constraints.txt", "torch"]
    run(sys.executable, "-m", "pip", "install", *words, *pinned, env=environment)
    metadata = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    packages = {package["name"]: package["version"] for package in metadata}
    print(packages)
    assert packages["torch"] == read_pins()["torch"]
    (cudnn,) = (version for name, version in packages.items() if name.startswith("nvidia-cudnn"))
    assert tuple(map(int, cudnn.split(".")[:2])) >= (9, 15)
