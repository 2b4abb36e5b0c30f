"""The encode verb as a user runs it: on two ranks, killed and restarted, on a full disk."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SCRIPT = ROOT / "tests/e2e/encode_script.py"
ONE_CLIP_PER_SHARD = "data.shard_gb=1e-6"


@pytest.fixture
def arguments(tiny_model, tmp_path):
    from tests.drawn import draw_clips

    draw_clips(tmp_path / "clips")
    return [
        f"model.path={tiny_model}", f"data.path={tmp_path / 'clips'}", f"data.cache_dir={tmp_path / 'cache'}",
        f"output_dir={tmp_path / 'run'}", "data.buckets=[17x64x96, 9x96x64, 1x64x64]", "data.num_workers=1",
        "train.precision=fp32",
    ]  # fmt: skip


def left_behind(cache: Path) -> list[str]:
    """Return the files that are not a shard, an index, a manifest or the file of digests."""
    return [
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file()
        and not (path.suffix == ".safetensors" and path.parent.name in ("clips", "captions"))
        and path.parent.name != "index"
        and path.suffix != ".parquet"
        and path.name != "files.json"
    ]


def test_two_ranks_encode_each_clip_once_and_training_uses_it(arguments, tmp_path, run_train, warm):
    log = {"ENCODED": str(tmp_path / "log")}
    done = warm(SCRIPT, arguments, ranks=2, env=log)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "7 clips encoded" in done.stdout
    assert (tmp_path / "log").read_text().count("clip") == 7
    assert left_behind(tmp_path / "cache") == []
    done = warm(SCRIPT, [*arguments, "optimizer.lr=1"], ranks=2, env=log)
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "log").read_text().count("clip") == 7
    # Training with another learning rate encodes nothing.
    before = sorted(tmp_path.glob("cache/*/*.safetensors"))
    words = ["--deepspeed", "ds_configs/zero2.json", *arguments, "train.num_steps=2", "optimizer.lr=0.5"]
    run_train(*words, launcher="warm")
    assert sorted(tmp_path.glob("cache/*/*.safetensors")) == before

    def encode(*words):
        return warm(ROOT / "launch/encode.py", [*arguments, *words]).stdout

    def num_clips():
        assert "clips     7 entries, " in encode("--stats")
        output = encode("--stats", "--json")
        return json.loads(output[output.index("{") :])["clips"]["entries"]

    assert num_clips() == 7
    shard = next(tmp_path.glob("cache/clips/*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[-9] ^= 4
    shard.write_bytes(damaged)
    assert "1 damaged and removed" in encode("--verify")
    done = warm(SCRIPT, [*arguments, "data.buckets=[17x64x96, 1x64x64]", "--prune", "--yes"], env=log)
    assert done.returncode == 0, done.stdout[-4000:]
    assert num_clips() == 7  # a clip of the removed bucket is encoded for another


def test_killed_twenty_times_nothing_is_lost_or_encoded_twice(arguments, tmp_path, warm):
    """SIGKILL of the whole process group at random times, then an uninterrupted run."""
    for copy in range(12):  # other bytes, so other cache entries
        for source in list((tmp_path / "clips").glob("clip_[0-5].*")):
            target = source.with_name(f"{copy}_{source.name}")
            shutil.copy(source, target)
            if target.suffix == ".mp4":
                with target.open("ab") as file:
                    file.write(bytes(copy + 1))  # bytes after the end of an MP4 are ignored
    num_clips = 7 + 12 * 6
    env = {"ENCODED": str(tmp_path / "log")}
    moments, longest_s, num_encoded = random.Random(0), 3.0, []
    words = [*arguments, ONE_CLIP_PER_SHARD]
    for _ in range(20):
        warm(SCRIPT, words, timeout_s=240, env=env, kill_after_s=moments.random() * longest_s)
        num_encoded.append((tmp_path / "log").read_text().count("clip") if (tmp_path / "log").exists() else 0)
        longest_s *= 1 if num_encoded[-1] else 1.5  # adapts to the speed of this machine
    assert any(0 < num < num_clips for num in num_encoded)  # some kills interrupt the encoding
    done = warm(SCRIPT, words, timeout_s=300, env=env)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{num_clips} clips encoded" in done.stdout
    encoded = (tmp_path / "log").read_text().count("clip")
    # Each kill may lose the shard in flight and the clip that is being encoded.
    assert num_clips <= encoded <= num_clips + 2 * 20
    assert left_behind(tmp_path / "cache") == []
    verified = warm(ROOT / "launch/encode.py", [*arguments, "--verify"]).stdout
    assert "0 damaged" in verified


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_or_read_only_disk_is_reported_and_loses_nothing(arguments, tmp_path, warm):
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(cache)]
    subprocess.run(mount, check=True, timeout=20)
    log = {"ENCODED": str(tmp_path / "log")}
    arguments = [*arguments, ONE_CLIP_PER_SHARD]
    try:
        done = warm(SCRIPT, arguments, env=log)
        assert done.returncode == 2
        assert "Traceback" not in done.stdout
        assert "space" in done.stdout
        subprocess.run(["mount", "-o", "remount,size=50m", str(cache)], check=True, timeout=20)
        done = warm(SCRIPT, arguments, env=log)
        assert done.returncode == 0, done.stdout[-4000:]
        assert (tmp_path / "log").read_text().count("clip") <= 7 + 2
        assert left_behind(cache) == []
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True, timeout=20)
        done = warm(SCRIPT, arguments, env=log)
        assert done.returncode == 2
        assert "data.cache_dir: " in done.stdout
        assert "Traceback" not in done.stdout
    finally:
        subprocess.run(["umount", str(cache)], check=True, timeout=20)
