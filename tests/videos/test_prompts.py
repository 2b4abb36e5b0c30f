"""Prompts from flags and list files, and the errors for those that do not fit."""

import dataclasses

import pytest

from cogds.errors import UserError
from cogds.videos.prompts import PromptSpec, read_prompt_specs


@pytest.mark.parametrize(
    "prompts, images, expected",
    [
        (["one"], ["a.png"], [("one", "a.png")]),
        (["one", "two"], ["a.png", "b.png"], [("one", "a.png"), ("two", "b.png")]),
        (["one", "two"], ["a.png"], [("one", "a.png"), ("two", "a.png")]),
        (["one"], ["a.png", "b.png"], [("one", "a.png"), ("one", "b.png")]),
    ],
)
def test_flags_are_paired(prompts, images, expected):
    assert [(spec.prompt, spec.image) for spec in read_prompt_specs(prompts, images, None)] == expected


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("p.jsonl", '{"prompt": "x", "image": "i.png", "seed": 3}\n\n', [PromptSpec("x", "{}/i.png", None, 3)]),
        (
            "p.csv",
            'prompt,image,size,seed\n"a, b",i.png,9x64x64,\n',
            [PromptSpec("a, b", "{}/i.png", "9x64x64", size_key="{}/p.csv:2: size")],
        ),
        ("p.csv", "prompt,seed\nx,7\n", [PromptSpec("x", "given.png", None, 7)]),
        ("p.csv", 'prompt,seed\n"two\nlines",7\n', [PromptSpec("two\nlines", "given.png", None, 7)]),
        ("p.jsonl", '{"prompt": "a\u2028b"}', [PromptSpec("a\u2028b", "given.png")]),
        ("p.txt", "x\r\ny\u2028z\n", [PromptSpec("x", "given.png"), PromptSpec("y\u2028z", "given.png")]),
        ("p.txt", "x\n\n  y \n", [PromptSpec("x", "given.png"), PromptSpec("y", "given.png")]),
    ],
)
def test_lists(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    expected = [
        dataclasses.replace(spec, image=spec.image.format(tmp_path), size_key=spec.size_key.format(tmp_path))
        for spec in expected
    ]
    assert read_prompt_specs([], ["given.png"], str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "prompts, images, named",
    [
        ([], ["a"], [": --prompt missing"]),
        ([], [], ["--prompt", "--image"]),
        (["a", "b", "c"], ["a", "b"], ["3 --prompt", "2 --image"]),
    ],
)
def test_flags_that_do_not_fit_are_named(prompts, images, named):
    with pytest.raises(UserError) as error:
        read_prompt_specs(prompts, images, None)
    assert [text for text in named if text not in str(error.value)] == []


def test_a_list_takes_no_prompt_and_one_image_at_most(tmp_path):
    (tmp_path / "p.txt").write_text("x\n")
    for prompts, images, flag in ((["a"], ["i"], "--prompt"), ([], ["i", "j"], "--image")):
        with pytest.raises(UserError, match=flag):
            read_prompt_specs(prompts, images, str(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    "name, text, place, named",
    [
        ("p.jsonl", '{"prompt": "x", "image": "i"}\n{"image": "i"}\n', "p.jsonl:2: ", "prompt"),
        ("p.jsonl", '{"prompt": "x"}', "p.jsonl:1: ", "image"),
        ("p.jsonl", "{", "p.jsonl:1: ", "JSON"),
        ("p.jsonl", "[1]", "p.jsonl:1: ", "object"),
        ("p.csv", "prompt,imgae\nx,i\n", "p.csv:2: ", r"'imgae' \(did you mean 'image'\?\)"),
        ("p.csv", "prompt,image,seed\nx,i,half\n", "p.csv:2: ", "seed is 'half'"),
        ("p.txt", "\n", "p.txt: ", "prompts"),
    ],
)
def test_an_invalid_list_is_refused_with_its_line(tmp_path, name, text, place, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{place}.*{named}"):
        read_prompt_specs([], [], str(tmp_path / name))
    with pytest.raises(UserError, match=r"missing\.txt: "):
        read_prompt_specs([], [], str(tmp_path / "missing.txt"))
