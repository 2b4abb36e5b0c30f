"""What the tests of the manifest share: a survey in one process, and what it leaves."""

import json
from pathlib import Path

from cogds.data.manifest import scan as inventory
from cogds.data.manifest import table as manifest
from cogds.data.manifest.table import DataSet


def survey(folder: Path, file: Path, **options: object) -> list[dict]:
    inventory.update([DataSet(str(folder))], file, 0, **options)  # type: ignore[arg-type]
    return manifest.read(file).to_pylist()


def rows_of_list(tmp_path: Path, file: Path, lines: list[dict]) -> list[dict]:
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps({"text": "x"} | line) for line in lines))
    return survey(tmp_path / "l.jsonl", file)


def names_of(rows: list[dict], status: str) -> list[str]:
    return [Path(row["path"]).name for row in rows if row["status"] == status]


def leftovers(file: Path) -> list[str]:
    return sorted(one.name for one in file.parent.iterdir() if one != file)
