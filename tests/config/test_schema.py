"""The run config: what is accepted, what is refused and with which sentence, and the shared command line."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.config import schema as config
from cogds.errors import UserError

ROOT = Path(__file__).parents[2]
REQUIRED = ["model.path=m", "data.path=d"]


def load(*overrides: str, yaml: str | None = None, tmp: Path | None = None) -> config.RunConfig:
    file = None
    if yaml is not None and tmp is not None:
        file = tmp / "run.yaml"
        file.write_text(yaml)
    return config.load_config(str(file) if file else None, [*REQUIRED, *overrides])[0]


def test_defaults_file_and_command_line_win_in_this_order(tmp_path):
    yaml = "seed: 9\ntrain: {num_steps: 5, batch_size: 2}\noptimizer: {lr: 1e-5}\nlora:\n"
    cfg = load("train.num_steps=7", yaml=yaml, tmp=tmp_path)
    assert (cfg.train.num_steps, cfg.train.batch_size, cfg.optimizer.lr, cfg.lora.rank) == (7, 2, 1e-5, 128)
    assert cfg.seed == 9


def test_explicit_names_exactly_the_keys_that_were_set(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 0\ntrain: {num_steps: 1000}\n")
    _, explicit = config.load_config(str(file), [*REQUIRED, "lora.rank=128"])
    assert explicit == {"seed", "train.num_steps", "lora.rank", "model.path", "data.path"}


def test_the_tree_is_frozen():
    cfg = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.num_steps = 3  # type: ignore[misc]
    assert isinstance(hash(cfg), int)  # lists have become tuples


@pytest.mark.parametrize(
    "override, expected",
    [
        ("data.buckets=[17x192x320, 25x256x256]", ("17x192x320", "25x256x256")),
        ("data.buckets=17x192x320", ("17x192x320",)),
        ("data.bucket_aspect_ratios=[16/9,4/3]", ("16/9", "4/3")),
        ("data.bucket_frames=49", (49,)),
        ("lora.target_modules=all-linear", ("all-linear",)),
        ("optimizer.betas=[0, 0.5]", (0.0, 0.5)),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("model.create_tiny=yes", True),
        ("model.revision=12e4567", "12e4567"),  # YAML reads infinity
        ("model.revision=0123", "0123"),  # YAML reads 83
        ("model.revision=null", None),
        ("checkpoint.resume=no", "no"),  # YAML reads false
        ("output_dir=a=b", "a=b"),
        ("output_dir='a b'", "a b"),
        ("train.tokens_per_batch=5", 5),
        ("data.columns={path: video, caption: 'long text'}", {"path": "video", "caption": "long text"}),
        ("data.columns={}", {}),
        ("data.default_caption=a film", "a film"),
        ("data.windows=all", "all"),
    ],
)
def test_overrides_are_read_as_they_are_meant(override, expected):
    value = config.get(load(override), override.split("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_yaml_takes_a_bare_text_for_a_list_and_1e_4_for_a_number(tmp_path):
    cfg = load(yaml="lora: {target_modules: all-linear}\noptimizer: {lr: 1e-4, eps: 1}", tmp=tmp_path)
    assert cfg.lora.target_modules == ("all-linear",)
    assert (cfg.optimizer.lr, cfg.optimizer.eps) == (1e-4, 1.0)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.batch_size=2.5", ["train.batch_size must be a whole number", "2.5"]),
        ("train.batch_size=yes", ["train.batch_size must be a whole number", "true"]),
        ("train.batch_size=null", ["train.batch_size must be a whole number", "null"]),
        ("train.tokens_per_batch=x", ["train.tokens_per_batch must be a whole number or null", "x"]),
        ("optimizer.lr=fast", ["optimizer.lr must be a number", "fast"]),
        ("optimizer.lr=true", ["optimizer.lr must be a number", "true"]),
        ("optimizer.betas=[0.9, b]", ["optimizer.betas must be a list of numbers", "[0.9, b]"]),
        ("data.bucket_frames=[49, 2.5]", ["data.bucket_frames must be a list of whole numbers", "[49, 2.5]"]),
        ("data.bucket_aspect_ratios=[16:9]", ["data.bucket_aspect_ratios must be a list of texts, in quotes", "969"]),
        ("data.buckets=[[a]]", ["data.buckets must be a list of texts", "[[a]]"]),
        ("data.buckets={a: 1}", ["data.buckets must be a list of texts"]),
        ("model.create_tiny=2", ["model.create_tiny must be true or false", "2"]),
        ("model.path=[a]", ["model.path must be text", "[a]"]),
        ("train.num_steps=0", ["train.num_steps is 0", "at least 1"]),
        ("lora.rank=0", ["lora.rank is 0", "at least 1"]),
        ("lora.alpha=0", ["lora.alpha is 0.0", "greater than 0"]),
        ("lora.dropout=1", ["lora.dropout is 1.0", "less than 1"]),
        ("optimizer.lr=-1", ["optimizer.lr is -1.0", "at least 0"]),
        ("optimizer.lr=nan", ["optimizer.lr is nan", "finite"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas is [0.9]", "a list of 2"]),
        ("conditioning.caption_dropout=1.5", ["conditioning.caption_dropout is 1.5", "at most 1"]),
        ("conditioning.image_latents=scalled", ["conditioning.image_latents is scalled", "did you mean 'scaled'?"]),
        ("train.precision=fp16", ["train.precision is fp16", "one of bf16, fp32"]),
        ("optimizer.schedule=constnat", ["did you mean 'constant'?"]),
        ("output_dir=", ["output_dir is ''", "not empty"]),
        ("data.bucket_sizes=[]", ["data.bucket_sizes is empty", "data.buckets"]),
        ("num_steps=3", ["unknown key 'num_steps'", "did you mean 'train.num_steps'?"]),
        ("lr=3", ["unknown key 'lr'", "did you mean 'optimizer.lr'?"]),
        ("train.lr=3", ["unknown key 'train.lr'", "did you mean 'optimizer.lr'?"]),
        ("optimiser.lr=3", ["did you mean 'optimizer.lr'?"]),
        ("train.num_stps=3", ["did you mean 'train.num_steps'?"]),
        ("qqq=3", ["unknown key 'qqq'", "--help"]),
        ("train=3", ["train", "is a section", "train.num_steps"]),
        ("train.num_steps", ["'train.num_steps'", "not KEY=VALUE", "train.num_steps=100"]),
        ("train.num_steps=[1", ["'train.num_steps=[1'", "cannot be read", "quotes"]),
        ("data.path=${nope}", ["data.path", "nope", "write the value itself"]),
        ("data.columns=[a]", ["data.columns must be a mapping of names to texts", "[a]"]),
        ("data.columns=null", ["data.columns must be a mapping of names to texts", "null"]),
        ("data.columns={path: 5}", ["data.columns must be a mapping", "in quotes", "{path: 5}"]),
        ("data.columns={path: [a]}", ["data.columns must be a mapping", "{path: [a]}"]),
        ("data.columns={paht: a}", ["unknown column 'paht' in data.columns", "did you mean 'path'?", "start_s"]),
        ("data.columns={path: ' '}", ["data.columns is {path: ' '}", "not empty"]),
        ("data.columns.path=a", ["unknown key 'data.columns.path'", "as a whole", "data.columns='{caption: text}'"]),
        ("data.max_unusable=1.5", ["data.max_unusable is 1.5", "at most 1"]),
        ("data.repeats=0", ["data.repeats is 0.0", "greater than 0"]),
        ("data.windows=frist", ["data.windows is frist", "did you mean 'first'?"]),
        ("data.default_caption=", ["data.default_caption is ''", "not empty"]),
    ],
)
def test_overrides_are_refused_with_key_place_value_and_fix(override, parts):
    with pytest.raises(UserError) as error:
        load(override)
    for part in [*parts, "on the command line"] if "is empty" not in str(error.value) else parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "yaml, parts",
    [
        ("train: {num_steps: 2.5}", ["train.num_steps must be a whole number", "2.5", "in {file}"]),
        ("train: {lr: 2}", ["unknown key 'train.lr' in {file}", "optimizer.lr"]),
        ("train: 5", ["train in {file} is a section"]),
        ("train: {1: 2}", ["unknown key 'train.1' in {file}"]),
        ("output_dir: 5", ["output_dir must be text, in quotes", "is 5", "in {file}"]),
        ("lora: {rank: -1}", ["lora.rank is -1 in {file}", "at least 1"]),
        ("train:\n  num_steps: [1\n", ["{file}:3:1 is not valid YAML"]),
        ("train: {num_steps: 1, num_steps: 2}", ["{file}:1:23", "duplicate key num_steps"]),
        ("a: \x00", ["{file} is not valid YAML"]),
        ("- a", ["{file}", "is a list", "train: {num_steps: 1000}"]),
        ("5", ["{file} cannot be read"]),
        ("output_dir: ${oc.env:COGDS_NO_SUCH}/x", ["output_dir in {file}", "COGDS_NO_SUCH"]),
    ],
)
def test_files_are_refused_with_key_place_value_and_fix(yaml, parts, tmp_path):
    with pytest.raises(UserError) as error:
        load(yaml=yaml, tmp=tmp_path)
    for part in parts:
        assert part.replace("{file}", str(tmp_path / "run.yaml")) in str(error.value)


def test_a_missing_file_and_a_missing_key_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config file .*/no\.yaml does not exist.*--config"):
        config.load_config(str(tmp_path / "no.yaml"), REQUIRED)
    with pytest.raises(UserError, match=r"model\.path is not set \(the model.*model\.path=\.\.\. on the command line"):
        config.load_config(None, ["data.path=d"])
    with pytest.raises(UserError, match=r"data\.path is not set"):
        config.load_config(None, ["model.path=m"])


SETS = "data.sets="


def load_sets(*overrides: str) -> config.RunConfig:
    return config.load_config(None, ["model.path=m", *overrides])[0]


def test_several_data_sets():
    cfg = load_sets(SETS + "[{path: '${output_dir}/a'}, {path: b, repeats: 2, columns: {path: url}}]", "output_dir=o")
    assert cfg.data.sets == (config.SetConfig("o/a"), config.SetConfig("b", 2.0, columns={"path": "url"}))
    assert cfg.data.path == ""
    assert isinstance(hash(cfg), int)
    weighted = load_sets(SETS + "[{path: a, weight: 1}, {path: b, weight: 0.5}]").data.sets
    assert [one.weight for one in weighted] == [1.0, 0.5]


@pytest.mark.parametrize(
    "overrides, parts",
    [
        ([SETS + "[a, b]"], ["data.sets must be a list of mappings with path, repeats, weight, columns", "[a, b]"]),
        ([SETS + "{path: a}"], ["data.sets must be a list of mappings", "{path: a}"]),
        ([SETS + "null"], ["data.sets must be a list of mappings", "null"]),
        ([SETS + "[{paht: a}]"], ["unknown key 'paht' in data.sets[0]", "did you mean 'path'?"]),
        ([SETS + "[{path: a}, {repeats: 2}]"], ["data.sets[1].path is not set"]),
        ([SETS + "[{path: a}, {path: b, repeats: x}]"], ["data.sets[1].repeats must be a number, but is x"]),
        ([SETS + "[{path: a}, {path: b, repeats: 0}]"], ["data.sets[1].repeats is 0.0", "greater than 0"]),
        ([SETS + "[{path: 5}]"], ["data.sets[0].path must be text, in quotes"]),
        ([SETS + "[{path: ''}]"], ["data.sets[0].path is ''", "not empty"]),
        ([SETS + "[{path: a, columns: {txt: b}}]"], ["unknown column 'txt' in data.sets[0].columns"]),
        ([SETS + "[{path: a, columns: b}]"], ["data.sets[0].columns must be a mapping"]),
        ([SETS + "[{path: a, weight: 1}, {path: b}]"], ["data.sets[1] has no weight", "all sets or to none"]),
        ([SETS + "[{path: a, weight: 1, repeats: 2}]"], ["data.sets[0] has both repeats and weight"]),
        ([SETS + "[{path: a}]", "data.repeats=2"], ["data.repeats is set", "belongs to data.path"]),
        ([SETS + "[{path: a}]", "data.columns={path: x}"], ["data.columns is set", "belongs to data.path"]),
        ([SETS + "[{path: a}]", "data.path=b"], ["data.path and data.sets are both set", "remove one"]),
        (["data.sets[0].path=a"], ["unknown key 'data.sets[0].path'", "data.sets='[{path: a}, {path: b}]'"]),
    ],
)
def test_data_sets_are_refused_with_key_place_value_and_fix(overrides, parts):
    with pytest.raises(UserError) as error:
        load_sets(*overrides)
    for part in [*parts, "on the command line"]:
        assert part in str(error.value)


def test_of_path_and_sets_and_of_two_mappings_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  columns: {path: a, caption: b}\n  path: x\nmodel: {path: m}\n")
    assert config.load_config(str(file), ["data.columns={path: c}"])[0].data.columns == {"path": "c"}
    file.write_text("data:\n  path: x\nmodel: {path: m}\n")
    data = config.load_config(str(file), [SETS + "[{path: a}]"])[0].data
    assert (data.path, [one.path for one in data.sets]) == ("", ["a"])
    file.write_text("data:\n  sets:\n    - path: a\n    - {path: b}\nmodel: {path: m}\n")
    assert [one.path for one in config.load_config(str(file), [])[0].data.sets] == ["a", "b"]
    data = config.load_config(str(file), ["data.path=y"])[0].data
    assert (data.path, data.sets) == ("y", ())


def test_held_out_and_another_data_set_replace_each_other(tmp_path):
    assert load("eval.path=other", yaml="eval: {held_out: 0.1}", tmp=tmp_path).eval.held_out == 0
    with pytest.raises(UserError, match=r"eval\.held_out and eval\.path are both set on the command line"):
        load("eval.path=other", "eval.held_out=0.1")
    assert load("eval.path=other", "eval.held_out=0").eval.path == "other"  # as a run writes it down


def test_of_batch_size_and_tokens_per_batch_the_command_line_wins(tmp_path):
    yaml = "train: {tokens_per_batch: 5}"
    assert load(yaml=yaml, tmp=tmp_path).train.tokens_per_batch == 5
    cfg = load("train.batch_size=2", yaml=yaml, tmp=tmp_path)
    assert (cfg.train.batch_size, cfg.train.tokens_per_batch) == (2, None)
    assert load("train.tokens_per_batch=9", yaml="train: {batch_size: 2}", tmp=tmp_path).train.tokens_per_batch == 9
    with pytest.raises(UserError, match="both set on the command line"):
        load("train.batch_size=2", "train.tokens_per_batch=9")
    assert load("train.batch_size=2", "train.tokens_per_batch=null").train.batch_size == 2


def test_references_are_filled_in(monkeypatch):
    monkeypatch.setenv("COGDS_SCRATCH", "/scratch")
    cfg = load("data.cache_dir=${output_dir}/cache", "data.path=${oc.env:COGDS_SCRATCH}/clips")
    assert (cfg.data.cache_dir, cfg.data.path) == ("outputs/run/cache", "/scratch/clips")


def test_replace_checks_like_a_file():
    cfg = load()
    assert config.replace(cfg, {"train.num_steps": 5, "optimizer.betas": [0.1, 0.2]}).optimizer.betas == (0.1, 0.2)
    assert cfg.train.num_steps == 1000
    with pytest.raises(UserError, match=r"train\.num_steps must be a whole number, but is 2\.5 in ds\.json"):
        config.replace(cfg, {"train.num_steps": 2.5}, "in ds.json")


TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="$"), min_size=1, max_size=9)


@settings(max_examples=10, deadline=None)
@given(
    revision=st.none() | TEXTS | st.sampled_from(["12e4567", "yes", "0123", "null", "16:9", "1_0", "~", "2024-01-01"]),
    buckets=st.lists(TEXTS, max_size=3),
    lr=st.floats(0, 1),
    tokens=st.none() | st.integers(1, 10**9),
    columns=st.dictionaries(st.sampled_from(config.COLUMNS), TEXTS, max_size=3),
    sets=st.lists(st.fixed_dictionaries({"path": TEXTS, "repeats": st.floats(0.1, 9)}), max_size=3),
)
def test_to_yaml_reads_back_as_the_same_tree(tmp_path_factory, revision, buckets, lr, tokens, columns, sets):
    data = (
        {"data.sets": [{**one, "columns": columns} for one in sets], "data.path": ""}
        if sets
        else {"data.columns": columns}
    )
    changes = {
        **data,
        "model.revision": revision,
        "data.buckets": buckets,
        "optimizer.lr": lr,
        "train.tokens_per_batch": tokens,
    }
    cfg = config.replace(load(), changes)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(config.to_yaml(cfg))
    assert config.load_config(str(file), [])[0] == cfg


def test_to_dict_is_json_and_keeps_every_key():
    plain = config.to_dict(load())
    assert json.loads(json.dumps(plain)) == plain
    flat = {
        f"{k}.{n}" if isinstance(v, dict) else k for k, v in plain.items() for n in (v if isinstance(v, dict) else "_")
    }
    assert flat == set(config.KEYS)


def test_help_lists_every_key_with_default_unit_and_line():
    lines = config.help_text().splitlines()
    for name, key in config.KEYS.items():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        assert lines[at + 1].strip() == key.field.metadata["help"] != ""
        assert key.field.metadata["unit"] in lines[at]
        assert "(required)" in lines[at] if name == "model.path" else " = " in lines[at]
        for inner, inner_key in key.keys.items():
            line = next(i for i in range(at, len(lines)) if lines[i].startswith(f"      {inner} "))
            assert lines[line + 1].strip() == inner_key.field.metadata["help"] != ""
    assert "  train.num_steps = 1000  [optimizer steps]" in lines


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configs_load(file):
    cfg, explicit = config.load_config(str(file), [] if "data:\n  path" in file.read_text() else ["data.path=d"])
    assert {"output_dir", "model.path", "train.num_steps"} <= explicit
    assert cfg.output_dir.startswith("outputs/")


def test_the_demo_config_is_small_and_self_contained():
    cfg, _ = config.load_config(str(ROOT / "launch/configs/demo.yaml"), [])
    assert cfg.model.create_tiny
    assert cfg.data.draw_demo_clips
    assert cfg.train.precision == "fp32"
    sides = [int(side) for bucket in cfg.data.buckets for side in bucket.split("x")[1:]]
    assert all(side % 16 == 0 and side <= 96 for side in sides)


def test_the_reference_is_current():
    """`python docs/configuration.py` writes it."""
    assert (ROOT / "docs/configuration.md").read_text() == config.reference()


REMOVED = {
    "train.recompute=none": "train.activation_checkpointing",
    "train.recompute_by_bucket={9x64x64: none}": "train.activation_checkpointing_by_bucket",
    "train.gradient_checkpointing=true": "train.activation_checkpointing",
    "train.rehearse=on": "train.memory_check",
    "model.base=int8": "model.quantization",
    "model.matmul=float8": "model.fp8_matmul",
    "parallel.sequence=2": "parallel.sequence_size",
    "monitor.every=2": "metrics.every",
    "data.bucket_areas=[768x1360]": "data.bucket_sizes",
    "model.quantization=full": "none",
    "model.quantization=float8": "fp8",
    "train.activation_checkpointing=attention_kept": "selective",
    "train.activation_checkpointing=block": "full",
    "train.activation_checkpointing=block+offload": "full+offload",
    "train.activation_checkpointing_by_bucket={9x64x64: block}": "full",
}


@pytest.mark.parametrize("setting", REMOVED)
def test_a_removed_name_is_refused_with_the_new_one(setting, tmp_path):
    name, _, value = setting.partition("=")
    section, _, leaf = name.partition(".")
    yaml = f"{section}: {{{leaf}: {value}}}"
    for refuse in (lambda: load(setting), lambda: load(yaml=yaml, tmp=tmp_path)):
        with pytest.raises(UserError, match=rf"^{name}: .* Use {REMOVED[setting].replace('+', '[+]')}\.$"):
            refuse()


def test_every_removed_name_is_tested():
    values = {f"{key}={old}" for key, renamed in config.RENAMED_VALUES.items() for old in renamed}
    given = " ".join(REMOVED)
    assert all(name in given for name in config.RENAMED)
    assert all(value in given or "by_bucket" in value for value in values)
