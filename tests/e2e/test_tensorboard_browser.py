"""A run in TensorBoard's server and a real browser. The screenshots are kept for inspection."""

import itertools
import re
import sys
import time
import urllib.request
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.board import tensorboard
from tests.browser.chromium import Chromium
from tests.conftest import ROOT

pytestmark = pytest.mark.browser
SCREENSHOTS = ROOT / ".testdata/screenshots"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model, run_train):
    """The folder of a small run with everything that TensorBoard can show."""
    from tests.drawn import draw_clips

    folder = tmp_path_factory.mktemp("shown")
    draw_clips(folder / "clips")
    run_train(
        "--deepspeed", "ds_configs/zero2.json", f"model.path={tiny_model}", f"data.path={folder / 'clips'}",
        f"data.cache_dir={folder / 'cache'}", "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]",
        f"output_dir={folder / 'run'}", "train.num_steps=12", "train.precision=fp32", "data.num_workers=0",
        "lora.rank=4", "optimizer.lr=1e-2", "optimizer.warmup_steps=2", "metrics.norms_every=2",
        "metrics.show_clips=6", "metrics.show_batches=3", "eval.every=6", "eval.held_out=0.2", "eval.num_clips=2",
        ranks=1, launcher="warm",
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def address(run_folder):
    """The address of a TensorBoard server that has read the run."""
    words = ["--logdir", run_folder / "tensorboard", "--host", "127.0.0.1", "--load_fast=false"]
    with tensorboard(sys.executable, "-m", "tensorboard.main", *words) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def drawn(name):
    """Return the share of a screenshot that is not background."""
    pixels = np.asarray(Image.open(SCREENSHOTS / f"{name}.png").convert("RGB")).astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    return (np.abs(pixels - background).sum(axis=2) > 60).mean()


def test_the_first_tab_leads_with_the_losses(browser, address):
    browser.open(address)
    shown = browser.wait_for("/training", "/held-out clips").splitlines()
    groups = [text for text, following in itertools.pairwise(shown) if re.fullmatch(r"\d+ cards?", following)]
    browser.screenshot(SCREENSHOTS / "landing.png")
    assert groups[0] == "Loss"


def test_scalars(browser, address):
    wanted = quote("^(train/(loss|grad_norm)|perf/(step_s|tokens_per_s|data_wait))$")
    browser.open(f"{address}?tagFilter={wanted}#timeseries")
    browser.wait_for("/loss", "/grad_norm", "/step_s", "/tokens_per_s", "/data_wait")
    time.sleep(5)  # lines are animated
    browser.screenshot(SCREENSHOTS / "scalars.png")
    assert drawn("scalars") > 0.01


def test_custom_layout(browser, address):
    browser.open(f"{address}#custom_scalars")
    browser.wait_for("overview", "speed", "memory", "LoRA", "seconds per step")
    time.sleep(2)
    browser.screenshot(SCREENSHOTS / "custom_scalars.png")
    assert drawn("custom_scalars") > 0.01


def test_images_and_a_playing_video(browser, address):
    browser.open(f"{address}#images")
    browser.wait_for("data/buckets", "data/first_frames")
    images = 'deep(document).filter(node => node.tagName == "IMG" && node.naturalWidth > 8)'
    sources = browser.until(f"{images}.map(image => image.src)", lambda value: len(value) >= 3)
    browser.screenshot(SCREENSHOTS / "images.png")
    kinds = {urllib.request.urlopen(source, timeout=10).read()[:6] for source in sources}
    assert b"GIF89a" in kinds
    assert any(kind.startswith(b"\x89PNG") for kind in kinds)


def test_texts(browser, address):
    browser.open(f"{address}#text")
    browser.wait_for("config/run", "config/deepspeed")
    shown = browser.wait_for("output_dir", "train_micro_batch_size_per_gpu")
    assert "num_steps: 12" in shown
    browser.screenshot(SCREENSHOTS / "text.png")


def test_hyperparameters(browser, address):
    browser.open(f"{address}#hparams")
    browser.wait_for("optimizer.lr", "lora.rank", "train/loss")
    time.sleep(1)
    browser.screenshot(SCREENSHOTS / "hparams.png")
