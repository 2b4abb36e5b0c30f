import hashlib
import multiprocessing
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cogds.data.storage import access, requests
from cogds.data.storage.access import (
    Item,
    is_file,
    is_folder,
    list_folder,
    open_binary,
    read_bytes,
    read_range,
    remove,
    stamp,
    upload,
)
from cogds.errors import UserError

pytestmark = pytest.mark.usefixtures("short_delays")
DATA = random.Random(0).randbytes(300_000)


@pytest.fixture(params=["http", pytest.param("s3", marks=pytest.mark.slow)])
def stored(request, tmp_path):
    """`stored(name, data)` stores a file and returns its URL; `.proxy` of its server."""
    if request.param == "http":
        server = request.getfixturevalue("file_server")
        root = server.url
    else:
        server = request.getfixturevalue("s3")
        root = server.new_bucket()

    def store(name, data):
        path = (server.folder if request.param == "http" else tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if request.param == "s3":
            upload(path, f"{root}/{name}")
        return f"{root}/{name}"

    store.proxy, store.root, store.protocol = server.proxy, root, request.param
    return store


def test_reads_any_range(stored):
    url = stored("a/clip 1.mp4", DATA)
    assert read_bytes(url) == DATA
    generator = random.Random(1)
    for _ in range(10):
        start = generator.randrange(len(DATA))
        size = generator.randrange(len(DATA) - start) + 1
        assert read_range(url, start, size) == DATA[start : start + size]
    assert read_range(url, 5, 0) == b""


def test_large_files_are_read_by_blocks(stored, monkeypatch):
    url = stored("film.mp4", DATA)
    monkeypatch.setattr(access, "WHOLE_BYTES", 1000)
    sizes = []
    monkeypatch.setattr(access, "read_range", lambda *range_: sizes.append(range_[2]) or read_range(*range_))
    with open_binary(url, 4096) as file:
        file.seek(-10, 2)
        assert file.read() == DATA[-10:]
        file.seek(100_000)
        assert file.read(10) == DATA[100_000:100_010]
        assert file.read(10_000) == DATA[100_010:110_010]
        assert sum(sizes) < 20_000
        file.seek(0)
        sizes.clear()
        assert file.read() == DATA
    assert len(sizes) == 1


def test_stamp_changes_with_the_content(stored):
    url = stored("a.mp4", DATA)
    before = stamp(url)
    assert before.size == len(DATA)
    assert stamp(url) == before
    assert stored("a.mp4", DATA[::-1]) == url
    assert stamp(url).size == before.size
    assert stamp(url).version != before.version


def test_lists_folders(stored):
    for name in ("set/b 1&2.mp4", "set/a.mp4", "set/ä.txt", "set/50%.txt", "set/sub/c.mp4", "other.mp4"):
        stored(name, b"x")
    items = [
        Item("50%.txt", False),
        Item("a.mp4", False),
        Item("b 1&2.mp4", False),
        Item("sub", True),
        Item("ä.txt", False),
    ]
    if stored.protocol == "http":
        items[0] = Item("50%25.txt", False)  # as in a URL
    for folder in (f"{stored.root}/set", f"{stored.root}/set/"):
        assert list_folder(folder) == items
        assert is_folder(folder)
    assert all(read_bytes(f"{stored.root}/set/{item.name}") == b"x" for item in items if not item.is_folder)
    assert is_file(f"{stored.root}/set/a.mp4")
    assert not is_folder(f"{stored.root}/set/a.mp4")
    assert not is_file(f"{stored.root}/none")
    assert not is_folder(f"{stored.root}/none")
    with pytest.raises(FileNotFoundError):
        list_folder(f"{stored.root}/none")


@pytest.mark.parametrize("link", ["a%20b.mp4", "./a%20b.mp4", "/my%20clips%20%231/a%20b.mp4"])
def test_a_page_may_quote_its_links_in_another_way(file_server, link):
    folder = file_server.folder / "my clips #1"
    folder.mkdir()
    (folder / "index.html").write_text(f'<a href="?C=N;O=D">Name</a> <a href="../">up</a> <a href="{link}">a b.mp4</a>')
    for name in ("my clips #1", "my%20clips%20%231"):
        assert list_folder(f"{file_server.url}/{name}") == [Item("a b.mp4", False)]


def test_missing_files_are_not_retried(stored):
    before_s = time.monotonic()
    for read in (stamp, read_bytes, lambda url: read_range(url, 0, 10)):
        with pytest.raises(FileNotFoundError):
            read(f"{stored.root}/none.mp4")
    assert time.monotonic() - before_s < 10


@pytest.mark.usefixtures("gives_up")
def test_a_range_outside_of_the_file(stored):
    url = stored("a.mp4", DATA)
    for start in (len(DATA) - 5, len(DATA) + 5):
        with pytest.raises(OSError, match=r"bytes|range|416"):
            read_range(url, start, 10)


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"cut_after": 0}, {"cut_after": 5000}], ids=str)
def test_faults_of_a_server_are_retried(stored, fault):
    url = stored("a.mp4", DATA)
    stored.proxy.fail(3, **fault)
    assert read_bytes(url) == DATA
    assert stored.proxy.num_faults == 0
    stored.proxy.fail(2, **fault)
    assert read_range(url, 1000, 200_000) == DATA[1000:201_000]
    stored.proxy.fail(2, **fault)
    assert is_file(url)
    stored.proxy.fail(2, **fault)
    assert list_folder(stored.root) == [Item("a.mp4", False)]


