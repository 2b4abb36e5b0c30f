"""The run config: one frozen dataclass tree, filled from a YAML file and `key.sub=value` overrides.

Every key stands here once, with its default, unit, range and one line of help; `help_text` prints them. OmegaConf
reads, converts and merges: defaults, then the file, then the command line. Besides the tree, `load_config` returns
which keys were set, because a key that was set must not lose against the DeepSpeed file in silence
(`runtime.ds_config`).
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from cogds.errors import UserError, did_you_mean


def field_(default: Any, help: str, unit: str = "", **limits: Any) -> Any:
    """One key. limits: ge, gt, le, lt (of the value, or of every element of a list), choices, length (of a list)."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, **limits})


# Attention kernels and what may be recomputed, by the names of `model.attention` and `train.recompute`.
ATTENTION_KERNELS = ("torch", "flash", "cudnn", "efficient", "flash3", "flash4", "math")
RECOMPUTE_LEVELS = ("none", "attention_kept", "block", "block+offload")
# How the frozen weights are held and multiplied, by the names of `model.base` and `model.matmul`.
BASES = ("full", "int8", "float8", "nf4")
MATMULS = ("full", "float8")

# What a table's column may hold, by our names.
COLUMNS = ("path", "caption", "kind", "image", "start_s", "end_s")


_COLUMNS_FIELD = {
    "help": f"which column of a table holds what: ours ({', '.join(COLUMNS)}) to the table's own",
    "unit": "",
    "names": COLUMNS,
}


@dataclass(frozen=True)
class ModelConfig:
    path: str = field_(MISSING, "the model to tune: a hub id or a local diffusers folder")
    revision: str | None = field_(None, "commit, tag or branch of a hub model")
    create_tiny: bool = field_(False, "make a tiny random model at model.path if nothing is there")
    attention: str = field_(
        "auto",
        "attention kernel; auto: the fastest here, tried on the largest bucket at start-up; all are exact",
        choices=("auto", *ATTENTION_KERNELS),
    )
    compile: str = field_(
        "auto",
        "torch.compile the transformer's block; auto: on GPUs",
        choices=("auto", "on", "off"),
    )
    base: str = field_(
        "full",
        "how the frozen weights of the blocks are held: in train.precision, in 8 bits (int8 or float8, by torchao) or "
        "in 4 (nf4, by bitsandbytes)",
        choices=BASES,
    )
    matmul: str = field_(
        "full",
        "how they multiply: in train.precision, or both sides in float8, where the GPU has it, with a base of full or "
        "float8",
        choices=MATMULS,
    )


@dataclass(frozen=True)
class SetConfig:
    """One of several data sets."""

    path: str = field_(MISSING, "the data set: a folder of clips, or a list or table of them")
    repeats: float = field_(1.0, "how often every clip is trained in one epoch; may be a fraction", "times", gt=0)
    weight: float | None = field_(
        None,
        "instead of repeats: this set's share of the training, whatever its size; all sets or none",
        "relative to the other sets",
        gt=0,
    )
    # A dict has no hash: trees that differ only here share one, which is allowed.
    columns: dict[str, str] = dataclasses.field(default_factory=dict, hash=False, metadata=_COLUMNS_FIELD)


