"""Reading and writing run configs: accepted values, and the key, value and place that errors name."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cogds.arguments import RECIPES, find_config
from cogds.config.loading import load_config, replace, to_dict, to_yaml
from cogds.config.schema import COLUMNS, KEYS, RENAMED, RENAMED_VALUES, RunConfig, SetConfig, get
from cogds.errors import UserError

ROOT = Path(__file__).parents[2]
REQUIRED = ["model.path=m", "data.path=d"]


def load(*overrides: str, required: list[str] = REQUIRED, yaml: str | bytes = "", tmp: Path | None = None) -> RunConfig:
    file = None
    if tmp is not None:
        file = tmp / "run.yaml"
        file.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
    return load_config(str(file) if file else None, [*required, *overrides])[0]


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load(*args, **kwargs)
    return str(error.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    yaml = "seed: 9\ntrain: {num_steps: 5, batch_size: 2}\noptimizer: {lr: 1e-5}\nlora:\n"
    cfg = load("train.num_steps=7", yaml=yaml, tmp=tmp_path)
    assert (cfg.train.num_steps, cfg.train.batch_size, cfg.optimizer.lr, cfg.lora.rank) == (7, 2, 1e-5, 128)
    assert cfg.seed == 9


def test_explicit_names_exactly_the_keys_that_were_set(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 0\ntrain: {num_steps: 1000}\n")
    _, explicit = load_config(str(file), [*REQUIRED, "lora.rank=128"])
    assert explicit == {"seed", "train.num_steps", "lora.rank", "model.path", "data.path"}


def test_the_config_is_frozen_and_can_be_sent_to_another_process():
    cfg = load("data.sets=[{path: a}]", required=["model.path=m"])
    with pytest.raises(ValidationError):
        cfg.train.num_steps = 3
    assert pickle.loads(pickle.dumps(cfg)) == cfg


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
        ("data.draw_demo_clips=yes", True),
        ("model.revision=12e4567", "12e4567"),  # YAML reads infinity
        ("model.revision=0123", "0123"),  # YAML reads 83
        ("model.revision=null", None),
        ("checkpoint.resume=no", "no"),  # YAML reads false
        ("model.compile=on", "on"),  # YAML reads true
        ("output_dir=a=b", "a=b"),
        ("output_dir='a b'", "a b"),
        ("train.tokens_per_batch=5", 5),
        ("data.columns={path: video, caption: 'long text'}", {"path": "video", "caption": "long text"}),
        ("data.columns={}", {}),
        ("data.default_caption=a film", "a film"),
    ],
)
def test_an_override_has_the_type_of_its_key(override, expected):
    value = get(load(override), override.split("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_a_file_from_an_editor_on_windows_is_read(tmp_path):
    cfg = load(yaml=b"\xef\xbb\xbf" + "train: {num_steps: 7}\r\noutput_dir: größe\r\n".encode(), tmp=tmp_path)
    assert (cfg.train.num_steps, cfg.output_dir) == (7, "größe")


def test_a_file_may_have_a_text_for_a_list_and_1e_4_for_a_number(tmp_path):
    cfg = load(yaml="lora: {target_modules: all-linear}\noptimizer: {lr: 1e-4, eps: 1}", tmp=tmp_path)
    assert cfg.lora.target_modules == ("all-linear",)
    assert (cfg.optimizer.lr, cfg.optimizer.eps) == (1e-4, 1.0)


# Override -> the key that the error names, if it is not the one before the equals sign.
REFUSED = {
    "train.batch_size=2.5": "", "train.batch_size=yes": "", "train.batch_size=null": "", "train.batch_size='2'": "",
    "train.tokens_per_batch=x": "", "optimizer.lr=fast": "", "optimizer.lr=true": "",
    "optimizer.betas=[0.9, b]": "optimizer.betas[1]", "data.bucket_frames=[49, 2.5]": "data.bucket_frames[1]",
    "data.bucket_aspect_ratios=[16:9]": "data.bucket_aspect_ratios[0]",  # YAML reads 969
    "data.buckets=[[a]]": "data.buckets[0]", "data.buckets={a: 1}": "", "data.draw_demo_clips=2": "",
    "model.path=[a]": "", "train.num_steps=0": "", "lora.rank=0": "", "lora.alpha=0": "", "lora.dropout=1": "",
    "optimizer.lr=-1": "", "optimizer.lr=nan": "", "optimizer.lr=.inf": "",
    "optimizer.betas=[0.9]": "", "optimizer.betas=[0, 0, 0]": "",
    "conditioning.caption_dropout=1.5": "", "train.precision=fp16": "", "output_dir=": "", "output_dir=' '": "",
    "data.bucket_sizes=[]": "", "train=3": "", "train.num_steps=[1": "", "data.path=${nope}": "",
    "data.columns=[a]": "", "data.columns=null": "", "data.columns={path: 5}": "data.columns.path",
    "data.columns={path: [a]}": "data.columns.path", "data.columns={paht: a}": "data.columns.paht",
    "data.columns={path: ' '}": "data.columns.path", "data.columns.path=a": "", "data.max_unusable=1.5": "",
    "data.repeats=0": "", "data.default_caption=": "", "output_dir=s3://b/run": "",
    "data.manifest=s3://b/m": "", "seed=9223372036854775808": "", "qqq=3": "",
}  # fmt: skip


@pytest.mark.parametrize("override", REFUSED)
def test_a_bad_override_names_key_place_and_value(override):
    name, _, value = override.partition("=")
    message = refused(override)
    assert message.startswith(f"{REFUSED[override] or name}: ")
    if name in KEYS and value.strip("' []{}") and "," not in value and ":" not in value:
        assert value.strip("'[]").removeprefix("{")[:4] in message.replace("true", "true yes").replace("inf", ".inf")


@pytest.mark.parametrize(
    "setting, near",
    {
        "num_steps=3": "train.num_steps",
        "lr=3": "optimizer.lr",
        "train.lr=3": "optimizer.lr",
        "optimiser.lr=3": "optimizer.lr",
        "train.num_stps=3": "train.num_steps",
        "conditioning.image_latents=scalled": "'scaled'",
        "optimizer.schedule=constnat": "'constant'",
        "data.windows=frist": "'first'",
        "data.columns={paht: a}": "'path'",
        "data.sets=[{path: a, repeets: 2}]": "'repeats'",
    }.items(),
)
def test_the_nearest_name_is_suggested(setting, near):
    message = refused(setting, required=["model.path=m"]).lower()
    assert f"did you mean {near}" in message
    assert "on the command line" in message


@pytest.mark.parametrize("text", ["train.num_steps", "=3"])
def test_an_override_without_key_or_value_is_quoted(text):
    assert refused(text).startswith(f"command line: '{text}'")


@pytest.mark.parametrize(
    "yaml, start",
    [
        ("train: {num_steps: 2.5}", "train.num_steps: "),
        ("train: {lr: 2}", "train.lr: "),
        ("train: 5", "train: "),
        ("train: {1: 2}", "train.1: "),
        ("output_dir: 5", "output_dir: "),
        ("checkpoint: {resume: no}", "checkpoint.resume: "),  # YAML reads false
        ("model: {revision: 12e45}", "model.revision: "),  # YAML reads a number
        ("lora: {rank: -1}", "lora.rank: "),
        ("output_dir: ${oc.env:COGDS_NO_SUCH}/x", "output_dir: "),
        ("train:\n  num_steps: [1\n", "{file}:3:1: "),
        ("a: \x00", "{file}: "),
        ("- a", "{file}: "),
        ("5", "{file}: "),
        (b"\xff\xfe\x00", "{file}: "),
    ],
)
def test_a_bad_file_names_key_or_line(yaml, start, tmp_path):
    message = refused(yaml=yaml, tmp=tmp_path)
    assert message.startswith(start.replace("{file}", str(tmp_path / "run.yaml")))
    assert str(tmp_path / "run.yaml") in message


@pytest.mark.parametrize(
    "yaml, line, advice",
    [
        ("train:\n\tnum_steps: 3\n", 2, "spaces"),
        ("train: {num_steps: 1}\nseed: 1\nseed: 2\n", 3, "Keep one"),
        ("seed: 1\noutput_dir: 'a\ntrain: {num_steps: 1}\n", 4, "quote that opens in line 2"),
        ("output_dir: @a\n", 1, "Quote"),
    ],
)
def test_invalid_yaml_is_reported_with_its_line_and_a_remedy(yaml, line, advice, tmp_path):
    message = refused(yaml=yaml, tmp=tmp_path)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:{line}:")
    assert advice in message


def test_every_error_is_reported_at_once(tmp_path):
    message = refused("lora.rank=0", yaml="train: {num_steps: 0}\n", tmp=tmp_path)
    assert [line.partition(":")[0] for line in message.splitlines()] == ["lora.rank", "train.num_steps"]
    assert "on the command line" in message.splitlines()[0]
    assert str(tmp_path / "run.yaml") in message.splitlines()[1]
    unknown = refused("lora.rnk=4", "train.rehearse=on", "lora.rank=0")
    assert [line.partition(":")[0] for line in unknown.splitlines()] == ["lora.rnk", "train.rehearse"]


def test_a_missing_file_and_a_missing_key_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^--config .*/no\.yaml: "):
        load_config(str(tmp_path / "no.yaml"), REQUIRED)
    assert refused(required=["data.path=d"]).startswith("model.path: ")
    assert refused(required=["model.path=m"]).startswith("data.path: ")


def test_a_deepspeed_config_given_as_run_config_is_recognized():
    with pytest.raises(UserError, match="Pass it to --deepspeed"):
        load_config(str(ROOT / "ds_configs/zero2.json"), REQUIRED)


def test_a_path_that_is_not_utf8_is_refused():
    assert refused("output_dir=a\udcff").startswith("output_dir: ")


# Several datasets.


def load_sets(*overrides: str) -> RunConfig:
    return load(*overrides, required=["model.path=m"])


def test_several_data_sets():
    cfg = load_sets(
        "data.sets=[{path: '${output_dir}/a'}, {path: b, repeats: 2, columns: {path: url}}]", "output_dir=o"
    )
    assert cfg.data.sets == (SetConfig(path="o/a"), SetConfig(path="b", repeats=2.0, columns={"path": "url"}))
    assert cfg.data.path == ""
    weighted = load_sets("data.sets=[{path: a, weight: 1}, {path: b, weight: 0.5}]").data.sets
    assert [data_set.weight for data_set in weighted] == [1.0, 0.5]


@pytest.mark.parametrize(
    "sets, more, name",
    [
        ("[a, b]", "", "data.sets[0]"),
        ("{path: a}", "", "data.sets"),
        ("null", "", "data.sets"),
        ("[{paht: a}]", "", "data.sets[0].path"),
        ("[{path: a, paht: a}]", "", "data.sets[0].paht"),
        ("[{path: a}, {repeats: 2}]", "", "data.sets[1].path"),
        ("[{path: a}, {path: b, repeats: x}]", "", "data.sets[1].repeats"),
        ("[{path: a}, {path: b, repeats: 0}]", "", "data.sets[1].repeats"),
        ("[{path: 5}]", "", "data.sets[0].path"),
        ("[{path: ''}]", "", "data.sets[0].path"),
        ("[{path: a, columns: {txt: b}}]", "", "data.sets[0].columns.txt"),
        ("[{path: a, columns: b}]", "", "data.sets[0].columns"),
        ("[{path: a, weight: 1}, {path: b}]", "", "data.sets[1].weight"),
        ("[{path: a, weight: 1, repeats: 2}]", "", "data.sets[0].repeats"),
        ("[{path: a}]", "data.repeats=2", "data.repeats"),
        ("[{path: a}]", "data.columns={path: x}", "data.columns"),
        ("[{path: a}]", "data.path=b", "data.path"),
        ("[{path: a}]", "data.sets[0].path=a", "data.sets[0].path"),
    ],
)
def test_a_bad_data_set_names_its_key(sets, more, name):
    assert refused(f"data.sets={sets}", *[more] * bool(more), required=["model.path=m"]).startswith(f"{name}: ")


# Keys that replace each other.


def test_of_two_mappings_and_of_path_and_sets_the_command_line_wins(tmp_path):
    yaml = "data:\n  columns: {path: a, caption: b}\n  path: x\n"
    assert load("data.columns={path: c}", required=["model.path=m"], yaml=yaml, tmp=tmp_path).data.columns == {
        "path": "c"
    }
    data = load("data.sets=[{path: a}]", required=["model.path=m"], yaml="data: {path: x}", tmp=tmp_path).data
    assert (data.path, [data_set.path for data_set in data.sets]) == ("", ["a"])
    data = load("data.path=y", required=["model.path=m"], yaml="data: {sets: [{path: a}]}", tmp=tmp_path).data
    assert (data.path, data.sets) == ("y", ())


def test_held_out_and_another_data_set_replace_each_other(tmp_path):
    assert load("eval.path=other", yaml="eval: {held_out: 0.1}", tmp=tmp_path).eval.held_out == 0
    assert refused("eval.path=other", "eval.held_out=0.1").startswith("eval.held_out: ")
    assert load("eval.path=other", "eval.held_out=0").eval.path == "other"  # as in a run's own run.yaml


def test_of_batch_size_and_tokens_per_batch_the_command_line_wins(tmp_path):
    yaml = "train: {tokens_per_batch: 5}"
    assert load(yaml=yaml, tmp=tmp_path).train.tokens_per_batch == 5
    cfg = load("train.batch_size=2", yaml=yaml, tmp=tmp_path)
    assert (cfg.train.batch_size, cfg.train.tokens_per_batch) == (2, None)
    assert load("train.tokens_per_batch=9", yaml="train: {batch_size: 2}", tmp=tmp_path).train.tokens_per_batch == 9
    assert refused("train.batch_size=2", "train.tokens_per_batch=9").startswith("train.batch_size: ")
    assert load("train.batch_size=2", "train.tokens_per_batch=null").train.batch_size == 2


# Interpolation, copies, files.


def test_references_are_resolved(monkeypatch):
    monkeypatch.setenv("COGDS_SCRATCH", "/scratch")
    monkeypatch.setenv("COGDS_STEPS", "7")
    cfg = load("data.cache_dir=${output_dir}/cache", "data.path=${oc.env:COGDS_SCRATCH}/clips",
               "train.num_steps=${oc.env:COGDS_STEPS}", "sample.seed=${seed}", "seed=3")  # fmt: skip
    assert (cfg.data.cache_dir, cfg.data.path) == ("outputs/run/cache", "/scratch/clips")
    assert (cfg.train.num_steps, cfg.sample.seed) == (7, 3)


def test_replace_checks_like_a_file_and_keeps_the_rest():
    cfg = load("lora.rank=4")
    changed = replace(cfg, {"train.num_steps": 5, "optimizer.betas": [0.1, 0.2]})
    assert (changed.optimizer.betas, changed.lora.rank, cfg.train.num_steps) == ((0.1, 0.2), 4, 1000)
    for changes in ({"train.num_steps": 2.5}, {"train.num_stepz": 2}):
        with pytest.raises(UserError, match=rf"^{next(iter(changes))}: .* in ds\.json"):
            replace(cfg, changes, "in ds.json")


TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)


@settings(max_examples=10, deadline=None)
@given(
    revision=st.none() | TEXTS | st.sampled_from(["12e4567", "yes", "0123", "null", "16:9", "1_0", "~", "2024-01-01"]),
    buckets=st.lists(TEXTS, max_size=3),
    lr=st.floats(0, 1),
    tokens=st.none() | st.integers(1, 10**9),
    columns=st.dictionaries(st.sampled_from(COLUMNS), TEXTS, max_size=3),
    sets=st.lists(st.fixed_dictionaries({"path": TEXTS, "repeats": st.floats(0.1, 9)}), max_size=3),
)
@example(revision=r"\${seed}", buckets=["${a}", r"\\${"], lr=1e-4, tokens=None, columns={"path": "$"}, sets=[])
def test_to_yaml_reads_back_as_an_equal_config(tmp_path_factory, revision, buckets, lr, tokens, columns, sets):
    changes = {
        "model.revision": revision,
        "data.buckets": buckets,
        "optimizer.lr": lr,
        "train.tokens_per_batch": tokens,
    }
    if sets:
        changes |= {"data.sets": [{**data_set, "columns": columns} for data_set in sets], "data.path": ""}
    else:
        changes |= {"data.columns": columns}
    cfg = replace(load(), changes)
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(to_yaml(cfg))
    assert load_config(str(file), [])[0] == cfg


def test_to_dict_is_json_and_keeps_every_key():
    tree = to_dict(load())
    assert json.loads(json.dumps(tree)) == tree
    assert all(name in tree.get(section, tree) for section, _, name in (key.rpartition(".") for key in KEYS))


# Former names.

FORMER = {
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


@pytest.mark.parametrize("setting", FORMER)
def test_a_former_name_is_refused_with_the_new_name(setting, tmp_path):
    name, _, value = setting.partition("=")
    section, _, leaf = name.partition(".")
    for message in (refused(setting), refused(yaml=f"{section}: {{{leaf}: {value}}}", tmp=tmp_path)):
        assert message.startswith(name)
        assert message.endswith(f"Use {FORMER[setting]}.")


def test_every_former_name_is_covered():
    given_names = " ".join(FORMER)
    assert all(name in given_names for name in RENAMED)
    assert all(f"={old}" in given_names for renamed in RENAMED_VALUES.values() for old in renamed)
    assert not {new for new in RENAMED.values() if new not in KEYS} - {"metrics"}


# Shipped files, and imports.


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_configs_load(file):
    cfg, explicit = load_config(str(file), [] if "data:\n  path" in file.read_text() else ["data.path=d"])
    assert {"output_dir", "model.path", "train.num_steps"} <= explicit
    assert cfg.output_dir.startswith("outputs/")


def test_the_demo_config_is_small_and_self_contained():
    cfg, _ = load_config(str(ROOT / "launch/configs/demo.yaml"), [])
    assert cfg.model.path == "builtin:shapes"
    assert cfg.data.draw_demo_clips
    assert cfg.train.precision == "fp32"
    sides = [int(side) for bucket in cfg.data.buckets for side in bucket.split("x")[1:]]
    assert all(side % 16 == 0 and side <= 96 for side in sides)


def test_demo_clips_are_drawn_only_at_the_path_of_the_demo(tmp_path):
    own = tmp_path / "run.yaml"
    own.write_text("data:\n  path: clips\n")
    demo = str(ROOT / "launch/configs/demo.yaml")
    assert not load_config(demo, ["data.path=clips"])[0].data.draw_demo_clips
    assert not load_config([demo, str(own)], [])[0].data.draw_demo_clips
    assert load_config([str(own), demo], [])[0].data.draw_demo_clips
    assert load_config(demo, ["data.draw_demo_clips=true", "data.path=clips"])[0].data.draw_demo_clips


def test_importing_the_config_loads_neither_torch_nor_deepspeed():
    imports = "import sys, cogds.config.reference, cogds.config.deepspeed"
    code = imports + "; print({'torch', 'deepspeed', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    "setting, value",
    [
        ("data.path_template={vid}.mp4", "{vid}.mp4"),
        ('data.path_template="{vid}.mp4"', "{vid}.mp4"),
        ("data.where='a: b' == name", "'a: b' == name"),
        ("data.where=score > 5 and name in ['a', 'b']", "score > 5 and name in ['a', 'b']"),
    ],
)
def test_templates_and_filters_need_no_quotes_on_the_command_line(setting, value):
    cfg, _ = load_config(None, ["model.path=m", "data.path=d", "output_dir=o", setting])
    assert getattr(cfg.data, setting.split("=")[0].removeprefix("data.")) == value


def test_later_files_win_and_the_command_line_wins_over_all(tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: a\nmodel: {path: m}\ntrain: {num_steps: 1, batch_size: 2}\n")
    (tmp_path / "b.yaml").write_text("train: {num_steps: 3, tokens_per_batch: 9}\nlora: {rank: 4}\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    cfg, explicit = load_config(files, ["data.path=d", "lora.rank=8"])
    assert (cfg.output_dir, cfg.train.num_steps, cfg.train.tokens_per_batch, cfg.lora.rank) == ("a", 3, 9, 8)
    assert "train.batch_size" not in explicit  # tokens_per_batch, of the later file, replaces it
    reversed_cfg, _ = load_config(files[::-1], ["data.path=d"])
    assert (reversed_cfg.train.num_steps, reversed_cfg.train.batch_size, reversed_cfg.lora.rank) == (1, 2, 4)
    assert reversed_cfg.train.tokens_per_batch is None
    (tmp_path / "a.yaml").write_text("train: {num_step: 1}")
    with pytest.raises(UserError, match=rf"^train\.num_step: unknown key in {re.escape(files[0])}"):
        load_config(files, ["data.path=d"])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name):
    cfg, explicit = load_config(find_config(f"recipe:{name}", "run_configs", ".yaml"), ["data.path=clips"])
    shipped, of_shipped = load_config(find_config("cogvideox1.5_i2v_lora", "run_configs", ".yaml"), ["data.path=clips"])
    assert of_shipped <= explicit
    assert (cfg.model, cfg.data.fps, cfg.conditioning) == (shipped.model, shipped.data.fps, shipped.conditioning)
    assert cfg.output_dir == f"outputs/{name}"
    assert cfg.eval.held_out == 0.1


def test_an_unknown_recipe_is_named():
    with pytest.raises(UserError, match=r"^--config recipe:stile: .*did you mean 'style'.*recipe:motion"):
        find_config("recipe:stile", "run_configs", ".yaml")


def test_the_default_learning_rate_depends_on_the_method():
    needed = ["model.path=x", "data.path=y"]
    cfg, explicit = load_config(None, [*needed, "train.method=full"])
    assert cfg.optimizer.lr == 1e-5
    assert "optimizer.lr" not in explicit
    assert load_config(None, needed)[0].optimizer.lr == 1e-4
    cfg, explicit = load_config(None, [*needed, "train.method=full", "optimizer.lr=1e-4"])
    assert cfg.optimizer.lr == 1e-4
    assert replace(cfg, {"train.num_steps": 5}).optimizer.lr == 1e-4
    assert replace(load_config(None, [*needed, "train.method=full"])[0], {"seed": 1}).optimizer.lr == 1e-5


@pytest.mark.parametrize("setting", ["context_latents=3", "context_s=1"])
def test_a_context_that_no_mode_uses_is_refused(setting):
    words = ["model.path=x", "data.path=y", f"conditioning.{setting}"]
    with pytest.raises(UserError, match=rf"^conditioning\.{setting.partition('=')[0]}: set, but no mode uses it"):
        load_config(None, words)
    load_config(None, [*words, "conditioning.modes={suffix: 1}"])


def test_the_device_of_a_moving_average_needs_one():
    with pytest.raises(UserError, match=r"^full\.ema_device: .*full\.ema_decay"):
        load_config(None, ["model.path=x", "data.path=y", "train.method=full", "full.ema_device=cpu"])


@pytest.mark.parametrize(
    "setting, method, key",
    [
        ("full.modules=[attn1]", "lora", "full.modules"),
        ("full.ema_decay=0.9", "lora", "full.ema_decay"),
        ("lora.init_from=a.safetensors", "full", "lora.init_from"),
        ("model.quantization=int8", "full", "model.quantization"),
        ("model.fp8_matmul=true", "full", "model.fp8_matmul"),
    ],
)
def test_settings_of_the_other_method_are_refused(setting, method, key):
    with pytest.raises(UserError, match=rf"^{key}: .*train\.method"):
        load_config(None, ["model.path=x", "data.path=y", f"train.method={method}", setting])
