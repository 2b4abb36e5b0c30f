"""A resolved run of each member of the family."""

from contextlib import nullcontext

import numpy as np
import pytest

from cogds.core.geometry import ClipShape
from cogds.data.video.media import write_video
from cogds.errors import UserError
from cogds.report.main import model_notes
from cogds.videos.sample_spec import check_prompts
from tests.jobs import make_job
from tests.tiny import FIXED_SIZE, MEMBERS


def job_of(family, name, *overrides, buckets=FIXED_SIZE):
    return make_job(f"model.path={family(name)}", "data.path=clips", f"data.buckets=[{buckets}]", *overrides)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_has_a_job_and_a_memory_model(family, name):
    job = job_of(family, name)
    estimate = job.memory.estimate(job.buckets[0], 1, "none")
    assert (estimate.condition_encode_bytes > 0) is job.model.family.takes_image
    assert (estimate.rotary_tables_bytes > 0) is (name != "2b")


@pytest.mark.parametrize("name", MEMBERS)
def test_images_are_clips_of_one_frame_where_the_model_can(family, name):
    if name == "5b-i2v":
        for buckets in ("1x64x96", "17x64x80", "13x64x96"):
            with pytest.raises(UserError, match=rf"^data\.buckets: {buckets} .* only {FIXED_SIZE}"):
                job_of(family, name, buckets=buckets)
    else:
        assert job_of(family, name, buckets="1x48x80").buckets == (ClipShape(1, 48, 80),)


def test_keys_about_the_first_frame_do_not_apply_to_text(family):
    for word in ("image_latents=scaled", "image_dropout=0.5", "image_noise_log_mean=-2"):
        with pytest.raises(UserError, match=rf"^conditioning\.{word.split('=')[0]}: .* text-to-video"):
            job_of(family, "5b", f"conditioning.{word}")
        job_of(family, "5b-i2v", f"conditioning.{word}")
    # As in the recipes, and turned off.
    words = ["conditioning.image_latents=pipeline", "conditioning.image_dropout=0.05", "conditioning.image_noise=false"]
    job_of(family, "5b", *words)


def test_prompts_have_an_image_if_the_model_takes_one(family):
    for name, prompt, message in (
        ("5b-i2v", "{prompt: a}", "^sample.prompts.0..image: no image"),
        ("5b", "{prompt: a, image: first.png}", "^sample.prompts.0..image: first.png is given"),
        ("5b", "{prompt: a, size: 9x64x90}", "^sample.prompts.0..size: 9x64x90"),
    ):
        job = job_of(family, name, "sample.every=5", f"sample.prompts=[{prompt}]")
        with pytest.raises(UserError, match=message):
            check_prompts(job.cfg, job.buckets, job.model.geometry)
    job = job_of(family, "5b", "sample.every=5", "sample.prompts=[{prompt: a}]")
    check_prompts(job.cfg, job.buckets, job.model.geometry)


def test_the_control_of_a_prompt_is_read_at_the_start(family, tmp_path):
    write_video(tmp_path / "short.mp4", np.zeros((9, 64, 96, 3), np.uint8), 8)
    words = ["conditioning.control=true", "sample.every=5", "data.fps=8"]
    for size, is_long_enough in (("9x64x96", True), ("17x64x96", False)):
        prompt = f"{{prompt: a, size: {size}, control: {tmp_path / 'short.mp4'}}}"
        job = job_of(family, "5b", *words, f"sample.prompts=[{prompt}]")
        with nullcontext() if is_long_enough else pytest.raises(UserError, match=r"^sample\.prompts.0..control: "):
            check_prompts(job.cfg, job.buckets, job.model.geometry)


def test_what_a_model_was_not_trained_for_is_noted(family):
    assert model_notes(job_of(family, "5b", "data.fps=8")) == []
    notes = model_notes(job_of(family, "5b", "data.fps=16", buckets="9x64x96, 1x64x96"))
    assert "data.fps=16" in notes[0]
    assert FIXED_SIZE in notes[1]
    assert "9x64x96" in notes[1]
    assert model_notes(job_of(family, "1.5-5b", "data.fps=30", buckets="9x64x96")) == []
