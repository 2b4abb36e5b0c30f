"""The house as drawn in docs/architecture.md: imports point one way, and each library comes in through its own gate."""

import ast
import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("cogds/**/*.py"), *ROOT.glob("launch/*.py")])

PURE = {"errors", "files", "formatting", "config", "core"}
RANKS = {"process", "distributed"}
DATA = {"data/manifest", "data/video", "data/cache", "data/loading"}
MODEL = {"model", "model/lora", "model/transformer"}
# A package, or a module directly in cogds/, may import itself and those named here. There is a row for every one.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "formatting": set(),
    "config": {"errors"},
    "core": {"errors", "formatting"},
    "process": {"errors", "files"},
    "distributed": {"errors", "config", "process"},
    "data/video": {"errors", "files", "core"},
    "data/cache": {"errors", "files", "process"},
    "data/manifest": {"errors", "files", "core", "process", "data/video"},
    "data/loading": {"errors", "files", "core", "process", "data/cache"},
    "model/transformer": {"errors"},
    "model": {"errors", "files", "core", "model/transformer"},
    "model/lora": {"errors", "core", "model"},
    "engine": {*PURE, *RANKS, "model", "model/transformer"},
    "metrics": {*PURE, *RANKS},
    "arguments": {"version", "errors", "config"},
    "cli": {"version", "errors", "process", "distributed", "arguments"},
    "demo": {"config", "model", "data/video"},
    "card": {"errors", "core", "process", "arguments"},
    "job": {*PURE, *MODEL, "data/cache", "distributed", "demo"},
    "encode": {*PURE, *RANKS, *DATA, "model", "job"},
    "report": {*PURE, *RANKS, "data/video", "model", "job", "encode", "metrics"},
    "videos": {"errors", "core", "distributed", "data/video", "model"},
    "train": {
        "version",
        *PURE,
        *RANKS,
        *DATA,
        *MODEL,
        "engine",
        "metrics",
        "job",
        "encode",
        "report",
        "videos",
        "card",
    },
    "evaluate": {*PURE, *RANKS, *MODEL, "job", "encode", "train"},
    "probe": {*PURE, *RANKS, "data/cache", "data/loading", "model", "job", "encode", "train", "evaluate"},
    "sample": {*PURE, "process", "data/video", "model", "model/lora", "videos"},
    "export": {*PURE, "process", "model", "model/lora", "card", "arguments"},
    "preflight": {*PURE, *RANKS, *MODEL, "version", "engine", "metrics", "arguments", "job", "encode", "train"},
    "__main__": {"cli"},
    "launch": {"cli"},
}
# Third-party library -> where it may be imported (path prefixes below the root).
GATES = {
    "deepspeed": ("cogds/engine/", "cogds/distributed/", "cogds/config/deepspeed.py"),
    "decord": ("cogds/data/video/media.py",),
    "av": ("cogds/data/video/media.py",),
    "peft": ("cogds/model/",),
    "torchao": ("cogds/model/transformer/quantize.py",),
    "bitsandbytes": ("cogds/model/transformer/quantize.py",),
    "transformers": ("cogds/model/",),
    "tokenizers": ("cogds/model/",),
    "huggingface_hub": ("cogds/model/",),
    "tensorboard": ("cogds/metrics/tensorboard.py",),
    "omegaconf": ("cogds/config/loading.py",),
    "pydantic": ("cogds/config/",),
    "safetensors": (
        "cogds/model/",
        "cogds/data/cache/shard.py",
        "cogds/engine/checkpoint.py",
        "cogds/preflight/sources.py",
    ),
    "pyarrow": ("cogds/data/", "cogds/encode/", "cogds/report/"),
    "tqdm": ("cogds/process/progress.py", "cogds/metrics/training_progress.py", "cogds/process/logs.py"),
    "matplotlib": ("cogds/metrics/figures.py", "cogds/report/plots.py"),
    "jinja2": ("cogds/report/",),
    "rich": ("cogds/report/", "cogds/preflight/", "cogds/train/summary.py"),
    # core calls diffusers' pure functions (rotary tables) and none of its models
    "diffusers": ("cogds/model/", "cogds/core/rope.py"),
}


def package_of(name):
    """The row of a module: `cogds.core.plan` -> core, `cogds.data.cache.store` -> data/cache, `cogds.job` -> job."""
    parts = name.split(".")
    if parts[0] == "launch":
        return "launch"
    if len(parts) == 1 or parts[1].startswith("__version"):
        return "version"
    nested = "/".join(parts[1:3])
    return nested if nested in MAY_IMPORT else parts[1]


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
    own = package_of(module_of(path))
    for name in imports_of(source):
        top = name.split(".")[0]
        if top == "cogds":
            target = package_of(name)
            if target != own and target not in MAY_IMPORT[own]:
                yield f"{where} ({own}) imports {name} ({target})"
        elif top in GATES and not where.startswith(GATES[top]):
            yield f"{where} imports {top}, whose place is {', '.join(GATES[top])}"


def test_every_package_has_a_row_and_no_two_import_each_other():
    packages = {package_of(module_of(path)) for path in FILES}
    containers = {"data"}  # holds packages and nothing of its own
    assert packages - containers == set(MAY_IMPORT)
    order = TopologicalSorter(MAY_IMPORT)
    order.prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_point_one_way_and_through_the_gates(path):
    assert list(violations(path, path.read_text())) == []


@pytest.mark.parametrize(
    "where, source",
    [
        ("cogds/core/plan.py", "from cogds.data import cache"),
        ("cogds/data/cache/store.py", "from cogds.model.load import find_model"),
        ("cogds/distributed/world.py", "import cogds.train.main"),
        ("cogds/train/main.py", "import deepspeed"),
        ("cogds/encode/encoder.py", "def f():\n    from decord import VideoReader"),
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


def test_only_the_lowest_packages_read_the_environment():
    # data/video only sets what the decoder reads when it is loaded.
    allowed = ("cogds/process/environment.py", "cogds/distributed/", "cogds/data/video/media.py")
    readers = {path.relative_to(ROOT).as_posix() for path in FILES if environment_readers(path.read_text())}
    assert [reader for reader in readers if not reader.startswith(allowed)] == []
    assert environment_readers("import os\nos.environ['RANK']")


# Who may read objects rather than data: the pool, out of pipes to its own children.
UNPICKLERS = {"cogds/process/worker_pool.py"}
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
