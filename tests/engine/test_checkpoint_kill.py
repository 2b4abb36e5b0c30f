"""A save that is killed: the checkpoints before it stay, and the next save removes what it left."""

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
# Where in a save a kill may fall, as seen in the folder afterwards.
PHASES = {"tensors in part", "no state.json", "done"}


def state(step, num_elements):
    tensors = {f"{kind}/a": torch.full((num_elements,), step + place) for place, kind in enumerate("xyz")}
    return TrainState(tensors, step)


def save(folder, step, num_elements):
    checkpoint.write(folder, step, state(step, num_elements), {"identity": {}}, KEEP_LAST, None)


def sound(folder, num_elements):
    """The step of what is found, which must be what that step wrote."""
    _, facts, found = checkpoint.find(folder, "auto")
    expected = state(facts["step"], num_elements)
    assert found.num_updates == facts["step"]
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    return facts["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def forked(function):
    """The process id of a fork that calls this and ends: 0 is its code where nothing was raised."""
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
        return "done"
    tensors = partial[0] / checkpoint.TENSORS_FILE
    if not tensors.exists() or tensors.stat().st_size < size_bytes:
        return "tensors in part"
    return "no state.json" if not (partial[0] / checkpoint.STATE_FILE).exists() else "state.json"


@pytest.mark.slow
def test_a_save_killed_at_any_moment(tmp_path):
    """Twenty kills spread over the length of a save, and more until each of its long phases was hit."""
    num_elements, generator = 2_500_000, random.Random(0)  # 30 MB
    for step in (1, 2):
        start = time.monotonic()
        save(tmp_path, step, num_elements)
        length_s = time.monotonic() - start
    size_bytes = (tmp_path / "step-000002" / checkpoint.TENSORS_FILE).stat().st_size
    last, phases = 2, []
    while len(phases) < NUM_KILLS or not set(phases) >= PHASES:
        assert len(phases) < MAX_KILLS, f"{phases}: not all of {PHASES}"
        reading, writing = os.pipe()

        def save_next(step=last + 1, pipe=writing):
            ready = state(step, num_elements)
            os.write(pipe, b"s")
            checkpoint.write(tmp_path, step, ready, {"identity": {}}, KEEP_LAST, None)
            time.sleep(60)  # every one of them is killed

        process = forked(save_next)
        os.read(reading, 1)
        time.sleep(length_s * 1.2 * (len(phases) % NUM_KILLS + generator.random()) / NUM_KILLS)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(reading)
        os.close(writing)
        phases.append(phase(tmp_path, size_bytes))
        found = sound(tmp_path, num_elements)
        assert found in (last, last + 1)
        assert found == last + 1 or phases[-1] != "done"
        last = found
    save(tmp_path, last + 1, num_elements)
    assert sound(tmp_path, num_elements) == last + 1
    assert names(tmp_path) == ["latest", checkpoint.step_name(last), checkpoint.step_name(last + 1)]


@pytest.mark.parametrize("step", [4, pytest.param(3, marks=pytest.mark.slow)], ids=["new", "again"])
def test_a_save_killed_before_each_change_on_the_disk(tmp_path, step):
    """The n-th change, for each n: opening, renaming or removing a file, creating a folder."""
    seen = []
    for place in range(1, 100):
        folder = tmp_path / str(place)
        for earlier in (2, 3):
            save(folder, earlier, 10)
        reading, writing = os.pipe()

        def save_and_die(place=place, folder=folder, pipe=writing):
            left = [place]

            def hook(event, arguments):
                if event == "open" or (event.startswith(("os.", "shutil.")) and event != "os.scandir"):
                    left[0] -= 1
                    if left[0] == 0:
                        os.write(pipe, f"{event} {arguments[0]}".encode())
                        os.kill(os.getpid(), signal.SIGKILL)

            ready = state(step, 10)
            sys.addaudithook(hook)
            checkpoint.write(folder, step, ready, {"identity": {}}, KEEP_LAST, None)
            left[0] = 0

        process = forked(save_and_die)
        status = os.waitpid(process, 0)[1]
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            at = pipe.read().decode()
        found = sound(folder, 10)
        assert found in (3, step) if step == 4 else found in (2, 3), at
        save(folder, 5, 10)
        kept = {"step-000005", checkpoint.step_name(found)}
        assert sound(folder, 10) == 5
        assert set(names(folder)) == {"latest", *kept}, at
        if not at:
            assert os.WEXITSTATUS(status) == 0
            break
        seen.append(at)
    done = "\n".join(seen)
    for part in (checkpoint.TENSORS_FILE, f"{checkpoint.STATE_FILE}", "os.rename", "os.mkdir", "shutil.rmtree"):
        assert part in done, done
    assert len(seen) > 12, done