@dataclass(frozen=True)
class DataConfig:
    path: str = field_("", "the dataset: a folder of clips, or a list or table of them; or give data.sets")
    sets: tuple[SetConfig, ...] = field_((), "instead of data.path: several data sets, a list of mappings")
    # A dict has no hash: trees that differ only here share one, which is allowed.
    columns: dict[str, str] = dataclasses.field(default_factory=dict, hash=False, metadata=_COLUMNS_FIELD)
    repeats: float = field_(1.0, "how often every clip is trained in one epoch; may be a fraction", "times", gt=0)
    default_caption: str | None = field_(None, "caption of clips that have none; null: such clips are unusable")
    max_unusable: float = field_(0.1, "training is refused where more of the clips cannot be used", "share", ge=0, le=1)
    manifest: str | None = field_(
        None, "the Parquet table of what every clip's file holds; null: made and kept in data.cache_dir"
    )
    draw_demo_clips: bool = field_(False, "draw the demo clips at data.path if nothing is there")
    buckets: tuple[str, ...] = field_(
        (), "clip shapes, FRAMESxHEIGHTxWIDTH; none: made from the three keys below", "pixels"
    )
    bucket_sizes: tuple[str, ...] = field_(
        ("768p",), "sizes of the generated buckets: the short side (768p), or HEIGHTxWIDTH for its area", "pixels"
    )
    bucket_aspect_ratios: tuple[str, ...] = field_(
        ("16/9", "4/3", "1/1", "3/4", "9/16"), "width/height of the generated buckets"
    )
    bucket_frames: tuple[int, ...] = field_((49, 81), "lengths of the generated buckets", "frames", ge=1)
    fps: float = field_(16.0, "frame rate that clips are resampled to", "frames/s", gt=0)
    windows: str = field_(
        "first",
        "which parts of a clip longer than its bucket are used: its beginning, one at a random place, some evenly "
        "spaced, or all that follow one another without overlap",
        choices=("first", "random", "uniform", "all"),
    )
    num_windows: int = field_(
        0, "windows per clip; uniform: so many, 0 is one, the middle; all: at most so many, 0 is no limit", ge=0
    )
    encode: str = field_(
        "cached",
        "clips are encoded once before training and kept in data.cache_dir, or by every step anew",
        choices=("cached", "on_the_fly"),
    )
    vae_tiling: str = field_(
        "auto",
        "encode clips in tiles: less memory, more time; auto: where a whole clip does not fit",
        choices=("auto", "on", "off"),
    )
    decoder: str = field_(
        "pyav",
        "pyav refuses damaged files; decord does not see most damage and is for files that are known to be sound",
        choices=("pyav", "decord"),
    )
    decode_timeout_s: float = field_(300.0, "a file that takes longer to read is unusable", "seconds", gt=0)
    decode_memory_gb: float = field_(8.0, "a file that needs more memory to read is unusable", "GB", gt=0)
    sync: str = field_(
        "bucket",
        "ranks train the same bucket at the same time, or different buckets of about the same cost",
        choices=("bucket", "cost"),
    )
    cost_tolerance: float = field_(
        0.03, "by how much the cost of ranks may differ where data.sync is cost", "share", ge=0, lt=1
    )
    cache_dir: str = field_("outputs/cache", "where encoded clips and captions are kept")
    shard_gb: float = field_(1.0, "size of one file of the cache", "GB", gt=0)
    num_workers: int = field_(2, "loader processes per rank; 0 loads in the training process", "processes", ge=0)


@dataclass(frozen=True)
class ConditioningConfig:
    image_latents: str = field_(
        "pipeline",
        "scale of the first frame's latents: as the diffusers pipeline does (x 1/scaling_factor where the VAE's config "
        "says invert_scale_latents), scaled (x scaling_factor) or unscaled (x 1)",
        choices=("pipeline", "scaled", "unscaled"),
    )
    image_noise: bool = field_(True, "add noise to the first frame's pixels before the VAE")
    image_noise_log_mean: float = field_(-3.0, "mean of ln(sigma) of that noise", "ln(sigma)")
    image_noise_log_std: float = field_(0.5, "standard deviation of ln(sigma) of that noise", "ln(sigma)", ge=0)
    image_dropout: float = field_(0.05, "how often the first frame is withheld", "probability", ge=0, le=1)
    caption_dropout: float = field_(0.1, "how often the caption is withheld", "probability", ge=0, le=1)


