"""Captions from an endpoint that answers, fails, hangs, or is something else."""

import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from cogds.errors import UserError
from cogds.prepare import captions
from cogds.prepare.captions import Captioner, CaptionError, CaptionOptions, CaptionTask, read_pictures
from tests.prepare.endpoint import HANG, error, reply, serve
from tests.prepare.films import write_film


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Retry at once."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.002)


def ask(endpoint, pictures=("data:image/jpeg;base64,AAAA",), **options):
    return Captioner(CaptionOptions(endpoint.url, "stub", **options)).caption(pictures)


def test_a_request_holds_prompt_model_and_pictures():
    with serve(reply("  A red car\nturns left. ")) as endpoint:
        pictures = ["data:image/jpeg;base64,AAAA", "data:image/jpeg;base64,BBBB"]
        assert ask(endpoint, pictures, prompt="Describe.", api_key="secret") == "A red car turns left."
    (body,) = endpoint.requests
    assert body["model"] == "stub"
    text, *images = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "Describe."}
    assert [image["image_url"]["url"] for image in images] == pictures
    assert endpoint.keys == ["Bearer secret"]


@pytest.mark.parametrize("status", [500, 429, 503])
def test_passing_errors_are_retried(status):
    with serve(lambda number: error(status) if number < 3 else reply("A car.")) as endpoint:
        assert ask(endpoint) == "A car."
    assert len(endpoint.requests) == 4


def test_lasting_errors_fail_the_scene():
    with serve(error(500, "out of order")) as endpoint, pytest.raises(CaptionError, match="out of order"):
        ask(endpoint)
    assert len(endpoint.requests) == 1 + captions.NUM_RETRIES


def test_a_hanging_request_ends_after_its_time_limit(monkeypatch):
    monkeypatch.setattr(captions, "NUM_RETRIES", 1)
    with serve(HANG) as endpoint:
        started_s = time.monotonic()
        with pytest.raises(CaptionError, match="timed out"):
            ask(endpoint, timeout_s=0.3)
        assert time.monotonic() - started_s < 5
    with serve(lambda number: HANG if number == 0 else reply("A car.")) as endpoint:
        assert ask(endpoint, timeout_s=0.3) == "A car."


@pytest.mark.parametrize(
    "answer, key",
    [(error(401, "bad key"), "--caption-url"), (error(403), "--caption-url"), (error(404), "--caption-model")],
)
def test_errors_of_all_requests_name_the_flag(answer, key):
    with serve(answer) as endpoint, pytest.raises(UserError, match=f"^{key}: ") as raised:
        ask(endpoint, api_key="secret")
    assert "secret" not in str(raised.value)


def test_a_missing_endpoint_fails_the_scene():
    with serve(reply("")) as endpoint:
        pass
    with pytest.raises(CaptionError, match="onnection"):
        ask(endpoint)


@pytest.mark.parametrize(
    "answer, reason",
    [
        (reply(""), "empty"),
        (reply("<think>hm</think> "), "empty"),
        (reply("A car that", finish_reason="length"), "longer"),
        ((200, "<html>It works!</html>"), "not one of a chat model"),
        ((200, {"object": "list"}), "empty"),
        (error(400, "at most 4 images"), "at most 4 images"),
    ],
)
def test_what_is_no_caption_is_not_used(answer, reason):
    with serve(answer) as endpoint, pytest.raises(CaptionError, match=reason):
        ask(endpoint)


def test_thoughts_are_not_part_of_a_caption():
    with serve(reply("<think>A car?\nYes.</think>\nA car.")) as endpoint:
        assert ask(endpoint) == "A car."


def test_pictures_are_the_frames_at_the_times(tmp_path):
    film = write_film(tmp_path / "film.mp4", [25, 25])
    urls = read_pictures(CaptionTask(str(film), (0.5, 1.5)))
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]
    assert [picture.format for picture in pictures] == ["JPEG", "JPEG"]
    assert [max(picture.size) for picture in pictures] == [captions.PICTURE_SIDE] * 2
    first, second = (np.asarray(picture.resize((160, 96)), np.float64)[20:] for picture in pictures)
    assert np.abs(first - second).mean() > 20  # of different scenes
    Image.new("RGB", (64, 32), "red").save(tmp_path / "a.png")
    (url,) = read_pictures(CaptionTask(str(tmp_path / "a.png"), ()))
    assert url.startswith("data:image/jpeg;base64,")
