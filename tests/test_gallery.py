"""The page with the videos of a run."""

import json
import re
from urllib.parse import unquote

import numpy as np
import pytest

from cogds.cli import call
from cogds.data.video.media import write_video
from cogds.errors import UserError
from cogds.metrics.jsonl import read_scalars
from cogds.videos.sample_folder import Prompt, read_videos, write_prompts

EVIL = '<script>alert(1)</script> "><img src=x onerror=alert(2)> {{ 7*7 }} 一个圆'


def make_run(folder, steps=(0, 5, 10)):
    """Write what a run leaves behind: two prompts, the second in portrait, and losses."""
    samples, prompts = folder / "samples", {"evil-1": Prompt(EVIL, "9x32x48", 3), "b #2": Prompt("tall", "9x48x32", 0)}
    first_frames = {stem: np.full((32, 48, 3), 90, np.uint8) for stem in prompts}
    write_prompts(samples, prompts, first_frames)
    for stem, prompt in prompts.items():
        _, height, width = map(int, prompt.size.split("x"))
        for place in ("base", *(f"step-{step:06}" for step in steps)):
            (samples / place).mkdir(exist_ok=True)
            level = 0 if place == "base" else int(place[5:])
            frames = np.full((9, height, width, 3), 10 * level % 200, np.uint8)
            frames += (np.arange(9, dtype=np.uint8) * 5)[:, None, None, None]
            write_video(samples / place / f"{stem}.mp4", frames, 8)
    lines = [{"step": step, "train/loss": 2 - step / 10} for step in range(1, 11)]
    lines += [{"step": step, "eval/loss": 1.5 - step / 20} for step in (0, 5, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11, "tra')
    return folder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "my run").mkdir()
    return make_run(tmp_path / "my run")


def titles(page):
    return re.findall(r'<th scope="col">([^<]+)<small>([^<]*)', page)


def test_every_prompt_has_a_video_of_every_step(run):
    call("gallery", [str(run)])
    page = (run / "gallery.html").read_text()
    # The videos of step 0 are those of the base model.
    assert titles(page) == [
        ("base model", "held-out loss 1.5000"), ("step 5", "held-out loss 1.2500"), ("step 10", "held-out loss 1.0000"),
    ]  # fmt: skip
    addresses = re.findall(r'<video class="(\w*)" src="([^"]+)"', page)
    assert [(kind, unquote(address)) for kind, address in addresses] == [
        (kind, f"samples/{place}/{stem}.mp4")
        for stem, kind in (("evil-1", ""), ("b #2", "tall"))
        for place in ("base", "step-000005", "step-000010")
    ]
    assert page.count("<svg ") == 1
    assert "7*7" in page


def test_the_first_videos_of_a_run_that_starts_from_a_lora_are_kept(run):
    (run / "samples/base/evil-1.mp4").write_bytes((run / "samples/step-000010/evil-1.mp4").read_bytes())
    call("gallery", [str(run)])
    expected = ["base model", "step 0", "step 5", "step 10"]
    assert [title for title, _ in titles((run / "gallery.html").read_text())] == expected


def test_what_users_wrote_is_text(run):
    call("gallery", [str(run)])
    page = (run / "gallery.html").read_text()
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert "一个圆" in page
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|unsafe-eval|script-src[^;]*unsafe", policy)


def test_videos_are_found_from_another_folder_or_are_in_the_page(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    page = tmp_path / "elsewhere/page.html"
    call("gallery", [str(run), "--output", str(page)])
    for address in re.findall(r'(?:<video [^>]*|<img )src="([^"]+)"', page.read_text()):
        assert (page.parent / unquote(address)).is_file()
    call("gallery", [str(run), "--output", str(page), "--embed"])
    sources = re.findall(r'(?:<video [^>]*|<img )src="([^"]{20})', page.read_text())
    assert len(sources) == 2 * (1 + 3)
    assert all(source.startswith(("data:video/mp4;base", "data:image/png;base6")) for source in sources)


def test_a_run_of_an_older_version_and_one_that_was_killed(run):
    """Without prompts.json, losses and some of the videos."""
    (run / "samples/prompts.json").write_text("{")
    (run / "metrics.jsonl").unlink()
    (run / "samples/step-000005/evil-1.mp4").unlink()
    call("gallery", [str(run)])
    page = (run / "gallery.html").read_text()
    assert [video.prompt.text for video in read_videos(run / "samples")] == ["b #2", "evil"]
    assert page.count("<video ") == 5
    assert page.count("<svg ") == 0


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(UserError, match="none: no such directory"):
        call("gallery", [str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"samples: no videos.*sample\.every"):
        call("gallery", [str(tmp_path)])


def test_prompts_of_an_earlier_part_of_the_run_are_kept(run):
    write_prompts(run / "samples", {"new-1": Prompt("new")}, {})
    assert {"evil-1", "b #2", "new-1"} == set(json.loads((run / "samples/prompts.json").read_text()))


def test_scalars_of_a_damaged_file_are_read(run):
    scalars = read_scalars(run / "metrics.jsonl", ["train/loss", "eval/loss", "none"])
    assert scalars["train/loss"] == [(step, 2 - step / 10) for step in range(1, 11)]
    assert scalars["eval/loss"] == [(0, 1.5), (5, 1.25), (10, 1.0)]
    assert scalars["none"] == read_scalars(run / "missing", ["none"])["none"] == []