@dataclass(frozen=True)
class LoraConfig:
    rank: int = field_(128, "rank of the adapter", ge=1)
    alpha: float = field_(128.0, "strength: the adapter's output is scaled by alpha/rank", gt=0)
    dropout: float = field_(0.0, "dropout on the adapter's input", "probability", ge=0, lt=1)
    target_modules: tuple[str, ...] = field_(
        ("to_q", "to_k", "to_v", "to_out.0"),
        "which linear layers get an adapter, by the end of their name; or all-linear",
    )
    init_from: str | None = field_(
        None, "start from this LoRA: a .safetensors file or folder, in any format, of the same rank and layers"
    )
    init_alpha: float | None = field_(None, "alpha of lora.init_from if its file names none; null: its rank", gt=0)


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = field_(1e-4, "learning rate after the warm-up", ge=0)
    betas: tuple[float, ...] = field_((0.9, 0.95), "AdamW's two decay rates", ge=0, lt=1, length=2)
    eps: float = field_(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = field_(1e-3, "AdamW's weight decay", ge=0)
    max_grad_norm: float = field_(1.0, "gradients are clipped to this global norm; 0 turns clipping off", ge=0)
    schedule: str = field_("constant", "learning rate after the warm-up", choices=("constant", "cosine", "linear"))
    warmup_steps: int = field_(100, "linear warm-up from 0", "optimizer steps", ge=0)
    final_lr_ratio: float = field_(0.0, "where cosine and linear end, as a fraction of lr", ge=0, le=1)


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int = field_(1000, "length of the run", "optimizer steps", ge=1)
    batch_size: int = field_(1, "clips per rank and micro-step", "clips", ge=1)
    tokens_per_batch: int | None = field_(
        None, "instead of batch_size: a bucket's batch is as many clips as fit in this, at least one", "tokens", ge=1
    )
    gradient_accumulation_steps: int = field_(1, "micro-steps per optimizer step", "micro-steps", ge=1)
    recompute: str = field_(
        "auto",
        "activations that the backward pass computes anew: none; all but attention's outputs (attention_kept); the "
        "whole block; and its input kept in host memory (block+offload); auto: the first that fits, for every bucket",
        choices=("auto", *RECOMPUTE_LEVELS),
    )
    # A dict has no hash: trees that differ only here share one, which is allowed.
    recompute_by_bucket: dict[str, str] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={
            "help": "train.recompute of single buckets, such as {81x768x1360: block}",
            "unit": "",
            "choices": ("auto", *RECOMPUTE_LEVELS),
        },
    )
    rehearse: str = field_(
        "auto",
        "try the bucket that takes most memory before the first step, so that a run that cannot fit fails at once; "
        "auto: on GPUs",
        choices=("auto", "on", "off"),
    )
    precision: str = field_("bf16", "number format of the transformer", choices=("bf16", "fp32"))
    timeout_s: float = field_(
        7200.0, "how long ranks wait for one another, the slowest's share of the encoding included", "seconds", gt=0
    )
    step_timeout_s: float = field_(
        1800.0,
        "a step (or a save) that takes longer is taken for hung: stacks are dumped and the job ends",
        "seconds",
        gt=0,
    )
    max_bad_steps: int = field_(
        10,
        "the run ends after so many steps in a row with a loss or gradient that is not finite",
        "optimizer steps",
        ge=1,
    )


@dataclass(frozen=True)
class ParallelConfig:
    sequence: int = field_(
        1,
        "how many ranks share one clip, each with a part of its tokens (DeepSpeed's Ulysses); divides the number of "
        "ranks and of the model's attention heads",
        "ranks",
        ge=1,
    )


@dataclass(frozen=True)
class EvalConfig:
    """The evaluation loss during training."""

    every: int | None = field_(
        500, "evaluate so often, and before the first and after the last step; null: never", "optimizer steps", ge=1
    )
    held_out: float = field_(
        0.0,
        "this share of the files, chosen by a hash of their names below the data set's folder, is never trained, only "
        "evaluated",
        "share",
        ge=0,
        lt=1,
    )
    path: str | None = field_(
        None,
        "instead of eval.held_out: evaluate this data set; a folder, list or table of clips (with data.columns)",
    )
    num_clips: int = field_(
        8,
        "so many clips are evaluated, spread over the buckets, of those held out and as many of those trained",
        "clips",
        ge=1,
    )
    num_timesteps: int = field_(9, "at so many timesteps, the middles of equal parts of the schedule", ge=1)


