"""Members of tar files, by byte range: nothing is unpacked."""

import io
import tarfile
from collections.abc import Callable, Iterator

from cogds.data.storage.access import open_binary
from cogds.data.storage.location import Member

# Between two headers is a whole clip, so larger reads would be wasted.
_HEADER_BLOCK_BYTES = 1 << 16


class TarError(Exception):
    """A tar file cannot be read. The message is a clause that says why."""


def list_members(
    tar: str, is_read: Callable[[str], bool] = lambda _: False, on_link: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[Member, bytes | None]]:
    """Yield the files in a tar file, in its order, by reading only their headers.

    is_read: whether the content of a file of this name is read, too; otherwise it is None. on_link: called with the
    name of each hard or symbolic link, which is not in the result.

    Raises TarError if the file is compressed, damaged or cut short, and OSError if it cannot be read.
    """
    with open_binary(tar, _HEADER_BLOCK_BYTES) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        end, name = 0, ""
        try:
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for info in opened:
                    opened.members = []  # type: ignore[attr-defined]  # it would keep every member
                    if info.islnk() or info.issym():
                        on_link(info.name)
                    if not info.isreg():
                        continue
                    if info.issparse():
                        raise TarError(f"its member {info.name} is sparse, which is not supported. Pack it again.")
                    if info.offset_data + info.size > size:
                        raise TarError(f"it is cut short in its member {info.name}. Copy it again.")
                    name, content = info.name.removeprefix("./"), None
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if is_read(name):
                        file.seek(info.offset_data)
                        content = file.read(info.size)
                    yield Member(tar, name, info.offset_data, info.size), content
        except tarfile.TarError as error:
            raise TarError(f"it cannot be read as an uncompressed tar file ({error}). Pack it again.") from None
        if end >= size:  # a complete file ends with blocks of zeros
            raise TarError(f"it is cut short{f' after its member {name}' if name else ''}. Copy it again.")
