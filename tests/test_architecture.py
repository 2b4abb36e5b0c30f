"""Rules for imports (docs/architecture.md), for reading files safely, and for docstrings."""

import ast
import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("cogds/**/*.py"), *ROOT.glob("launch/*.py")])

PURE = {"errors", "files", "formatting", "config", "core"}
RANKS = {"process", "distributed"}
DATA = {"data/storage", "data/layouts", "data/manifest", "data/video", "data/cache", "data/loading"}
MODEL = {"model", "model/lora", "model/transformer"}
TRAINING = {"engine", "metrics", "job", "encode"}
# What each package, or module directly in cogds/, may import besides itself.
MAY_IMPORT = {
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "tensor_file": {"files"},
    "formatting": set(),
    "config": {"errors", "core"},
    "core": {"errors", "formatting"},
    "process": {"errors", "files", "formatting"},
    "distributed": {"errors", "config", "process"},
    "data/video": {"errors", "files", "core", "data/storage"},
    "data/storage": {"errors"},
    "data/layouts": {"errors", "formatting", "data/storage", "data/video"},
    "data/cache": {"errors", "files", "process", "data/storage"},
    "data/manifest": {"errors", "files", "core", "process", "data/storage", "data/layouts", "data/video"},
    "data/loading": {"errors", "files", "core", "process", "data/storage", "data/cache"},
    "model/transformer": {"errors", "core", "process"},
    "model": {"errors", "files", "tensor_file", "core", "model/transformer"},
    "model/lora": {"errors", "files", "tensor_file", "formatting", "core", "model"},
    "engine": {*PURE, *RANKS, "tensor_file", "model", "model/transformer"},
    "metrics": {*PURE, *RANKS},
    "arguments": {"version", "errors", "config", "core"},
    "cli": {"version", "errors", "config", "process", "distributed", "arguments", "data/storage"},
    "shapes": {"files", "data/video"},
    "demo": {*PURE, "process", "distributed", "model", "shapes", "job", "videos", "train"},
    "card": {"errors", "core", "process", "arguments"},
    "job": {*PURE, *MODEL, "data/cache", "distributed", "shapes"},
    "encode": {*PURE, *RANKS, *DATA, "model", "job"},
    "prepare": {*PURE, *RANKS, "data/storage", "data/layouts", "data/video", "encode", "arguments"},
    "pages": {"files", "formatting"},
    "report": {*PURE, *RANKS, *DATA, "model", "job", "encode", "metrics", "pages", "videos"},
    "init": {*PURE, *RANKS, "arguments", "model", "job", "encode", "report"},
    "gallery": {"errors", "formatting", "process", "metrics", "pages", "videos"},
    "videos": {"errors", "files", "config", "core", "distributed", "data/storage", "data/video", "model"},
    "train": {*PURE, *RANKS, *DATA, *MODEL, *TRAINING, "version", "report", "videos", "card"},
    "evaluate": {*PURE, *RANKS, *MODEL, "job", "encode", "train"},
    "probe": {*PURE, *RANKS, "data/cache", "data/loading", "model", "job", "encode", "train", "evaluate"},
    "sample": {*PURE, "process", "data/video", "model", "model/lora", "videos"},
    "export": {*PURE, "process", "model", "model/lora", "card", "arguments"},
    "preflight": {*PURE, *RANKS, *MODEL, *TRAINING, "version", "arguments", "train", "data/storage", "data/cache"},
    "__main__": {"cli"},
    "launch": {"cli"},
}
# Third-party library -> paths that may import it (prefixes).
IMPORTERS = {
    "deepspeed": ("cogds/engine/", "cogds/distributed/", "cogds/config/deepspeed.py"),
    "decord": ("cogds/data/video/",),
    "av": ("cogds/data/video/",),
    "pillow_heif": ("cogds/data/video/",),
    "fsspec": ("cogds/data/storage/requests.py",),
    "aiohttp": ("cogds/data/storage/requests.py",),
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
        "cogds/data/cache/",
        "cogds/engine/checkpoint.py",
        "cogds/preflight/sources.py",
    ),
    "pyarrow": ("cogds/data/", "cogds/encode/", "cogds/prepare/", "cogds/report/"),
    "scenedetect": ("cogds/prepare/cuts.py",),
    "cv2": ("cogds/prepare/scores.py",),
    "rapidocr": ("cogds/prepare/scores.py",),
    "openai": ("cogds/prepare/captions.py",),
    "tqdm": ("cogds/process/progress.py", "cogds/process/logs.py"),
    "matplotlib": ("cogds/metrics/figures.py", "cogds/metrics/fonts.py", "cogds/report/plots.py"),
    "jinja2": ("cogds/pages/page.py",),
    "rich": ("cogds/report/", "cogds/preflight/", "cogds/train/summary.py"),
    # core calls diffusers' pure functions (rotary tables) and none of its models
    "diffusers": ("cogds/model/", "cogds/core/rope.py"),
}