@dataclass(frozen=True)
class PromptConfig:
    """One video to make during training."""

    prompt: str = field_(MISSING, "what the video shows")
    image: str = field_(MISSING, "its first frame, a picture file; resized to cover the size, then cropped")
    size: str | None = field_(None, "FRAMESxHEIGHTxWIDTH; null: the bucket that crops the image least", "pixels")
    seed: int | None = field_(None, "seed of its noise; null: sample.seed", ge=0, lt=2**63)


@dataclass(frozen=True)
class SampleConfig:
    """Videos made during training, with the weights as they are then."""

    every: int | None = field_(
        None, "make videos so often, and before the first and after the last step; null: never", "optimizer steps", ge=1
    )
    prompts: tuple[PromptConfig, ...] = field_((), "what to make videos of; none: evaluated clips, see num_clips")
    num_clips: int = field_(
        2, "without prompts: videos from the captions and first frames of so many clips, held-out ones if there are",
        "clips", ge=1,
    )  # fmt: skip
    num_steps: int = field_(50, "denoising steps", ge=1)
    guidance: float = field_(6.0, "classifier-free guidance; 1 turns it off", ge=1)
    seed: int = field_(0, "seed of the noise", ge=0, lt=2**63)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = field_(500, "save so often; the last step is always saved", "optimizer steps", ge=1)
    keep_last: int = field_(3, "older checkpoints are removed", "checkpoints", ge=1)
    keep_every: int | None = field_(
        None, "checkpoints of steps that this divides are kept for good", "optimizer steps", ge=1
    )
    resume: str = field_("auto", "auto (the latest in output_dir, if any), none, or the path of a checkpoint")


@dataclass(frozen=True)
class MonitorConfig:
    every: int = field_(1, "write to TensorBoard, metrics and progress so often", "optimizer steps", ge=1)
    progress_bar: bool = field_(True, "show a progress bar on a terminal")
    norms_every: int | None = field_(
        10, "norms of the LoRA's weights and of a step's update, by depth, so often; null: never", "optimizer steps",
        ge=1,
    )  # fmt: skip
    show_clips: int = field_(
        16, "so many of the first clips trained are shown in TensorBoard, as first frames with captions", "clips", ge=0
    )
    show_batches: int = field_(
        0, "and the batches of so many first steps are decoded from their latents, on rank 0, and play there",
        "optimizer steps", ge=0,
    )  # fmt: skip


@dataclass(frozen=True)
class NetworkConfig:
    """How the ranks reach one another; every rank sets it for itself, so that no launcher has to pass it on."""

    interface: str | None = field_(
        None, "network interface of NCCL and gloo, such as eth0 or ib0; null: they choose (NCCL_SOCKET_IFNAME counts)"
    )
    # A dict has no hash: trees that differ only here share one, which is allowed.
    env: dict[str, str] = dataclasses.field(
        default_factory=dict,
        hash=False,
        metadata={"help": "variables for NCCL, gloo and torch, such as {NCCL_IB_HCA: mlx5}", "unit": ""},
    )


