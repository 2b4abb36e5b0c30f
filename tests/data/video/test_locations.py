"""Clips and images behind URLs and in tar files: the same pixels as in files."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.manifest.scan import scan_file
from cogds.data.storage import requests
from cogds.data.storage.tars import list_members
from cogds.data.video.media import DecodeError, probe_image, probe_video, read_clip, read_image, write_video
from cogds.data.video.probe_task import ProbeTask
from tests.servers import FileServer

SHAPE = ClipShape(5, 32, 48)


@pytest.fixture
def folder(tmp_path):
    """A folder with a clip, an image, a WebP animation, and a tar file of them."""
    rng = np.random.default_rng(0)
    frames = np.cumsum(rng.integers(0, 3, (20, 48, 64, 3)), 0).astype(np.uint8)
    write_video(tmp_path / "a.mp4", frames, 10)
    Image.fromarray(frames[0]).save(tmp_path / "b.png")
    images = [Image.fromarray(frame) for frame in frames[:10]]
    images[0].save(tmp_path / "c.webp", save_all=True, append_images=images[1:], duration=100, lossless=True)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("a.mp4", "b.png", "c.webp"):
            tar.add(tmp_path / name, name)
    return tmp_path


@pytest.fixture(params=["url", "tar", "tar behind a url", pytest.param("large files", marks=pytest.mark.slow)])
def locate(request, folder, monkeypatch):
    """`locate(name)`: the location of a file of the folder."""
    if request.param == "tar":
        tar = str(folder / "all.tar")
    else:
        server = request.getfixturevalue("server")
        if request.param == "large files":  # they are read in blocks
            monkeypatch.setattr("cogds.data.storage.access.WHOLE_BYTES", 1000)
            monkeypatch.setattr("cogds.data.storage.access.BLOCK_BYTES", 4096)
        if request.param != "tar behind a url":
            return lambda name: f"{server.url}/{name}"
        tar = f"{server.url}/all.tar"
    members = {member.name: member.location for member, _ in list_members(tar)}
    return members.__getitem__


@pytest.fixture
def server(folder):
    server = FileServer(folder)
    yield server
    server.close()


def test_any_location_gives_the_pixels_of_the_file(folder, locate):
    for probe, name in ((probe_video, "a.mp4"), (probe_image, "b.png"), (probe_image, "c.webp")):
        assert probe(locate(name)) == probe(folder / name)
    for name in ("a.mp4", "c.webp"):
        for start_s in (0.0, 0.4):
            np.testing.assert_array_equal(
                read_clip(locate(name), SHAPE, 10, start_s), read_clip(folder / name, SHAPE, 10, start_s)
            )
    np.testing.assert_array_equal(read_image(locate("b.png"), 32, 48), read_image(folder / "b.png", 32, 48))
    digests = [scan_file(ProbeTask("video", str(path)))["digest"] for path in (locate("a.mp4"), folder / "a.mp4")]
    assert digests[0] == digests[1]


def test_missing_files_and_decord(folder, server):
    with pytest.raises(DecodeError, match="does not exist"):
        probe_video(f"{server.url}/none.mp4")
    with pytest.raises(DecodeError, match="Set data"):
        read_clip(f"{server.url}/a.mp4", SHAPE, 10, decoder="decord")
    (folder / "empty.mp4").touch()
    with pytest.raises(DecodeError, match="empty"):
        probe_video(f"{server.url}/empty.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "b.png"])
def test_a_server_that_fails_is_not_damage(server, name, monkeypatch):
    """So that the file is opened again by a later run."""
    monkeypatch.setattr(requests, "GIVE_UP_S", 0.2)
    server.status = 503
    kind = "video" if name == "a.mp4" else "image"
    result = scan_file(ProbeTask(kind, f"{server.url}/{name}"))
    assert "size" not in result
    assert "503" in result["reason"]
    monkeypatch.setattr(requests, "GIVE_UP_S", 60)
    server.status = None
    server.proxy.fail(2, cut_after=100)
    assert scan_file(ProbeTask(kind, f"{server.url}/{name}"))["digest"]
