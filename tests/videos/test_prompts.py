"""What videos are asked for: flags and lists, and what is said of those that will not do."""

import pytest

from cogds.errors import UserError
from cogds.videos.prompts import Request, find_requests


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
    assert [(one.prompt, one.image) for one in find_requests(prompts, images, None)] == expected


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("p.jsonl", '{"prompt": "x", "image": "i.png", "seed": 3}\n\n', [Request("x", "{}/i.png", None, 3)]),
        ("p.csv", 'prompt,image,size,seed\n"a, b",i.png,9x64x64,\n', [Request("a, b", "{}/i.png", "9x64x64")]),
        ("p.csv", "prompt,seed\nx,7\n", [Request("x", "given.png", None, 7)]),
        ("p.csv", 'prompt,seed\n"two\nlines",7\n', [Request("two\nlines", "given.png", None, 7)]),
        ("p.jsonl", '{"prompt": "a\u2028b"}', [Request("a\u2028b", "given.png")]),
        ("p.txt", "x\r\ny\u2028z\n", [Request("x", "given.png"), Request("y\u2028z", "given.png")]),
        ("p.txt", "x\n\n  y \n", [Request("x", "given.png"), Request("y", "given.png")]),
    ],
)
def test_lists(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    expected = [Request(one.prompt, one.image.format(tmp_path), one.size, one.seed) for one in expected]
    assert find_requests([], ["given.png"], str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    "prompts, images, said",
    [
        ([], ["a"], "missing: --prompt. A video"),
        ([], [], "missing: --prompt and --image"),
        (["a", "b", "c"], ["a", "b"], "3 --prompt and 2 --image"),
    ],
)
def test_flags_that_do_not_fit_are_refused(prompts, images, said):
    with pytest.raises(UserError, match=said):
        find_requests(prompts, images, None)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("p.jsonl", '{"prompt": "x", "image": "i"}\n{"image": "i"}\n', r"p.jsonl:2 has no prompt"),
        ("p.jsonl", '{"prompt": "x"}', "p.jsonl:1 has no image"),
        ("p.jsonl", "{", "p.jsonl:1 is not JSON"),
        ("p.jsonl", "[1]", "p.jsonl:1 is no object"),
        ("p.csv", "prompt,imgae\nx,i\n", r"p.csv:2: unknown column 'imgae' \(did you mean 'image'\?\)"),
        ("p.csv", "prompt,image,seed\nx,i,half\n", "p.csv:2: seed is 'half'"),
        ("p.txt", "\n", "holds no prompt"),
    ],
)
def test_lists_that_will_not_do_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        find_requests([], [], str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read"):
        find_requests([], [], str(tmp_path / "missing.txt"))
