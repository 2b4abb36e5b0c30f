"""A save that is killed does not change earlier checkpoints, and the next save removes its incomplete files."""

import itertools
import os
import random
import signal
import sys
import time

import pytest
import torch

from cogds.engine import checkpoint
from cogds.engine.state import TrainState

NUM_KILLS, MAX_KILLS, KEEP_LAST = 20, 100, 2
# The long phases of a save, by the files that it leaves when it is killed.
PHASES = {"incomplete tensors", "no state.json", "complete"}


def state(step, num_elements):
    tensors = {f"{kind}/a": torch.full((num_elements,), step + offset) for offset, kind in enumerate("xyz")}
    return TrainState(tensors, step)


def save(folder, step, num_elements):
    checkpoint.write(folder, step, state(step, num_elements), {"identity": {}}, KEEP_LAST, None)


def find_step(folder, num_elements):
    """Find the newest checkpoint, check that it has the state of its step, and return the step."""
    _, header, found = checkpoint.find(folder, "auto")
    expected = state(header["step"], num_elements)
    assert found.num_updates == header["step"]
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    return header["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_in_fork(function):
    """Call the function in a forked process, which exits with 0 unless it raises, and return the process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.alarm(60)
        function()
        status = 0
    finally:
        os._exit(status)


def phase(folder, size_bytes):
    partial = [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    if not partial:
        return "complete"
    tensors = partial[0] / checkpoint.TENSORS_FILE
    if not tensors.exists() or tensors.stat().st_size < size_bytes:
        return "incomplete tensors"
    return "no state.json" if not (partial[0] / checkpoint.STATE_FILE).exists() else "state.json"


@pytest.mark.slow
def test_a_save_killed_at_any_moment(tmp_path):
    """Twenty kills spread over the duration of a save, and more until there was one in each phase."""
    num_elements, generator = 2_500_000, random.Random(0)  # 30 MB
    for step in (1, 2):
        start = time.monotonic()
        save(tmp_path, step, num_elements)
        duration_s = time.monotonic() - start
    size_bytes = (tmp_path / "step-000002" / checkpoint.TENSORS_FILE).stat().st_size
    last, phases = 2, []
    while len(phases) < NUM_KILLS or not set(phases) >= PHASES:
        assert len(phases) < MAX_KILLS, f"{phases}: not all of {PHASES}"
        reader, writer = os.pipe()

        def save_next(step=last + 1, pipe=writer):
            next_state = state(step, num_elements)
            os.write(pipe, b"s")
            checkpoint.write(tmp_path, step, next_state, {"identity": {}}, KEEP_LAST, None)
            time.sleep(60)  # until it is killed

        process = run_in_fork(save_next)
        os.read(reader, 1)
        time.sleep(duration_s * 1.2 * (len(phases) % NUM_KILLS + generator.random()) / NUM_KILLS)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(reader)
        os.close(writer)
        phases.append(phase(tmp_path, size_bytes))
        step = find_step(tmp_path, num_elements)
        assert step in (last, last + 1)
        assert step == last + 1 or phases[-1] != "complete"
        last = step
    save(tmp_path, last + 1, num_elements)
    assert find_step(tmp_path, num_elements) == last + 1
    assert names(tmp_path) == ["latest", checkpoint.step_name(last), checkpoint.step_name(last + 1)]


@pytest.mark.parametrize("step", [4, pytest.param(3, marks=pytest.mark.slow)], ids=["new", "again"])
def test_a_save_killed_before_each_change_on_the_disk(tmp_path, step):
    """The n-th change, for each n: opening, renaming or removing a file, or creating a folder."""
    changes = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        for earlier in (2, 3):
            save(folder, earlier, 10)
        reader, writer = os.pipe()

        def save_until_killed(number=number, folder=folder, pipe=writer):
            remaining = itertools.count(number - 1, -1)

            def hook(event, arguments):
                is_change = event == "open" or (event.startswith(("os.", "shutil.")) and event != "os.scandir")
                if is_change and next(remaining) == 0:
                    os.write(pipe, f"{event} {arguments[0]}".encode())
                    os.kill(os.getpid(), signal.SIGKILL)

            next_state = state(step, 10)
            sys.addaudithook(hook)
            checkpoint.write(folder, step, next_state, {"identity": {}}, KEEP_LAST, None)
            os._exit(0)

        status = os.waitpid(run_in_fork(save_until_killed), 0)[1]
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            change = pipe.read().decode()
        newest = find_step(folder, 10)
        assert newest in ((3, 4) if step == 4 else (2, 3)), change
        save(folder, 5, 10)
        assert find_step(folder, 10) == 5
        assert set(names(folder)) == {"latest", "step-000005", checkpoint.step_name(newest)}, change
        if not change:
            assert os.WEXITSTATUS(status) == 0
            break
        changes.append(change)
    text = "\n".join(changes)
    for part in (checkpoint.TENSORS_FILE, checkpoint.STATE_FILE, "os.rename", "os.mkdir", "shutil.rmtree"):
        assert part in text, text
    assert len(changes) > 12, text
