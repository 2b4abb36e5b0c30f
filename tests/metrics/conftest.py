import os
import shutil
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 64 kB, which a test can fill, enlarge or make read-only. Needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "cogds-test", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
