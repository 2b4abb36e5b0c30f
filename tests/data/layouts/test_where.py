"""data.where: which rows it keeps, and what it refuses."""

import pytest

from cogds.data.layouts.where import Where
from cogds.errors import UserError

ROWS = [
    {"aesthetic score": 5.5, "motion": "0.4", "split": "train", "is_good": True, "id": 12},
    {"aesthetic score": "4.1", "motion": "", "split": "test", "is_good": False, "id": "13"},
    {"aesthetic score": None, "motion": "0.1", "split": None, "is_good": "true", "id": None},
    {"aesthetic score": float("nan"), "motion": "nan", "split": "", "is_good": None},
]


def kept(text, rows=ROWS):
    where = Where(text)
    return where.matching(rows, where.columns(list(rows[0]), "t.csv"), "t.csv")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("aesthetic_score > 5", [0]),
        ("`aesthetic score` >= 4.1 and motion > 0.3", [0]),
        ("aesthetic_score > 5 or split == 'test'", [0, 1]),
        ("not aesthetic_score > 5", [1]),  # missing values satisfy neither
        ("aesthetic_score != 5.5", [1]),
        ("4 < aesthetic_score < 5", [1]),
        ("5 > aesthetic_score", [1]),
        ("motion > -1 and motion <= .1", [2]),
        ("split in ['train', 'test']", [0, 1]),
        ("split not in ('train', 'x')", [1, 3]),
        ("id in (12, 13)", [0, 1]),
        ("id == '13'", [1]),
        ("motion is null", [1]),
        ("motion is not None and split is null", [2, 3]),
        ("aesthetic_score is null", [2, 3]),
        ("split != null", [0, 1]),
        ("is_good", [0, 2]),
        ("not is_good", [1]),
        ("is_good == true", [0, 2]),
        ("split == 'train' AND NOT motion > 0.5", [0]),
        ("split == 'a`b' or id == 12", [0]),
    ],
)
def test_rows_that_are_kept(text, expected):
    assert kept(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("motin > 0.3", r"no column 'motin' \(did you mean 'motion'\?\) in t.csv: .*aesthetic score, motion"),
        ("motion = 3", "cannot be parsed.* Write == instead of ="),
        ("motion >", "cannot be parsed"),
        ("", "cannot be parsed"),
        ("__import__('os').system('x')", "is not a comparison"),
        ("motion > len(split)", r"len\(split\) is not a value"),
        ("motion.x > 3", "motion.x and 3 are not a column and a value"),
        ("motion > id", "not a column and a value"),
        ("(lambda: 1) == 1", "not a column and a value"),
        ("motion > null", "not a value to compare with"),
        ("motion in 'abc'", "cannot be compared"),
        ("motion == 1 or motion == 'x'", "motion is compared with values of several types"),
        ("motion in [1, 'x']", "values of several types"),
        ("split > 3", "column 'split' of t.csv holds 'train', which is not a number"),
        ("motion == true", "holds '0.4', which is not true or false"),
        ("not " * 3000 + "motion > 1", "nested too deeply|cannot be parsed|too many nested"),
    ],
)
def test_errors_name_the_key_and_the_problem(text, message):
    with pytest.raises(UserError, match=f"(?s)^data.where: .*{message}"):
        kept(text)
