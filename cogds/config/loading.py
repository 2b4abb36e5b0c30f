"""Read a `RunConfig` from YAML files and `key=value` texts, and write it. A later file wins over an earlier one, and
the command line over all files.

OmegaConf reads the values and resolves `${...}`; pydantic checks them. `load_config` also returns which keys were set,
because the DeepSpeed file must not silently override a key that was set (`config.deepspeed`).
"""

import difflib
import functools
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from cogds.config.schema import (
    ALTERNATIVES,
    KEYS,
    METHOD_DEFAULTS,
    RENAMED,
    RENAMED_VALUES,
    SECTIONS,
    RunConfig,
    element_section,
    get,
    is_list,
    is_text,
)
from cogds.errors import UserError, did_you_mean

Setting = tuple[str, str, Any]  # dotted key, place ("in run.yaml"), value
_COMMAND_LINE = "on the command line"
# Texts that may begin with a brace or a quote and need no others around them on the command line: {vid}.mp4.
_AS_TYPED = {"data.path_template", "data.where"}
# Replacements for pydantic's messages, by error type.
_EXPECTED = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text, in quotes",
    "string_pattern_mismatch": "must not be empty",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}
# Top-level keys of a DeepSpeed JSON that no run config has.
_DEEPSPEED_KEYS = {"zero_optimization", "bf16", "fp16", "train_batch_size", "train_micro_batch_size_per_gpu"}


def load_config(config_files: str | Sequence[str] | None, overrides: list[str]) -> tuple[RunConfig, frozenset[str]]:
    """The run config from YAML files and `key.sub=value` texts, and the dotted keys that these set. Later ones win."""
    files = [config_files] if isinstance(config_files, str) else config_files or ()
    settings = [*itertools.chain.from_iterable(map(_read_file, files)), *map(_parse_override, overrides)]
    for pair in ALTERNATIVES:
        settings = _choose(*pair, settings)
    settings = _without_stale_demo_clips(settings)
    _check_names((name, place) for name, place, _ in settings)
    places = {name: place for name, place, _ in settings}
    values = _interpolate({name: value for name, _, value in settings}, places)
    method_defaults = METHOD_DEFAULTS.get(str(values.get("train.method")), {})
    return _validate(method_defaults | values, places), frozenset(values)


def _without_stale_demo_clips(settings: list[Setting]) -> list[Setting]:
    """Remove data.draw_demo_clips if a later place sets data.path: clips are drawn only at the path of the demo."""
    last = {name: (index, place) for index, (name, place, _) in enumerate(settings)}
    drawn, path = last.get("data.draw_demo_clips"), last.get("data.path")
    if drawn is None or path is None or path < drawn or path[1] == drawn[1]:
        return settings
    return [setting for setting in settings if setting[0] != "data.draw_demo_clips"]


