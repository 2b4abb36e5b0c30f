import io
import tarfile

import pytest

from cogds.data.storage import tars
from cogds.data.storage.access import open_binary, read_bytes, stamp, upload
from cogds.data.storage.location import parse_member
from cogds.data.storage.tars import TarError, list_members

FILES = {"a.mp4": b"video" * 50_000, "a.txt": b"a caption", "sub/b@1+2.mp4": b"more" * 10_000, "empty.txt": b""}


def write_tar(path, mode="w"):
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(params=["local", "http", "s3"])
def tar(request, tmp_path):
    """`tar(mode)`: the location of a tar file."""

    def store(mode="w"):
        if request.param == "http":
            server = request.getfixturevalue("file_server")
            write_tar(server.folder / "a.tar", mode)
            return f"{server.url}/a.tar"
        write_tar(tmp_path / "a.tar", mode)
        if request.param == "local":
            return str(tmp_path / "a.tar")
        url = f"{request.getfixturevalue('s3').new_bucket()}/a.tar"
        upload(tmp_path / "a.tar", url)
        return url

    return store


def test_members_are_read_by_range(tar):
    location = tar()
    members = [member for member, _ in list_members(location)]
    assert {member.name: read_bytes(member.location) for member in members} == FILES
    for member in members:
        assert parse_member(member.location) == member
        assert stamp(member.location) == (len(FILES[member.name]), stamp(location).version)
        with open_binary(member.location) as file:
            file.seek(3)
            assert file.read(5) == FILES[member.name][3:8]


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
def test_a_place_in_a_former_tar_file_is_recognized(tmp_path, monkeypatch, whole_bytes):
    """Another clip of the same size may be there now, which a table with the place must not train."""
    monkeypatch.setattr("cogds.data.storage.access.WHOLE_BYTES", whole_bytes)
    for names in (("a.mp4", "b.mp4"), ("b.mp4", "a.mp4")):
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 5
                archive.addfile(info, io.BytesIO(name.encode()))
        places = [member.location for member, _ in list_members(str(tmp_path / "a.tar"))]
        assert [read_bytes(place) for place in places] == [name.encode() for name in names]
        if names[0] == "a.mp4":
            former = places
    for place in former:
        with pytest.raises(OSError, match="the tar file has changed"):
            read_bytes(place)


def test_headers_are_found_without_reading_the_data(file_server, monkeypatch):
    monkeypatch.setattr("cogds.data.storage.access.WHOLE_BYTES", 1000)
    monkeypatch.setattr(tars, "_HEADER_BLOCK_BYTES", 1024)
    write_tar(file_server.folder / "a.tar")
    assert [member.name for member, _ in list_members(f"{file_server.url}/a.tar")] == list(FILES)
    assert sum(size for _, size in file_server.requests) < 20_000


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_compressed_tars_are_refused(tar, mode):
    with pytest.raises(TarError, match="uncompressed"):
        list(list_members(tar(mode)))


def test_tars_that_are_cut_short(tmp_path):
    write_tar(tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:100_000])
    with pytest.raises(TarError, match="cut short"):
        list(list_members(str(tmp_path / "cut.tar")))
    end = next(member.offset + member.size for member, _ in list_members(str(tmp_path / "a.tar")))
    (tmp_path / "cut.tar").write_bytes(whole[: -(-end // 512) * 512])  # nothing but the end is missing
    with pytest.raises(TarError, match="cut short after its member"):
        list(list_members(str(tmp_path / "cut.tar")))
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(TarError):
        list(list_members(str(tmp_path / "empty.tar")))


def test_contents_of_small_members_are_read_on_the_way(tar):
    contents = {member.name: content for member, content in list_members(tar(), lambda name: name.endswith(".txt"))}
    assert contents == {name: data if name.endswith(".txt") else None for name, data in FILES.items()}