def test_a_server_that_restarts(stored):
    url = stored("a.mp4", DATA)
    assert read_range(url, 0, 10) == DATA[:10]
    stored.proxy.stop()
    with ThreadPoolExecutor() as threads:
        reading = threads.submit(read_bytes, url)
        time.sleep(0.3)
        assert not reading.done()
        stored.proxy.start()
        assert reading.result(20) == DATA


@pytest.mark.usefixtures("gives_up")
@pytest.mark.parametrize("fault", [{"status": 500}, {"cut_after": 3000}], ids=str)
def test_gives_up_in_the_end(stored, fault):
    url = stored("a.mp4", DATA)
    stored.proxy.fail(10**6, **fault)
    for read in (read_bytes, is_file, is_folder, list_folder):
        before_s = time.monotonic()
        with pytest.raises(OSError, match=r"attempts in \d s") as raised:
            read(url)
        assert not isinstance(raised.value, FileNotFoundError)
        assert time.monotonic() - before_s < 10
        if fault.get("cut_after"):
            return  # the answers to the others are short


@pytest.mark.usefixtures("gives_up")
def test_a_server_that_is_down(stored):
    url = stored("a.mp4", DATA)
    stored.proxy.stop()
    with pytest.raises(OSError, match=r"attempts in \d s"):
        is_file(url)
    stored.proxy.start()


@pytest.mark.usefixtures("gives_up")
def test_a_server_that_hangs(stored):
    url = stored("a.mp4", DATA)
    assert read_range(url, 0, 10) == DATA[:10]
    stored.proxy.is_hanging = True
    before_s = time.monotonic()
    with pytest.raises(OSError, match=r"no answer within 0\.5 s"):
        requests.request(url, "cat_file", start=0, end=10, timeout_s=0.5)
    assert time.monotonic() - before_s < 10
    stored.proxy.is_hanging = False
    assert read_bytes(url) == DATA


def test_a_slow_server(stored):
    url = stored("a.mp4", DATA)
    stored.proxy.bytes_per_s = 1_000_000
    assert read_bytes(url) == DATA


@pytest.mark.parametrize("status", [401, 403])
def test_denied_access_is_not_retried(stored, status):
    url = stored("a.mp4", DATA)
    stored.proxy.fail(10**6, status=status)
    before_s = time.monotonic()
    with pytest.raises(PermissionError):
        stamp(url)
    assert time.monotonic() - before_s < 10


def test_a_server_without_ranges(file_server):
    (file_server.folder / "a.mp4").write_bytes(DATA)
    file_server.ignores_ranges = True
    url = f"{file_server.url}/a.mp4"
    assert read_bytes(url) == DATA  # the whole file was asked for
    file_server.requests.clear()
    for start in (0, 10):
        with pytest.raises(OSError, match="ignores byte ranges"):
            read_range(url, start, 10)


def _digest(url):
    return hashlib.sha256(read_bytes(url)).hexdigest()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read(stored, method):
    url = stored("a.mp4", DATA)
    assert read_bytes(url) == DATA  # connections are open, and a thread of fsspec runs
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(_digest, [url] * 4).get(60) == [hashlib.sha256(DATA).hexdigest()] * 4


def test_threads_share_connections(file_server):
    (file_server.folder / "a.mp4").write_bytes(DATA)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read_bytes, [f"{file_server.url}/a.mp4"] * 20)) == [DATA] * 20
    assert file_server.proxy.num_connections <= 8


def test_unknown_protocols_and_missing_libraries(monkeypatch):
    with pytest.raises(UserError, match=r"^nope://a/b: .*Use a protocol"):
        stamp("nope://a/b")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"^gs://a/b: .*pip install 'cogds\[gcs\]'"):
        stamp("gs://a/b")


def test_upload_and_remove(s3, tmp_path):
    path, url = tmp_path / "a.bin", f"{s3.new_bucket()}/sub/a.bin"
    path.write_bytes(DATA)
    for fault in ({"status": 500}, {"cut_after": 0}):
        s3.proxy.fail(2, **fault)
        upload(path, url)
        assert read_bytes(url) == DATA
        remove(url)
        assert not is_file(url)
        remove(url)


def test_uploads_to_other_stores_are_complete_or_absent(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    upload(path, "memory://folder/a.bin")
    assert read_bytes("memory://folder/a.bin") == DATA
    assert list_folder("memory://folder") == [Item("a.bin", False)]
    remove("memory://folder/a.bin")


def test_options_of_the_user_are_kept(monkeypatch):
    pytest.importorskip("s3fs")
    import fsspec

    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "config_kwargs": {"s3": {"addressing_style": "path"}}})
    requests._make_system.cache_clear()
    system, _ = requests.file_system("s3://bucket/a")
    requests._make_system.cache_clear()
    assert system.anon
    assert system.config_kwargs["s3"] == {"addressing_style": "path"}
    assert system.config_kwargs["connect_timeout"] == requests.CONNECT_TIMEOUT_S


def test_a_subfolder_with_the_name_of_its_folder(s3, tmp_path):
    """It is no less a folder than the empty object that some tools make for a folder, which is not in it."""
    root = s3.new_bucket()
    (tmp_path / "a").write_text("x")
    for name in ("clips/clips/a.mp4", "clips/b.mp4"):
        upload(tmp_path / "a", f"{root}/{name}")
    s3.make_folder(root, "clips/")
    assert list_folder(f"{root}/clips") == [Item("b.mp4", False), Item("clips", True)]
    assert list_folder(f"{root}/clips/clips") == [Item("a.mp4", False)]
