"""JSON that is read piece by piece: the same values as by the json module, and the line of an error."""

import json
from pathlib import Path

import pytest

from cogds.data.layouts import text_tables
from cogds.data.layouts.text_tables import read_json
from cogds.errors import UserError

ROWS = [
    {"a": 'x "quoted" \\ [{]}', "b": -1.5e-7, "c": [1, {"d": None}], "é": "\u2028 😀 \ud83d\ude00"},
    {},
    {"t": True, "n": float("inf"), "long": "y" * 100},
]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("style", [{}, {"indent": 1}, {"ensure_ascii": False, "separators": (",", ":")}])
def test_values_are_those_of_the_json_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, style: dict
) -> None:
    monkeypatch.setattr(text_tables, "_CHUNK_CHARACTERS", chunk)
    file = tmp_path / "x.json"
    rows = json.loads(json.dumps(ROWS))
    file.write_text(json.dumps(rows, **style), encoding="utf-8")
    assert list(read_json(str(file))) == list(enumerate(rows, 1))
    file.write_text(json.dumps({"data": rows, "version": 12}, **style), encoding="utf-8")
    assert list(read_json(str(file))) == list(enumerate(rows, 1))
    captions = {f"{number}.mp4": ["one", "two"] for number in range(20)}
    file.write_text(json.dumps(captions, **style), encoding="utf-8")
    assert {row["file_name"]: row["text"] for _, row in read_json(str(file))} == captions


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    "text, message",
    [
        ('[\n{"a": 1},\n{"a": }]', ":3: invalid JSON: Expecting value"),
        ('[\n{"a": 1}\n{"a": 1}]', ":3: invalid JSON: Expecting ',' or ']'"),
        ('[{"a": 1},\n\n', ":3: invalid JSON: "),
        ('{"a.mp4": "x",\n"b.mp4" "y"}', ":2: invalid JSON: Expecting ':'"),
        ('[{"a": "x\n', ":[12]: invalid JSON: "),
        ("[]\n]", ":2: invalid JSON: "),
        ('"x"', "holds a str, not a list"),
        ("", ":1: invalid JSON: "),
        ("[3]", "row 1: a int"),
    ],
)
def test_errors_name_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str, message: str
) -> None:
    monkeypatch.setattr(text_tables, "_CHUNK_CHARACTERS", chunk)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        list(read_json(str(tmp_path / "x.json")))