def package_of(name):
    """Return the key of a module in MAY_IMPORT: core for `cogds.core.plan`, data/cache for `cogds.data.cache.store`."""
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
    """Yield every import that is not allowed."""
    file = path.relative_to(ROOT).as_posix()
    own = package_of(module_of(path))
    for name in imports_of(source):
        library = name.split(".")[0]
        if library == "cogds":
            target = package_of(name)
            if target != own and target not in MAY_IMPORT[own]:
                yield f"{file} ({own}) imports {name} ({target})"
        elif library in IMPORTERS and not file.startswith(IMPORTERS[library]):
            yield f"{file} imports {library}; allowed in {', '.join(IMPORTERS[library])}"


def test_every_package_has_a_row_and_no_two_import_each_other():
    packages = {package_of(module_of(path)) for path in FILES}
    assert packages - {"data"} == set(MAY_IMPORT)  # data has only subpackages
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_are_allowed(path):
    assert list(violations(path, path.read_text())) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("cogds/core/plan.py", "from cogds.data import cache"),
        ("cogds/data/cache/store.py", "from cogds.model.load import find_model"),
        ("cogds/distributed/world.py", "import cogds.train.main"),
        ("cogds/train/main.py", "import deepspeed"),
        ("cogds/encode/encoder.py", "def f():\n    from decord import VideoReader"),
        ("launch/train.py", "from cogds.core.plan import Plan"),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert list(violations(ROOT / file, source))


def environment_readers(source):
    return [
        node
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names))
    ]


def test_only_the_lowest_packages_read_the_environment():
    # data/video only sets a variable that the decoder reads while it is imported.
    allowed = ("cogds/process/environment.py", "cogds/distributed/", "cogds/data/video/decord_reader.py")
    readers = {path.relative_to(ROOT).as_posix() for path in FILES if environment_readers(path.read_text())}
    assert [reader for reader in readers if not reader.startswith(allowed)] == []
    assert environment_readers("import os\nos.environ['RANK']")


# May unpickle: the worker pool, from pipes to its own child processes.
UNPICKLERS = {"cogds/process/worker_pool.py"}
PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Function -> its library (None: any), and the argument without which it may execute what it reads.
SAFE_ARGUMENTS = {
    "load": ("torch", "weights_only", True),
    "from_pretrained": (None, "use_safetensors", True),
    "load_lora_weights": (None, "use_safetensors", True),
    "lora_state_dict": (None, "use_safetensors", True),
}
JSON_ONLY = {"AutoTokenizer", "scheduler_class"}  # classes whose from_pretrained reads no weights
NEVER = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "autoescape": False}


def unsafe_reads(source):
    """Yield every place that could execute what it reads: pickles, and Python code in a model folder."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLING)
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        called = node.func.attr if is_method else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if is_method else ""
        arguments = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if called in ("eval", "exec") and not is_method:
            yield f"{node.lineno}: {called}"
        if owner == "yaml" and called in ("load", "load_all", "unsafe_load", "full_load"):
            yield f"{node.lineno}: yaml.{called} instead of safe_load"
        library, name, value = SAFE_ARGUMENTS.get(called, (None, None, None))
        if name and library in (None, owner) and owner not in JSON_ONLY and arguments.get(name) is not value:
            yield f"{node.lineno}: {called} without {name}={value}"
        for name, value in NEVER.items():
            if arguments.get(name, not value) is not (not value):
                yield f"{node.lineno}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_nothing_executes_what_it_reads(path):
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
def test_an_unsafe_read_is_found(source):
    assert list(unsafe_reads(source))


def test_entry_points_are_thin():
    assert [path.name for path in ROOT.glob("launch/*.py") if len(path.read_text().splitlines()) > 40] == []


def test_public_functions_have_docstrings():
    undocumented = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert undocumented == []


def test_no_folder_of_tests_is_skipped(pytestconfig):
    """Pytest's default of `norecursedirs` silently skips folders called `dist`."""
    folders = {part for path in ROOT.glob("tests/**/test_*.py") for part in path.parent.relative_to(ROOT).parts}
    skipped = pytestconfig.getini("norecursedirs")
    assert [folder for folder in folders for pattern in skipped if fnmatch.fnmatch(folder, pattern)] == []
