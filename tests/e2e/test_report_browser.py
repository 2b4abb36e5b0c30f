"""The report in a real browser: it renders, requests nothing, and shows user input as text."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from cogds.core.checkpointing import BlockCheckpointing
from cogds.report.analysis import Rates
from cogds.report.html import write_html
from tests.browser.chromium import Chromium
from tests.report.test_report import EVIL, ROWS, clip_list, report, table

pytestmark = pytest.mark.browser
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(file, folder, *flags):
    """Open a page with a new profile and no host resolution. Returns stdout."""
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--no-first-run", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def frames(requests):
    """Color gradients, so that a rendered image can be recognized."""
    for *_, height, width in requests:
        y, x = np.mgrid[:height, :width]
        yield np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 160)], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [*ROWS, *((f"/clips/{name}", 81, 768, 1360, 1, None) for name in EVIL)]
    rows += [(f"/clips/{name}", None, None, None, -1, f"{name}: {name}") for name in EVIL]
    write_html(folder / "report.html", report(rows), table(rows), clip_list(table(rows)), frames, name=EVIL[0])
    return folder / "report.html"


def image_sizes(dom):
    """Return the size of each image and plot in the browser, by alt text."""
    return {alt: (int(width), int(height)) for alt, width, height in re.findall(r"size:(.*?)\|(\d+)x(\d+);", dom)}


def test_nothing_is_requested_and_nothing_runs(page, tmp_path):
    log = tmp_path / "net.json"
    dom = browse(page, tmp_path, "--dump-dom", f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    addresses = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    events = json.loads(log.read_text())["events"]
    assert events
    # The browser itself asks for its update and account hosts, which do not resolve either. Ignore those.
    own = re.compile(r"https?://[\w.-]*(google(apis)?\.com|gvt1\.com|gstatic\.com|android\.com)[:/]")
    local = ("file:", "data:", "chrome", "about:", "devtools:")
    assert [address for address in addresses if not address.startswith(local) and not own.match(address)] == []
    assert "<script" not in dom
    assert '<img src="x"' not in dom
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in dom
    assert dom.count("<svg ") == 4


def test_a_page_that_requests_something_is_detected(tmp_path):
    """The log of the test above has the requests of a page with a remote image and no policy."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://example.invalid/x.png'>")
    log = tmp_path / "net.json"
    browse(bad, tmp_path, "--dump-dom", f"--log-net-log={log}", "--net-log-capture-mode=Everything")
    assert "example.invalid" in log.read_text()


def test_images_and_plots_have_a_size(page, tmp_path):
    """A script in a copy without the policy writes the sizes that the browser decoded and laid out."""
    copy = tmp_path / "copy.html"
    probe = """<script>addEventListener("load", () => { let out = "";
        for (const i of document.images) out += `size:${i.alt.slice(0, 200)}|${i.naturalWidth}x${i.naturalHeight};`;
        for (const s of document.querySelectorAll("svg[role=img]")) { const b = s.getBoundingClientRect();
            const name = s.getAttribute("aria-label").slice(0, 30);
            out += `size:${name}|${Math.round(b.width)}x${Math.round(b.height)};`; }
        document.body.append(out); });</script></body>"""
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    copy.write_text(text.replace("</body>", probe))
    sizes = image_sizes(browse(copy, tmp_path, "--dump-dom", "--window-size=1280,900"))
    plots = {name: size for name, size in sizes.items() if not name.startswith("First frame")}
    pictures = [size for name, size in sizes.items() if name.startswith("First frame")]
    assert len(plots) == 4
    assert len(pictures) == 9  # the clips whose size is known
    assert all(max(size) == 260 for size in pictures)
    assert all(min(size) > 100 for size in plots.values())


@pytest.mark.parametrize("width", [1280, 480])
def test_the_page_is_rendered(page, tmp_path, width):
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, f"--screenshot={shot}", f"--window-size={width},5200")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    background = pixels[2, 2]
    drawn = (np.abs(pixels - background).sum(axis=2) > 60).mean()
    assert 0.02 < drawn < 0.6
    # Orange for crops, buckets and kept activations, blue for clips.
    for color in ((224, 129, 43), (59, 130, 196)):
        assert (np.abs(pixels - color).sum(axis=2) < 40).sum() > 300


@pytest.mark.parametrize("width", [1440, 1280])
def test_the_table_of_buckets_fits(tmp_path, width):
    """With the longest texts that it has."""
    split, rates = (BlockCheckpointing("selective", 10, 42),) * 3, Rates(1000.0, {}, "metrics.jsonl")
    rows = [(f"/clips/{n}.mp4", 162, 1080, 1920, 1, None) for n in range(1234)]
    result = report(rows, checkpointing=split, rates=rates, gpu_bytes=24e9)
    write_html(tmp_path / "report.html", result, table(rows), clip_list(table(rows[:1])), frames)
    with Chromium(tmp_path, size=(width, 900)) as browser:
        browser.open((tmp_path / "report.html").as_uri())
        browser.wait_for("time/step")
        assert browser.run('[...document.querySelectorAll(".scroll")].every(n => n.scrollWidth <= n.clientWidth)')


def test_pages_of_clips_are_linked(tmp_path):
    rows = [(f"/clips/{n:03}.mp4", 81, 768, 1360, 1, None) for n in range(130)]
    write_html(tmp_path / "my report.html", report(rows), table(rows), clip_list(table(rows)), frames)
    with Chromium(tmp_path) as browser:
        browser.open((tmp_path / "my report.html").as_uri())
        browser.wait_for("/clips/000.mp4")
        for number, name in ((2, "/clips/060.mp4"), (3, "/clips/120.mp4")):
            browser.run("document.querySelector('a[rel=next]').click()")
            assert f"page {number} of 3" in browser.wait_for(name, "Dataset report")
        assert browser.run("[...document.images].filter(image => image.naturalWidth == 260).length") > 0
        browser.run("document.querySelector('nav a').click()")
        browser.wait_for("/clips/000.mp4", "GPU memory")