def replace(cfg: RunConfig, changes: Mapping[str, Any], place: str = "in the program") -> RunConfig:
    """A copy with changed values, such as `{"train.num_steps": 5}`, which are checked. place: for errors."""
    _check_names((name, place) for name in changes)
    tree = to_dict(cfg)
    set_before = {name: _lookup(tree, name) for name, field in KEYS.items() if get(cfg, name) != field.default}
    return _validate(set_before | dict(changes), dict.fromkeys(changes, place))


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, for JSON."""
    return cfg.model_dump(mode="json")


def to_yaml(cfg: RunConfig) -> str:
    """The whole config as a file that `load_config` reads back as an equal config."""
    tree = to_dict(cfg)
    if cfg.train.tokens_per_batch is not None:
        del tree["train"]["batch_size"]  # `load_config` refuses a file that sets both
    return OmegaConf.to_yaml(OmegaConf.create(_escape(tree)))


def is_run_config(tree: Any) -> bool:
    """Whether a parsed file has the top-level keys of a run config rather than a DeepSpeed config."""
    own_keys = (SECTIONS | KEYS.keys()) - {"optimizer", "checkpoint"}  # DeepSpeed has these too
    return isinstance(tree, dict) and bool(tree.keys() & own_keys) and not tree.keys() & _DEEPSPEED_KEYS


def _escape(node: Any) -> Any:
    """Escape `${` in all texts, so that OmegaConf does not resolve it."""
    if isinstance(node, dict):
        return {name: _escape(child) for name, child in node.items()}
    if isinstance(node, list):
        return [_escape(child) for child in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node


def _read_file(path: str) -> Iterator[Setting]:
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file. Pass a YAML file, or a recipe such as recipe:style.")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except yaml.YAMLError as error:
        raise _yaml_error(error, path, Path(path).read_text(encoding="utf-8-sig") + "\n") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}. Fix or replace the file.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a list, not sections with keys. Write for example `train: {{num_steps: 1000}}`.")
    if tree.keys() & _DEEPSPEED_KEYS:
        raise UserError(f"--config {path}: this is a DeepSpeed config. Pass it to --deepspeed, and a run config here.")
    for name, value in tree.items():
        is_section = name in SECTIONS or name in RENAMED
        if is_section and (isinstance(value, dict) or value is None):  # None: every line is commented out
            yield from ((f"{name}.{leaf}", f"in {path}", child) for leaf, child in (value or {}).items())
        else:
            yield str(name), f"in {path}", value


def _parse_override(text: str) -> Setting:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise UserError(f"command line: '{text}' is not KEY=VALUE. Write for example train.num_steps=100.")
    # Text is taken as typed: YAML would read the commit 12e4567 as infinity and 0123 as 83.
    if name in KEYS and is_text(KEYS[name]) and not raw.startswith(("[", "{", "'", '"')) and raw != "null":
        return name, _COMMAND_LINE, raw
    try:
        return name, _COMMAND_LINE, _parse_value(raw)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if name in _AS_TYPED:
            return name, _COMMAND_LINE, raw
        raise _yaml_error(error, f"{name}: {raw} {_COMMAND_LINE}", raw) from None


def _parse_value(raw: str) -> Any:
    return cast(dict, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False))["value"]


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _yaml_error(error: Exception, source: str, text: str) -> UserError:
    """source: the file or key that holds the text."""
    mark, opened, advice = getattr(error, "problem_mark", None), getattr(error, "context_mark", None), ""
    if mark and "\t" in "".join(text.splitlines()[mark.line : mark.line + 1])[: mark.column + 1]:
        advice = "Indent with spaces: YAML does not allow tabs."
    elif "duplicate key" in _problem(error):
        advice = "Keep one of them."
    elif opened and "quoted scalar" in getattr(error, "context", ""):
        advice = f"Close the quote that opens in line {opened.line + 1}."
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark and "\n" in text else source
    return UserError(f"{place}: not valid YAML: {_problem(error)}. {advice or 'Quote text with special characters.'}")


def _choose(first: str, second: str, settings: list[Setting]) -> list[Setting]:
    """If two keys that replace each other are both set, keep the one from the command line or the later file."""
    last = {name: (number, place, value) for number, (name, place, value) in enumerate(settings)}
    if any(last.get(name, (0, "", None))[2] in (None, "", [], (), 0) for name in (first, second)):
        return settings
    if last[first][1] == last[second][1]:
        raise UserError(f"{first}: {second} replaces it, but both are set {last[first][1]}. Remove one of them.")
    loser = first if last[second][0] > last[first][0] else second
    return [setting for setting in settings if setting[0] != loser]


def _interpolate(values: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Resolve `${...}` from these values, the defaults and OmegaConf's resolvers."""
    defaults = {name: field.default for name, field in KEYS.items() if field.default is not PydanticUndefined}
    tree = OmegaConf.create(_nest(defaults | values))
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        name = str(error.full_key).partition("[")[0]
        reason, place = str(error).splitlines()[0], places.get(name, "by default")
        raise UserError(
            f"{name}: cannot resolve {show(values.get(name))} {place}: {reason}. Set the value itself."
        ) from None
    resolved = {name: _lookup(plain, name) for name in values}
    for name, value in resolved.items():  # an environment variable is text
        if isinstance(value, str) and value != values[name] and not is_text(KEYS[name]):
            resolved[name] = _parse_value(value)
    return resolved


