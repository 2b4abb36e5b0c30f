"""The gallery in a real browser, from a file and without a network: videos play, and only those that are visible."""

import pytest

from cogds.cli import call
from tests.browser.chromium import Chromium
from tests.conftest import ROOT
from tests.test_gallery import make_run

pytestmark = pytest.mark.browser
SCREENSHOTS = ROOT / ".testdata/screenshots"
PLAYING = '[...document.querySelectorAll("video")].filter(video => !video.paused && video.videoWidth).length'
LOADED = '[...document.querySelectorAll("video")].filter(video => video.hasAttribute("src")).length'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery") / "my run"
    folder.mkdir()
    return make_run(folder, steps=(0, *range(5, 105, 5)))


@pytest.fixture(scope="module", params=["beside", "embedded"])
def browser(tmp_path_factory, run, request):
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "page.html" if request.param == "embedded" else run / "gallery.html"
    call("gallery", [str(run), "--output", str(page), *(["--embed"] if request.param == "embedded" else [])])
    with Chromium(folder) as browser:
        browser.open(page.as_uri())
        yield browser


def test_visible_videos_play_and_others_are_not_loaded(browser):
    browser.until('document.querySelectorAll("video").length', lambda num: num == 2 * 21)
    playing = browser.until(PLAYING, lambda num: num >= 4)
    assert playing <= browser.run(LOADED) < 20
    times = '[...document.querySelectorAll("video[src]")].map(video => video.currentTime)'
    first = browser.run(times)
    browser.until(times, lambda later: later != first)
    browser.screenshot(SCREENSHOTS / "gallery.png")
    # Those that come into view are loaded, and those that leave are not kept.
    browser.run('document.querySelector(".matrix").scrollLeft = 1e6')
    last = '[...document.querySelectorAll("tr:first-child video")].at(-1)'
    browser.until(f"{last}.currentTime > 0", bool)
    assert browser.run(LOADED) < 20


def test_pictures_and_the_curve_are_drawn(browser):
    browser.until("[...document.images].every(image => image.naturalWidth == 48)", bool)
    assert browser.run('document.querySelector(".curve svg").getBoundingClientRect().width') > 600
    assert "held-out loss 1.2500" in browser.wait_for("Gallery", "base model", "step 5")


def test_pause_stops_all_videos(browser):
    browser.until(PLAYING, bool)
    browser.run('document.getElementById("pause").click()')
    browser.until(PLAYING, lambda num: num == 0)
    browser.run('document.getElementById("pause").click()')
    browser.until(PLAYING, bool)
