"""The documentation names only files, modules, config keys and headings that exist."""

import ast
import re
from pathlib import Path

import pytest

from cogds.config.schema import KEYS, SECTIONS
from cogds.data.video.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CURRENT = [page for page in PAGES if page.name != "CHANGES.md"]  # CHANGES also has old names
FOLDERS = "cogds|tests|docs|launch|benchmarks|ds_configs|examples"
METHODS = ("engine.backward", "engine.step")  # of DeepSpeed's engine


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def code_spans(page):
    """Return the text in backticks, outside of code blocks."""
    prose = "".join(page.read_text().split("```")[::2])
    return re.findall(r"`([^`]+)`", prose)


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_short_enough_to_read(page):
    in_blocks = "".join(page.read_text().split("```")[1::2]).splitlines()
    assert [line for line in in_blocks if len(line) > 120] == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_paths_exist(page):
    paths = [
        path for span in code_spans(page) for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]++(?!\\)", span)
    ]
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_config_keys_exist(page):
    """`train.num_steps=7` and `metrics.*` are keys; `data.loading.index` is a module, `run.yaml` a file."""
    modules = {".".join(path.relative_to(ROOT / "cogds").with_suffix("").parts) for path in ROOT.glob("cogds/**/*.py")}
    unknown = []
    for span in code_spans(page):
        name = re.match(r"[a-z_]+\.[a-z_.]+", span)
        if name and name[0].partition(".")[0] in SECTIONS and name[0].rstrip("._") not in {*KEYS, *SECTIONS}:
            is_module = any(name[0] == module or name[0].startswith(f"{module}.") for module in modules)
            if not is_module and not any(key.startswith(name[0]) for key in KEYS):
                unknown.append(name[0])
    assert unknown == []


def test_the_architecture_page_names_every_package():
    text = (ROOT / "docs/architecture.md").read_text()
    launchers = {"__main__", "launch", "version"}
    missing = [
        name
        for name in MAY_IMPORT.keys() - launchers
        if f"`cogds/{name}/`" not in text and f"`cogds/{name}.py`" not in text
    ]
    assert missing == []


def test_the_architecture_page_names_only_modules_that_exist():
    """Such as `core.plan`, `train.step.StepBuilder` and `distributed.collectives.any_rank`."""
    packages = {path.name for path in (ROOT / "cogds").iterdir() if path.is_dir()}
    spans = [span for span in code_spans(ROOT / "docs/architecture.md") if re.fullmatch(r"[a-z_]+(\.\w+)+", span)]
    missing = []
    for span in spans:
        parts = span.split(".")
        if parts[0] not in packages or span in {*KEYS, *METHODS}:
            continue
        module = ROOT / "cogds" / "/".join(parts)
        is_module = module.with_suffix(".py").is_file() or module.is_dir()
        if not is_module and not defines(module.parent.with_suffix(".py"), parts[-1]):
            missing.append(span)
    assert missing == []


def defines(module, name):
    """Return whether a module has a function or class of this name."""
    return module.is_file() and re.search(rf"^(?:def|class) {name}\b", module.read_text(), flags=re.M) is not None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_code_can_be_parsed(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S):
        ast.parse(code)


def test_the_suffixes_of_clips_are_documented():
    page = (ROOT / "docs/data.md").read_text()
    section = page[page.index("recognized by their suffix") : page.index("A `.gif`")]
    videos, images = section.split("- images:")
    assert set(re.findall(r"`(\.\w+)`", videos)) == VIDEO_SUFFIXES
    assert set(re.findall(r"`(\.\w+)`", images)) == IMAGE_SUFFIXES
