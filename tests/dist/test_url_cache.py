"""Two ranks train from a cache on an S3 server as from one in a folder, also while the server is away."""

import shutil
import threading
import time

import pytest

from cogds.data.cache.store import Cache
from tests.conftest import ROOT
from tests.dist.conftest import losses, metrics, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]
ENCODE = ROOT / "launch/encode.py"
OPTIONS = ["train.num_steps=12", "eval.every=6", "eval.held_out=0.3"]


def evaluations(run):
    return [line["eval/loss"] for line in notes(run) if "eval/loss" in line]


def restart_after_steps(server, run, num_steps):
    """Stop the server when the run has made a number of steps, and start it again 3 s later, in a thread."""

    def restart():
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and len(losses(run)) >= num_steps:
                break
            time.sleep(0.01)
        server.proxy.stop()
        time.sleep(3)
        server.proxy.start()

    thread = threading.Thread(target=restart)
    thread.start()
    return thread


@pytest.mark.parametrize("local_gb", [1, 1e-9], ids=["copied", "not copied"])
def test_losses_are_those_of_a_local_cache(train_once, workshop, s3, tmp_path, local_gb):
    whole = train_once("url-local", "zero2", *OPTIONS)
    cache = [f"data.cache_dir={s3.new_bucket()}/cache", f"data.local_cache_dir={tmp_path / 'copy'}"]
    name = f"url-{local_gb}"
    restart = restart_after_steps(s3, workshop / name, 4)
    remote = train_once(name, "zero2", *OPTIONS, *cache, f"data.local_cache_gb={local_gb}", env=s3.env)
    restart.join()
    assert losses(remote) == losses(whole)
    assert len(losses(remote)) == 12
    assert evaluations(remote) == evaluations(whole)
    assert len(evaluations(remote)) == 3
    assert not (remote / "quarantine.jsonl").exists()
    waits = [line["perf/data_wait_s"] for line in metrics(remote)[1:]]
    print(f"data wait after the first step: {sum(waits):.2f} s")


def test_encoding_on_the_fly(train_once, s3):
    """Only the clips to evaluate are in the cache."""
    whole = train_once("url-local", "zero2", *OPTIONS)
    root = f"{s3.new_bucket()}/cache"
    words = [f"data.cache_dir={root}", "data.encode=on_the_fly"]
    remote = train_once("url-on-the-fly", "zero2", *OPTIONS, *words, env=s3.env)
    assert losses(remote) == losses(whole)
    assert evaluations(remote) == evaluations(whole)
    held_out = Cache(root).snapshot("clips").num_entries
    assert 0 < held_out < 7


def test_the_encode_verb(workshop, tiny_model, s3, warm, tmp_path):
    root = f"{s3.new_bucket()}/cache"

    def encode(*words, ranks=1):
        done = warm(ENCODE, [
            *words, f"model.path={tiny_model}", f"data.path={workshop / 'clips'}", f"data.cache_dir={root}",
            "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]", "train.precision=fp32", "data.num_workers=1",
            f"output_dir={tmp_path / 'run'}",
        ], ranks=ranks, env=s3.env)  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    assert "7 clips encoded" in encode(ranks=2)
    assert Cache(root).snapshot("clips").num_entries == 7
    assert "7 entries" in encode("--stats")
    assert "15 intact entries" in encode("--verify")  # with 8 captions
    assert "removed 7 entries" in encode("--prune", "--yes", "data.fps=8")
    assert Cache(root).snapshot("clips").num_entries == 7


def test_a_run_that_was_stopped_resumes_from_another_copy(train_once, workshop, s3, tmp_path):
    whole = train_once("zero2", "zero2")
    cache = f"data.cache_dir={s3.new_bucket()}/cache"
    copies = [f"data.local_cache_dir={tmp_path / name}" for name in ("first", "second")]
    train_once("url-resumed", "zero2", cache, copies[0], "train.num_steps=6", env=s3.env)
    stopped = workshop / "url-resumed"
    assert losses(stopped) == losses(whole)
    shutil.rmtree(stopped / "checkpoints/step-000006")
    (stopped / "checkpoints/latest").write_text("step-000003\n")
    train_once("url-resumed-2", "zero2", cache, copies[1], f"output_dir={stopped}", env=s3.env)
    assert losses(stopped) == losses(whole)