@dataclass(frozen=True)
class RunConfig:
    """A whole run. What the sections mean stands in their fields."""

    output_dir: str = field_("outputs/run", "where the run writes checkpoints, logs and the LoRA")
    seed: int = field_(0, "seed of every random draw", ge=0, lt=2**63)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    conditioning: ConditioningConfig = dataclasses.field(default_factory=ConditioningConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = dataclasses.field(default_factory=MonitorConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)


@dataclass(frozen=True)
class _Key:
    """A leaf of the tree: its field and what its annotation says."""

    field: dataclasses.Field
    kind: type  # of the value, or of every element of a list or mapping; a dataclass: a list of mappings, each checked
    is_list: bool
    is_mapping: bool
    optional: bool

    @property
    def expected(self) -> str:
        if dataclasses.is_dataclass(self.kind):
            return f"a list of mappings with {', '.join(self.keys)}"
        one = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.kind]
        many = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}[self.kind]
        if self.is_mapping:
            return f"a mapping of names to {many}"
        return (f"a list of {many}" if self.is_list else one) + (" or null" if self.optional else "")

    @property
    def default(self) -> Any:
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    @property
    def keys(self) -> "dict[str, _Key]":
        """What every mapping of a list of mappings may hold."""
        return dict(_keys(self.kind)) if dataclasses.is_dataclass(self.kind) else {}


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, _Key]]:
    for field in dataclasses.fields(cls):
        hint: Any = field.type
        if dataclasses.is_dataclass(hint):
            yield from _keys(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        args, origin = typing.get_args(hint), typing.get_origin(hint)
        kind = args[-1] if origin is dict else args[0] if args else hint
        yield prefix + field.name, _Key(field, kind, origin is tuple, origin is dict, NoneType in args)


KEYS: dict[str, _Key] = dict(_keys(RunConfig))
_SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
# Pairs of keys of which one replaces the other.
_ALTERNATIVES = (
    ("train.batch_size", "train.tokens_per_batch"),
    ("data.path", "data.sets"),
    ("eval.held_out", "eval.path"),
)

_Setting = tuple[str, str, Any]  # where it was set ("in run.yaml"), dotted key, value
_COMMAND_LINE = "on the command line"
_YAML_HINT = "put the value in quotes if it has special characters"


def load_config(config_file: str | None, overrides: list[str]) -> tuple[RunConfig, frozenset[str]]:
    """The run config from a YAML file (or None) and `key.sub=value` texts, and the dotted keys that these set."""
    settings = [*(_file_settings(config_file) if config_file else ()), *map(_override_setting, overrides)]
    for pair in _ALTERNATIVES:
        settings = _one_of(*pair, settings)
    return _apply(RunConfig(), settings), frozenset(key for _, key, _ in settings)


def _one_of(first: str, second: str, settings: list[_Setting]) -> list[_Setting]:
    """Of two keys that replace each other, the one on the command line stays."""
    last = {key: (where, value) for where, key, value in settings}
    if any(last.get(key, ("", None))[1] in (None, "", [], (), 0) for key in (first, second)):
        return settings
    place, other = last[first][0], last[second][0]
    if place == other:
        raise UserError(f"{first} and {second} are both set {place}, but one replaces the other: remove one of them")
    loser = first if other == _COMMAND_LINE else second
    return [setting for setting in settings if setting[1] != loser]


def replace(cfg: RunConfig, changes: Mapping[str, Any], where: str = "in the program") -> RunConfig:
    """A copy with other values, `{"train.num_steps": 5}`, checked like a file's. where is named in the errors."""
    return _apply(cfg, [(where, key, value) for key, value in changes.items()])


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """Plain dicts, lists and scalars: fit for JSON and for torch.load with weights_only."""
    return dataclasses.asdict(
        cfg,
        dict_factory=lambda items: {key: list(value) if isinstance(value, tuple) else value for key, value in items},
    )


def to_yaml(cfg: RunConfig) -> str:
    """The whole config as a file that `load_config` reads back as the same tree."""
    plain = to_dict(cfg)
    if cfg.train.tokens_per_batch is not None:
        del plain["train"]["batch_size"]  # `load_config` refuses a file that sets both
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def help_text() -> str:
    """Every key with its default, unit and one line."""
    lines, section = [], ""
    for name, key in KEYS.items():
        if name.split(".")[0] != section and "." in name:
            section = name.split(".")[0]
            lines.append("")
        lines += _help_lines(f"  {name}", key)
        for inner, inner_key in key.keys.items():
            lines += ["    " + line for line in _help_lines(f"  {inner}", inner_key)]
    return "\n".join(lines)


def _help_lines(name: str, key: _Key) -> list[str]:
    default = "(required)" if key.default == MISSING else f"= {_show(key.default)}"
    unit, choices = key.field.metadata["unit"], key.field.metadata.get("choices")
    notes = ([f"[{unit}]"] if unit else []) + ([f"one of {', '.join(choices)}"] if choices else [])
    return [f"{name} {default}{''.join('  ' + note for note in notes)}", f"      {key.field.metadata['help']}"]


def reference() -> str:
    """Every key as a page of Markdown, a table for each section."""
    lines = [
        "# Configuration", "",
        "Every key, as `--help` lists them: in a YAML file given by `--config`, or as `key=value` on the command line,",
        "where the last word wins. `python docs/configuration.py` writes this page.",
    ]  # fmt: skip
    section = None
    for name, key in KEYS.items():
        if (head := name.rpartition(".")[0]) != section:
            section = head
            lines += ["", f"## `{section}`" if section else "## The run", "", "| key | default | |", "|---|---|---|"]
        lines += [_reference_row(name, key)]
        lines += [_reference_row(f"{name}[].{inner}", inner_key) for inner, inner_key in key.keys.items()]
    return "\n".join(lines) + "\n"


def _reference_row(name: str, key: _Key) -> str:
    metadata = key.field.metadata
    choices = f": {', '.join(f'`{one}`' for one in metadata['choices'])}" if "choices" in metadata else ""
    unit = f" [{metadata['unit']}]" if metadata["unit"] else ""
    default = "required" if key.default == MISSING else f"`{_show(key.default)}`"
    return f"| `{name}` | {default} | {metadata['help']}{unit}{choices} |"


def _file_settings(path: str) -> Iterator[_Setting]:
    if not Path(path).is_file():
        raise UserError(f"config file {path} does not exist or is not a file: give the path of a YAML file to --config")
    try:
        root = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        spot = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{spot} is not valid YAML: {problem}; {_YAML_HINT}") from None
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(
            f"config file {path} cannot be read: {str(error).splitlines()[0]}; mend or replace it"
        ) from None
    if not isinstance(root, DictConfig):
        raise UserError(
            f"config file {path} must hold sections with keys, as in `train: {{num_steps: 1000}}`, but is a list"
        )
    for key, value in typing.cast(dict, OmegaConf.to_container(root, resolve=False)).items():
        if key in _SECTIONS and isinstance(value, dict | NoneType):  # None: a section with every line commented out
            yield from ((f"in {path}", f"{key}.{name}", child) for name, child in (value or {}).items())
        else:
            yield f"in {path}", str(key), value


def _override_setting(text: str) -> _Setting:
    name, equals, raw = text.partition("=")
    where, key = _COMMAND_LINE, KEYS.get(name)
    if not equals or not name:
        raise UserError(f"'{text}' on the command line is not KEY=VALUE: write for example train.num_steps=100")
    # What goes into a text is taken as typed: YAML would read the commit 12e4567 as infinity and 0123 as 83.
    if key and key.kind is str and not raw.startswith(("[", "{", "'", '"')) and raw != "null":
        return where, name, raw
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]), resolve=False)
        return where, name, typing.cast(dict, parsed)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"the value of '{text}' on the command line cannot be read: {problem}; {_YAML_HINT}") from None


