"""Members of tar files, by byte range: nothing is unpacked."""

import tarfile
from collections.abc import Iterator

from cogds.data.storage.access import open_binary
from cogds.data.storage.location import Member

# Between two headers is a whole clip, so larger reads would be wasted.
_HEADER_BLOCK_BYTES = 1 << 16


class TarError(Exception):
    """A tar file cannot be read. The message is a clause that says why."""


def list_members(tar: str) -> Iterator[Member]:
    """Yield the files in a tar file, in its order, by reading only their headers.

    Raises TarError if the file is compressed, damaged or cut short, and OSError if it cannot be read.
    """
    with open_binary(tar, _HEADER_BLOCK_BYTES) as file:
        size = file.seek(0, 2)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as opened:
                for member in opened:
                    opened.members = []  # type: ignore[attr-defined]  # it would keep every member
                    if not member.isreg():
                        continue
                    if member.issparse():
                        raise TarError(f"its member {member.name} is sparse, which is not supported: pack it again")
                    if member.offset_data + member.size > size:
                        raise TarError(f"it is cut short in its member {member.name}")
                    yield Member(tar, member.name, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise TarError(f"it cannot be read as an uncompressed tar file: {error}") from None
