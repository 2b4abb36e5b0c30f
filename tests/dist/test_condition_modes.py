"""Runs with several condition modes: they resume bitwise, on other ranks too, and need no cache."""

import pytest

from tests.dist.conftest import losses
from tests.dist.test_resume import check_resuming

pytestmark = [pytest.mark.dist, pytest.mark.slow]
# Frames 4 and 8 of clips with 9 or 17 frames at 16 frames/s.
MIXED = (
    "conditioning.modes={first: 0.2, first_last: 0.2, prefix: 0.2, suffix: 0.2, keyframes: 0.1, none: 0.1}",
    "conditioning.keyframe_times=[0.25, 0.5]",
)
ONE_BUCKET = (*MIXED, "data.buckets=[9x64x64]", "data.max_unusable=1")


def test_a_resumed_run_equals_the_uninterrupted_run(train_once, workshop):
    check_resuming(train_once, workshop, "mixed-modes", "zero2", *MIXED)
    assert losses(workshop / "mixed-modes") != losses(train_once("zero2", "zero2"))


def test_one_rank_trains_what_two_train(train_once):
    two = train_once("mixed-modes-2", "zero2", *ONE_BUCKET, "train.gradient_accumulation_steps=1")
    one = train_once("mixed-modes-1", "zero3", *ONE_BUCKET, "train.gradient_accumulation_steps=2", ranks=1)
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)


def test_clips_encoded_on_the_fly_give_the_same_losses(train_once):
    cached = train_once("mixed-modes", "zero2", *MIXED)
    assert losses(train_once("mixed-modes-fly", "zero2", *MIXED, "data.encode=on_the_fly")) == losses(cached)