def _apply(cfg: RunConfig, settings: Sequence[_Setting]) -> RunConfig:
    """Merge settings, one at a time so that an error knows its key and its place, and check the result."""
    tree, places = OmegaConf.structured(cfg), {}
    for where, name, value in settings:
        if name not in KEYS:
            raise _unknown_key(where, name)
        key = KEYS[name]
        section, _, leaf = name.rpartition(".")
        if key.is_mapping:  # the last one counts whole, as with lists: merging would keep the earlier one's names
            with read_write(tree[section]):
                tree[section][leaf] = {}
        value = _converted(name, key, value, where)
        try:
            tree = OmegaConf.unsafe_merge(tree, {section: {leaf: value}} if section else {leaf: value})
        except (TypeError, OmegaConfBaseException):
            raise _wrong_type(name, key, value, where) from None
        places[name] = where
    try:
        for name in sorted(OmegaConf.missing_keys(tree)):
            what = KEYS[name].field.metadata["help"]
            raise UserError(
                f"{name} is not set ({what}): give it in the config file or as {name}=... on the command line"
            )
        result = typing.cast(RunConfig, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        names = " or ".join(f"{name} {where}" for where, name, value in settings if "${" in str(value))
        reason = str(error).splitlines()[0]
        raise UserError(f"{names} refers to what cannot be filled in: {reason}; write the value itself") from None
    for name, key in KEYS.items():
        _check_value(name, key, get(result, name), places.get(name, "by default"))
    _check_sets(result.data, places)
    if result.lora.init_alpha is not None and not result.lora.init_from:
        raise UserError(
            f"lora.init_alpha: set {places['lora.init_alpha']}, but lora.init_from is not. Set that, or remove this."
        )
    for name in ("bucket_sizes", "bucket_aspect_ratios", "bucket_frames"):
        if not result.data.buckets and not getattr(result.data, name):
            raise UserError(
                f"data.{name} is empty and so is data.buckets: there is no bucket to train in; fill one of them"
            )
    return result


def _converted(name: str, key: _Key, value: Any, where: str) -> Any:
    """A value as the tree can take it, its own parts checked first. Raises UserError where it is of another kind."""
    if key.keys:
        if not isinstance(value, list | tuple) or not all(isinstance(one, dict) for one in value):
            raise _wrong_type(name, key, value, where)
        return [_element(f"{name}[{index}]", key, one, where) for index, one in enumerate(value)]
    if key.is_list and not isinstance(value, list | tuple | dict | NoneType):
        value = [value]
    if key.is_mapping:
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in [*value, *value.values()]):
            raise _wrong_type(name, key, value, where)
    elif any(_misread(one, key.kind) for one in (value if isinstance(value, list | tuple) else [value])):
        raise _wrong_type(name, key, value, where)
    return value


