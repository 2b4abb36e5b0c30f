"""What the config says about one dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataSet:
    """A folder, list or table of clips.

    Attributes:
        path: location of the folder or list.
        columns: our column names -> the table's (`columns.USUAL_NAMES` if not given); None: not to be used.
        root: folder that relative paths are relative to; None: the list's folder.
        path_template: the path of a row, with columns in braces: `{vid}.mp4`.
        where: filter on the rows (`where.Where`).
    """

    path: str
    columns: Mapping[str, str | None] = field(default_factory=dict)
    root: str | None = None
    path_template: str | None = None
    where: str | None = None
