"""Scans in one process, and helpers that look at their results."""

import json
from collections.abc import Sequence
from pathlib import Path

from cogds.data.manifest.scan import choose_files, finish_scan, list_share, scan_share, start_scan
from cogds.data.manifest.scan_state import Scan
from cogds.data.manifest.table import DataSet, read_manifest


def scan_sets(sets: Sequence[DataSet], file: Path, num_workers: int = 0, **options: object) -> list[dict]:
    """Scan the datasets in one process and return the manifest's rows. options: of `start_scan`."""
    scan = listed(sets, file, **options)
    scan_share(scan, (0, 1), num_workers)
    finish_scan(scan)
    return read_manifest(file).to_pylist()


def listed(
    sets: Sequence[DataSet],
    file: Path,
    num_ranks: int = 1,
    *,
    default_caption: str | None = None,
    retry_failed: bool = False,
    with_controls: bool = True,
) -> Scan:
    """The steps of a scan before files are opened, with several ranks one after the other."""
    scan = start_scan(sets, file, default_caption)
    listings = [list_share(scan, (rank, num_ranks)) for rank in range(num_ranks)]
    return choose_files(scan, listings, retry_failed, with_controls=with_controls)


def scan_folder(folder: Path, file: Path, **options: object) -> list[dict]:
    return scan_sets([DataSet(str(folder))], file, **options)


def rows_of_list(tmp_path: Path, file: Path, lines: list[dict]) -> list[dict]:
    """Write a list of clips and scan it."""
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps({"text": "x"} | line) for line in lines))
    return scan_folder(tmp_path / "l.jsonl", file)


def names_of(rows: list[dict], status: str) -> list[str]:
    return [Path(row["path"]).name for row in rows if row["status"] == status]


def names_beside(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if path != file)
