"""File names of generated videos."""

import pytest

from cogds.videos.sample_spec import slug


@pytest.mark.parametrize(
    "text, name",
    [
        ("A fox, running_fast!", "a-fox-running-fast"),
        ("一只狐狸在雪地里奔跑。夜晚", "一只狐狸在雪地里奔跑-夜晚"),
        ("Ein Füchslein", "ein-füchslein"),
        ("हिन्दी में", "हिन्दी-में"),  # vowels as marks
        ("../../etc/passwd", "etc-passwd"),
        ("🦊 ...", "video"),
        ("x" * 39 + " y", "x" * 39),
    ],
)
def test_a_prompt_names_its_file_in_any_language(text, name):
    assert slug(text) == name


def test_a_name_fits_every_file_system():
    assert len(slug("𠀀" * 100).encode()) <= 160
