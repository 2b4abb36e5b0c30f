"""A TensorBoard server on a run's folder."""

import contextlib
import subprocess
import time
import urllib.request

from tests.conftest import free_port


def event_folder(run):
    """The folder of a run's event files."""
    return run / "tensorboard" / run.name


@contextlib.contextmanager
def tensorboard(*command, cwd=None):
    """Start a server with this command. Yields its address once it has read the losses."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen(
        [*map(str, command), "--port", str(port)], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if b"train/loss" in urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=5).read():
                    break
            assert time.monotonic() < end, "TensorBoard has not read the run"
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)
