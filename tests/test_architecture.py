"""The house as drawn in docs/architecture.md: imports point one way, and each library comes in through its own gate."""

import ast
import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("cogds/**/*.py"), *ROOT.glob("launch/*.py")])

BASE = {"errors", "files", "progress", "wording", "config", "core"}
# A layer may import itself and those named here. `assembly` is what stands directly in cogds/ and is not named itself.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "progress": set(),
    "wording": set(),
    "config": {"errors"},
    "core": {"errors"},
    "data": {"errors", "files", "progress", "core"},
    "model": {"errors", "files", "core"},
    "runtime": {"errors", "files", "config", "core", "data", "model"},
    "prepare": {*BASE, "data", "model", "runtime"},
    "training": {*BASE, "data", "model", "runtime", "prepare"},
    "assembly": {*BASE, "data", "model", "runtime", "prepare", "training"},
    "launch": {"assembly"},
}
# Third-party library -> where it may be imported (path prefixes below the root).
GATES = {
    "deepspeed": ("cogds/runtime/",),
    "decord": ("cogds/data/video.py",),
    "av": ("cogds/data/video.py",),
    "peft": ("cogds/model/",),
    "torchao": ("cogds/model/quantize.py",),
    "bitsandbytes": ("cogds/model/quantize.py",),
    "transformers": ("cogds/model/",),
    "tokenizers": ("cogds/model/",),
    "huggingface_hub": ("cogds/model/",),
    "tensorboard": ("cogds/runtime/board.py",),
    "omegaconf": ("cogds/config.py",),
    "safetensors": (
        "cogds/model/",
        "cogds/data/shard.py",
        "cogds/runtime/checkpoint.py",
        "cogds/preflight/folders.py",
    ),
    "pyarrow": ("cogds/data/", "cogds/prepare/", "cogds/report/"),
    "tqdm": ("cogds/progress.py", "cogds/runtime/ticker.py"),
    "matplotlib": ("cogds/report/",),
    "jinja2": ("cogds/report/",),
    "rich": ("cogds/report/", "cogds/preflight/", "cogds/show/panel.py"),
    # core calls diffusers' pure functions (rotary tables) and none of its models
    "diffusers": ("cogds/model/", "cogds/core/rope.py"),
}


def layer_of(name):
    """`cogds.core.plan` -> core; `cogds.train` -> assembly."""
    parts = name.split(".")
    if parts[0] == "launch":
        return "launch"
    if len(parts) < 2:
        return None
    return parts[1] if parts[1] in MAY_IMPORT else "assembly"


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "cogds" or (node.module or "").startswith("cogds."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def violations(path, source):
    where = path.relative_to(ROOT).as_posix()
    own = layer_of(module_of(path))
    for name in imports_of(source):
        top = name.split(".")[0]
        if top == "cogds":
            target = layer_of(name)
            if target != own and target is not None and target not in MAY_IMPORT.get(own, set()):
                yield f"{where} ({own}) imports {name} ({target})"
        elif top in GATES and not where.startswith(GATES[top]):
            yield f"{where} imports {top}, whose place is {', '.join(GATES[top])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_point_one_way_and_through_the_gates(path):
    assert list(violations(path, path.read_text())) == []


@pytest.mark.parametrize(
    "where, source",
    [
        ("cogds/core/plan.py", "from cogds.data import cache"),
        ("cogds/data/cache.py", "from cogds.model.load import find_model"),
        ("cogds/runtime/world.py", "import cogds.train"),
        ("cogds/train.py", "import deepspeed"),
        ("cogds/prepare/encoding.py", "def f():\n    from decord import VideoReader"),
        ("launch/train.py", "from cogds.core.plan import Plan"),
    ],
)
def test_a_wrong_import_is_seen(where, source):
    assert list(violations(ROOT / where, source))


def environment_readers(source):
    return [
        node
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names))
    ]


def test_one_module_reads_the_environment():
    # data/video.py only sets what the decoder reads when it is loaded.
    allowed = {"cogds/runtime/world.py", "cogds/data/video.py"}
    readers = {path.relative_to(ROOT).as_posix() for path in FILES if environment_readers(path.read_text())}
    assert readers <= allowed
    assert environment_readers("import os\nos.environ['RANK']")


# Who may read objects rather than data: the pool, out of pipes to its own children.
UNPICKLERS = {"cogds/data/pool.py"}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Calls that run what they read unless they are told not to, and how they are told.
SAFE_WHERE = {
    "load": ("torch", "weights_only", True),
    "from_pretrained": (None, "use_safetensors", True),
    "load_lora_weights": (None, "use_safetensors", True),
    "lora_state_dict": (None, "use_safetensors", True),
}
NO_WEIGHTS = {"AutoTokenizer", "scheduler_class"}  # JSON is all that these read
NEVER = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "autoescape": False}


def unsafe_reads(source):
    """Where a file could be read that can do anything: pickles, and Python code of a model folder."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLING)
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        called = node.func.attr if method else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if method else ""
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if called in ("eval", "exec") and not method:
            yield f"{node.lineno}: {called}"
        if owner == "yaml" and called in ("load", "load_all", "unsafe_load", "full_load"):
            yield f"{node.lineno}: yaml.{called} instead of safe_load"
        of, word, wanted = SAFE_WHERE.get(called, (None, None, None))
        if word and of in (None, owner) and owner not in NO_WEIGHTS and given.get(word) is not wanted:
            yield f"{node.lineno}: {called} without {word}={wanted}"
        yield from (
            f"{node.lineno}: {name}" for name, value in NEVER.items() if given.get(name, not value) is not (not value)
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_what_is_loaded_is_data(path):
    if path.relative_to(ROOT).as_posix() not in UNPICKLERS:
        assert list(unsafe_reads(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import marshal as m",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "Model.from_pretrained(path)",
        "T5EncoderModel.from_pretrained(path, use_safetensors=False)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "pipeline.load_lora_weights(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "jinja2.Environment(autoescape=False)",
        "eval(text)",
    ],
)
def test_reading_more_than_data_is_seen(source):
    assert list(unsafe_reads(source))


def test_entry_points_are_thin():
    long = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("launch/*.py")}
    assert {name: lines for name, lines in long.items() if lines > 40} == {}


def test_public_functions_say_what_they_do():
    # Methods and inner functions of a few lines speak by their name.
    silent = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


def test_no_folder_of_tests_is_skipped(pytestconfig):
    """Pytest's default for `norecursedirs` skips every `dist`, and says nothing."""
    folders = {part for path in ROOT.glob("tests/**/test_*.py") for part in path.parent.relative_to(ROOT).parts}
    skipped = pytestconfig.getini("norecursedirs")
    assert [folder for folder in folders for pattern in skipped if fnmatch.fnmatch(folder, pattern)] == []