def _lookup(tree: Any, name: str) -> Any:
    return functools.reduce(operator.getitem, name.split("."), tree)


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, value in values.items():
        section, dot, leaf = name.rpartition(".")
        (tree[section] if dot else tree)[leaf] = value
    return tree


def _validate(values: Mapping[str, Any], places: Mapping[str, str]) -> RunConfig:
    for name, value in values.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{name}: not UTF-8 {places[name]}: {value!r}. Rename the file or folder.") from None
    listed = {
        name: [value] if is_list(KEYS[name]) and isinstance(value, str | int | float) else value
        for name, value in values.items()
    }
    try:
        # As JSON: strict validation of Python objects refuses a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(_nest(listed)), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_message(details, places) for details in error.errors())) from None


def _message(error: ErrorDetails, places: Mapping[str, str]) -> str:
    """Return the message for one of pydantic's errors. places: where each key was set."""
    kind, value = error["type"], error["input"]
    if kind == "value_error":  # of a model_validator, whose text names the key
        return str(error["ctx"]["error"])
    loc = [part for part in error["loc"] if part != "[key]"]
    top = next(name for name in KEYS if name.split(".") == loc[: name.count(".") + 1])
    field, place = KEYS[top], places.get(top, "by default")
    name = top + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[top.count(".") + 1 :])
    if kind == "extra_forbidden" and (inner := element_section(field)):
        near = did_you_mean(str(loc[-1]), inner.model_fields)
        return f"{name}: unknown key {place}{near}. Its keys are {', '.join(inner.model_fields)}."
    if kind == "literal_error" and (new := RENAMED_VALUES.get(top, {}).get(str(value))):
        return f"{name}: the value {value}, set {place}, is now called {new}. Use {new}."
    if kind == "too_long" or (kind == "missing" and isinstance(loc[-1], int)):  # of a list of fixed length
        name, text = top, f"must be a list of {len(get_args(field.annotation))}"
    elif kind == "missing":
        where = place if top in places else f"in the config file or with {top}=..."
        return f"{name}: not set. Set it {where}."
    else:
        text = _EXPECTED.get(kind) or error["msg"].replace("Input should be", "must be")
    if kind == "literal_error":
        text += did_you_mean(str(value), re.findall("'([^']+)'", text))
    if NoneType in get_args(field.annotation):
        text += " (or null)"
    return f"{name}: {text}, but is {show(value)} {place}. Change it there."


def _check_names(named: Iterable[tuple[str, str]]) -> None:
    """Refuse unknown keys, all in one error. named: keys and their places."""
    if unknown := [_unknown_key(name, place) for name, place in named if name not in KEYS]:
        raise UserError("\n".join(unknown))


def _unknown_key(name: str, place: str) -> str:
    """Return the message for a key that is not in the config."""
    section, _, leaf = name.partition(".")
    if new := RENAMED.get(name) or (section in RENAMED and leaf and f"{RENAMED[section]}.{leaf}"):
        return f"{name}: set {place}, but its name is now {new}. Use {new}."
    if name in SECTIONS:
        example = next(key for key in KEYS if key.startswith(f"{name}."))
        return f"{name}: a section, but set to a value {place}. Set its keys, for example {example}."
    whole = next((key for key in KEYS if name.startswith((f"{key}.", f"{key}["))), None)
    if whole:
        example = "'[{path: a}, {path: b}]'" if is_list(KEYS[whole]) else "'{name: text}'"
        return f"{name}: part of {whole}, set {place}. Set all of {whole}, for example {whole}={example}."
    # The section may be missing or wrong: `lr` or `train.lr` instead of optimizer.lr.
    same_leaf = [key for key in KEYS if key.split(".")[-1] == name.split(".")[-1]]
    near = difflib.get_close_matches(name, same_leaf or list(KEYS), n=1, cutoff=0.0 if same_leaf else 0.6)
    advice = f"Did you mean {near[0]}?" if near else "--help lists all keys."
    return f"{name}: unknown key {place}. {advice}"


def show(value: Any) -> str:
    """A value as YAML, as in a config file."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