def _element(name: str, key: _Key, value: dict[Any, Any], where: str) -> DictConfig:
    """One mapping of a list of mappings, its keys checked like a section's."""
    node = OmegaConf.structured(key.kind)
    for inner, one in value.items():
        if inner not in key.keys:
            near = did_you_mean(str(inner), key.keys)
            raise UserError(f"unknown key '{inner}' in {name} {where}{near}: its keys are {', '.join(key.keys)}")
        inner_key, inner_name = key.keys[inner], f"{name}.{inner}"
        one = _converted(inner_name, inner_key, one, where)
        try:
            node = OmegaConf.unsafe_merge(node, {inner: one})
        except (TypeError, OmegaConfBaseException):
            raise _wrong_type(inner_name, inner_key, one, where) from None
    for inner, inner_key in key.keys.items():
        if inner_key.default == MISSING and value.get(inner, MISSING) == MISSING:
            raise UserError(f"{name}.{inner} is not set {where} ({inner_key.field.metadata['help']}): give it there")
    return node


def _wrong_type(name: str, key: _Key, value: Any, where: str) -> UserError:
    quotes = ", in quotes" if key.kind is str and value is not None else ""
    return UserError(f"{name} must be {key.expected}{quotes}, but is {_show(value)} {where}: change it there")


