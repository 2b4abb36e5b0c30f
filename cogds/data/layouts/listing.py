"""What a listing has found besides entries: counts, and files that may be the list that the user meant."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NUM_NAMES = 5
_NO_SUFFIX = "file without a suffix"
_NUM_REASONS = 100  # names like a.1, a.2, ... could make a reason for every file


def is_other_file(reason: str) -> bool:
    """Whether a reason of `Listing.skipped` is that of files that are neither clips nor captions."""
    return reason == _NO_SUFFIX or (reason.startswith(".") and reason.endswith(" file"))


@dataclass
class Listing:
    """The counts of a listing, or of a part of it.

    Attributes:
        num_entries: number of entries.
        num_captioned: number of entries with a caption.
        lists: some lists that were read.
        tars: some tar files that were read.
        tables: some tables that were found and not read.
        skipped: what is not in the entries: reason (a noun, such as `.md file`) -> number.
    """

    num_entries: int = 0
    num_captioned: int = 0
    lists: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def skip_file(self, suffix: str) -> None:
        """Count a file that is neither a clip nor the caption of one. suffix: with its dot, or ""."""
        self.skip(f"{suffix} file" if suffix else _NO_SUFFIX)

    def skip(self, reason: str, number: int = 1) -> None:
        """Count something that is not in the entries."""
        if not number:
            return
        if reason not in self.skipped and len(self.skipped) >= _NUM_REASONS:
            reason = "other file"
        self.skipped[reason] += number

    def add(self, other: "Listing") -> None:
        """Add the counts of another part."""
        self.num_entries += other.num_entries
        self.num_captioned += other.num_captioned
        add_names(self.lists, other.lists)
        add_names(self.tars, other.tars)
        add_names(self.tables, other.tables)
        for reason, number in other.skipped.items():
            self.skip(reason, number)


def add_names(names: list[str], more: Iterable[str]) -> None:
    """Add names to a list that keeps only the first few."""
    names += list(more)[: NUM_NAMES - len(names)] if len(names) < NUM_NAMES else []