def get(cfg: RunConfig, name: str) -> Any:
    """The value of a dotted key."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _misread(value: Any, kind: type) -> bool:
    # OmegaConf would turn 2 into True, yes into 'True' and 16:9 (YAML's base 60) into '969': none was meant.
    if kind is str:
        return not isinstance(value, str | NoneType)
    return kind is bool and not isinstance(value, bool | str | NoneType)


def _check_sets(data: DataConfig, places: Mapping[str, str]) -> None:
    """The data sets: one way of naming them, and one way of sharing the training among them."""
    where = places.get("data.sets", "")
    if not data.path and not data.sets:
        what = KEYS["data.path"].field.metadata["help"]
        raise UserError(
            f"data.path is not set ({what}): give it in the config file or as data.path=... on the command line"
        )
    if data.path and data.sets:
        raise UserError(f"data.path and data.sets are both set {where}, but one replaces the other: remove one of them")
    if not data.sets:
        return
    for name in ("repeats", "columns"):
        if getattr(data, name) != KEYS[f"data.{name}"].default:
            raise UserError(
                f"data.{name} is set {places.get(f'data.{name}', '')}, but it belongs to data.path, and data.sets is "
                f"set {where}: give {name} to every set that needs it"
            )
    weighted = [one.weight is not None for one in data.sets]
    if any(weighted) and not all(weighted):
        raise UserError(
            f"data.sets[{weighted.index(False)}] has no weight {where}, but data.sets[{weighted.index(True)}] has one: "
            "give a weight to all sets or to none"
        )
    for index, one in enumerate(data.sets):
        if one.weight is not None and one.repeats != 1.0:
            raise UserError(
                f"data.sets[{index}] has both repeats and weight {where}, but one replaces the other: "
                "remove one of them"
            )


def _check_value(name: str, key: _Key, value: Any, where: str) -> None:
    if key.keys:
        for index, element in enumerate(value):
            for inner, inner_key in key.keys.items():
                _check_value(f"{name}[{index}].{inner}", inner_key, getattr(element, inner), where)
        return
    if value == key.default:  # data.path is empty where it is not set
        return
    limits = key.field.metadata
    if key.is_mapping and "names" in limits and (unknown := [one for one in value if one not in limits["names"]]):
        hint = did_you_mean(unknown[0], limits["names"])
        raise UserError(f"unknown column '{unknown[0]}' in {name} {where}{hint}: ours are {', '.join(limits['names'])}")
    values = value if key.is_list else value.values() if key.is_mapping else () if value is None else (value,)

    def refuse(must: str) -> UserError:
        return UserError(f"{name} is {_show(value)} {where}: it must be {must}")

    if "length" in limits and len(values) != limits["length"]:
        raise refuse(f"a list of {limits['length']}")
    for one in values:
        if isinstance(one, str) and not one.strip():
            raise refuse("a text that is not empty")
        if isinstance(one, float) and not math.isfinite(one):
            raise refuse("a finite number")
        if "choices" in limits and one not in limits["choices"]:
            near = difflib.get_close_matches(one, limits["choices"], n=1)
            raise refuse(f"one of {', '.join(limits['choices'])}" + (f" (did you mean '{near[0]}'?)" if near else ""))
        for limit, holds, words in (
            ("ge", lambda a, b: a >= b, "at least"),
            ("gt", lambda a, b: a > b, "greater than"),
            ("le", lambda a, b: a <= b, "at most"),
            ("lt", lambda a, b: a < b, "less than"),
        ):
            if limit in limits and not holds(one, limits[limit]):
                raise refuse(f"{words} {limits[limit]}")


def _unknown_key(where: str, name: str) -> UserError:
    if name in _SECTIONS:
        example = next(key for key in KEYS if key.startswith(f"{name}."))
        return UserError(f"{name} {where} is a section, not a value: set its keys, for example {example}")
    whole = next((key for key in KEYS if name.startswith((f"{key}.", f"{key}["))), None)
    if whole:
        names = KEYS[whole].field.metadata.get("names", ("", "NAME"))
        example = "'[{path: a}, {path: b}]'" if KEYS[whole].keys else f"'{{{names[1]}: text}}'"
        return UserError(f"unknown key '{name}' {where}: {whole} is given as a whole, for example {whole}={example}")
    # The name without its section is what people forget or misplace: `lr` or `train.lr` for optimizer.lr.
    leaf = name.split(".")[-1]
    same_leaf = [key for key in KEYS if key.split(".")[-1] == leaf]
    near = difflib.get_close_matches(name, same_leaf or list(KEYS), n=1, cutoff=0.0 if same_leaf else 0.6)
    advice = f"did you mean '{near[0]}'?" if near else "--help lists every key"
    return UserError(f"unknown key '{name}' {where}: {advice}")


def _show(value: Any) -> str:
    """A value as YAML would have it, so that what an error shows is what was written."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_show(name)}: {_show(one)}' for name, one in value.items())}}}"
    return repr(value) if isinstance(value, str) and (not value or value != value.strip()) else str(value)
