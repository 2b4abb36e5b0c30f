"""The run config: frozen pydantic models that define every key, with its default, range, unit and help line.

`config.loading` fills them from a YAML file and `key=value` texts; `config.reference` prints them. Types are strict:
a number is not accepted as text, and neither is `yes`, which YAML reads as a boolean.
"""

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from cogds.core.condition_modes import ConditionSettings, Mode, settings_in_frames
from cogds.core.geometry import ModelGeometry


def _refuse_url(value: str) -> str:
    if "://" in value:
        raise PydanticCustomError("url", "must be a local path")
    return value


Text = Annotated[str, Field(pattern=r"\S")]  # not blank
LocalPath = Annotated[Text, AfterValidator(_refuse_url)]  # of a file or folder that may not be at a URL
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Time = Annotated[float, Field(ge=0)]
OnOff = Literal["auto", "on", "off"]
Attention = Literal["auto", "torch", "flash", "cudnn", "efficient", "flash3", "flash4", "math"]
Checkpointing = Literal["auto", "none", "selective", "full", "full+offload"]
Method = Literal["lora", "full"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
Column = Literal[
    "path", "caption", "captions", "kind", "image", "control", "start_s", "end_s", "spans", "motion", "duplicate_of"
]  # fmt: skip

ATTENTION_KERNELS: tuple[str, ...] = get_args(Attention)[1:]
CHECKPOINTING_MODES: tuple[str, ...] = get_args(Checkpointing)[1:]  # from the least recomputed to the most
COLUMNS: tuple[str, ...] = get_args(Column)

# Former names of keys (or sections) and values: refused, with the new name.
RENAMED = {
    "train.recompute": "train.activation_checkpointing",
    "train.recompute_by_bucket": "train.activation_checkpointing_by_bucket",
    "train.gradient_checkpointing": "train.activation_checkpointing",
    "train.rehearse": "train.memory_check",
    "model.base": "model.quantization",
    "model.matmul": "model.fp8_matmul",
    "parallel.sequence": "parallel.sequence_size",
    "monitor": "metrics",
    "data.bucket_areas": "data.bucket_sizes",
}
_CHECKPOINTING_VALUES = {"attention_kept": "selective", "block": "full", "block+offload": "full+offload"}
RENAMED_VALUES = {
    "model.quantization": {"full": "none", "float8": "fp8"},
    "train.activation_checkpointing": _CHECKPOINTING_VALUES,
    "train.activation_checkpointing_by_bucket": _CHECKPOINTING_VALUES,
}
_ALSO_AT_THE_ENDS = "also before the first and after the last step; null: never [optimizer steps]"
# Pairs of keys that replace each other.
ALTERNATIVES = (
    ("train.batch_size", "train.tokens_per_batch"),
    ("data.path", "data.sets"),
    ("eval.held_out", "eval.path"),
    ("conditioning.context_latents", "conditioning.context_s"),
)


def key(default: Any, help: str, **limits: Any) -> Any:
    """A key of the config. default: `...` for a required key; limits: of `pydantic.Field` (ge, gt, le, lt)."""
    return Field(default, description=help, **limits)


class Section(BaseModel):
    """A section of the config: frozen, and without keys other than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    path: Text = key(
        ..., "base model: a hub id, a local diffusers folder, or builtin:shapes, a tiny one that comes with cogds"
    )
    revision: Text | None = key(None, "commit, tag or branch of a hub model")
    attention: Attention = key(
        "auto", "attention kernel; all are exact; auto: measures which is fastest on the largest bucket"
    )
    compile: OnOff = key("auto", "torch.compile for the transformer blocks; auto: on GPUs")
    quantization: Quantization = key(
        "none", "format of the blocks' frozen weights; int8, fp8: with torchao; nf4 (4 bits): with bitsandbytes"
    )
    fp8_matmul: bool = key(
        False, "fp8 matrix products, forward and backward; not with int8 and nf4; needs a GPU with fp8"
    )


class SetConfig(Section):
    """One of several datasets."""

    path: Text = key(..., "dataset: a folder of clips, or a list or table of clips")
    repeats: float = key(1.0, "times that each clip is trained per epoch; may be a fraction", gt=0)
    weight: float | None = key(None, "share of the training relative to the other sets; replaces repeats", gt=0)
    columns: dict[Column, Text | None] = key(
        {}, "names of the table's columns, by cogds column name; null: a column that is not used"
    )
    root: Text | None = key(
        None, "folder or URL that relative paths in a list are relative to; null: the list's folder"
    )
    path_template: Text | None = key(None, "path of a table's rows, with columns in braces: {vid}.mp4")
    where: Text | None = key(None, "filter on a table's columns, such as: aesthetic > 5 and motion > 0.3")
    caption_prefix: str | None = key(None, "text before every caption of this set; null: data.caption_prefix")


class DataConfig(Section):
    path: str = key("", "dataset: a folder of clips, or a list or table of clips; or set data.sets")
    sets: tuple[SetConfig, ...] = key((), "several datasets, a list of mappings; replaces data.path")
    columns: dict[Column, Text | None] = key(
        {}, "names of the table's columns, by cogds column name; null: a column that is not used"
    )
    root: Text | None = key(
        None, "folder or URL that relative paths in a list are relative to; null: the list's folder"
    )
    path_template: Text | None = key(None, "path of a table's rows, with columns in braces: {vid}.mp4")
    where: Text | None = key(None, "filter on a table's columns, such as: aesthetic > 5 and motion > 0.3")
    repeats: float = key(1.0, "times that each clip is trained per epoch; may be a fraction", gt=0)
    default_caption: Text | None = key(None, "caption of clips without one; null: such clips are unusable")
    caption_prefix: str = key(
        "", "text before every caption of the clips, such as a trigger word; not before sample.prompts"
    )
    mirror: bool = key(
        False, "training of each clip's mirror image too, except for captions with a side (left, right, clockwise)"
    )
    max_unusable: float = key(0.1, "fraction of unusable clips above which training is refused", ge=0, le=1)
    manifest: LocalPath | None = key(None, "Parquet table of the clips' properties; null: created in data.cache_dir")
    draw_demo_clips: bool = key(False, "draw the demo clips at data.path if there are none")
    buckets: tuple[Text, ...] = key((), "clip shapes, FRAMESxHEIGHTxWIDTH; empty: generated from the next three keys")
    bucket_sizes: tuple[Text, ...] = key(
        ("768p",), "sizes of generated buckets: short side (768p) or HEIGHTxWIDTH [px]"
    )
    bucket_aspect_ratios: tuple[Text, ...] = key(
        ("16/9", "4/3", "1/1", "3/4", "9/16"), "aspect ratios (width/height) of generated buckets"
    )
    bucket_frames: tuple[Annotated[int, Field(ge=1)], ...] = key((49, 81), "lengths of generated buckets [frames]")
    fps: float = key(16.0, "frame rate after resampling [frames/s]", gt=0)
    windows: Literal["first", "random", "uniform", "all"] = key(
        "first", "parts used of a clip longer than its bucket: its start, a random one, evenly spaced ones, or all"
    )
    num_windows: int = key(0, "windows per clip; uniform: 0 is one in the middle; all: maximum, 0 is no limit", ge=0)
    encode: Literal["cached", "on_the_fly"] = key("cached", "encoding once before training, or again in every step")
    vae_tiling: OnOff = key("auto", "VAE encoding in tiles: less memory, more time; auto: if the smallest GPU needs it")
    decoder: Literal["pyav", "decord"] = key(
        "pyav", "video decoder; pyav rejects damaged files, decord misses most damage"
    )
    decode_timeout_s: float = key(300.0, "time limit for reading a file; a slower file is unusable [s]", gt=0)
    decode_memory_gb: float = key(8.0, "memory limit for reading a file; a file that needs more is unusable [GB]", gt=0)
    sync: Literal["bucket", "cost"] = key(
        "bucket", "property shared by clips that are trained at the same time: bucket, or cost of a step"
    )
    cost_tolerance: Fraction = key(0.03, "relative difference in cost allowed between ranks with data.sync=cost")
    cache_dir: Text = key("outputs/cache", "folder of encoded clips and captions, or a URL such as s3://bucket/cache")
    local_cache_dir: LocalPath | None = key(
        None,
        "folder on each node for copies of what is read from a data.cache_dir that is a URL; null: a temporary one",
    )
    local_cache_gb: float = key(20.0, "size of data.local_cache_dir [GB]", gt=0)
    shard_gb: float = key(1.0, "size of a cache file [GB]", gt=0)
    num_workers: int = key(2, "data loader processes per rank; 0: the training process loads", ge=0)

    @field_validator("cache_dir")
    @classmethod
    def _without_file_protocol(cls, value: str) -> str:
        return value.removeprefix("file://")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("bucket_sizes", "bucket_aspect_ratios", "bucket_frames"):
            if not self.buckets and not getattr(self, name):
                raise ValueError(f"data.{name}: empty, and so is data.buckets. Set one of them.")
        if not self.path and not self.sets:
            raise ValueError("data.path: not set. Pass a folder, list or table of clips: data.path=...")
        if not self.sets:
            return self
        if self.path:
            raise ValueError("data.path: set together with data.sets, which replaces it. Remove one of them.")
        for name in ("repeats", "columns", "root", "path_template", "where"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name}: does not apply to data.sets. Set {name} in each set.")
        for index, data_set in enumerate(self.sets):
            if (data_set.weight is None) != (self.sets[0].weight is None):
                raise ValueError(f"data.sets[{index}].weight: must be set in all sets or in none. Add or remove it.")
            if data_set.weight is not None and data_set.repeats != 1.0:
                raise ValueError(f"data.sets[{index}].repeats: replaced by weight, but both are set. Remove one.")
        return self


class ConditioningConfig(Section):
    image_latents: Literal["pipeline", "scaled", "unscaled"] = key(
        "pipeline",
        "scale of the first frame's latents; pipeline: as in diffusers (x 1/scaling_factor if the VAE's config has "
        "invert_scale_latents); scaled: x scaling_factor; unscaled: x 1",
    )
    image_noise: bool = key(True, "noise on the first frame's pixels before the VAE")
    image_noise_log_mean: float = key(-3.0, "mean of ln(sigma) of the image noise")
    image_noise_log_std: float = key(0.5, "standard deviation of ln(sigma) of the image noise", ge=0)
    image_dropout: float = key(0.05, "probability of dropping the first frame (all conditioning frames)", ge=0, le=1)
    caption_dropout: float = key(0.1, "probability of dropping the caption", ge=0, le=1)
    modes: dict[Mode, Probability] = key(
        {"first": 1.0}, "parts of a clip that are given as conditions, each with its probability; sum: 1"
    )
    context_latents: int = key(2, "length of the video that prefix and suffix condition on [latent frames]", ge=2)
    context_s: float | None = key(None, "length of that video; null: context_latents [s]", gt=0)
    keyframe_times: tuple[Time, ...] = key((), "times of the images that keyframes conditions on [s]")
    control: bool = key(False, "extra input channels for a control video of each clip (column control)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(self.modes.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"conditioning.modes: the probabilities sum to {total:g}. Make them sum to 1.")
        if bool(self.modes.get("keyframes")) != bool(self.keyframe_times):
            has, lacks = (
                ("conditioning.keyframe_times", "mode keyframes")
                if self.keyframe_times
                else ("mode keyframes", "conditioning.keyframe_times")
            )
            raise ValueError(f"conditioning.modes: {has} is set, but not {lacks}. Set both or none.")
        if not (self.modes.get("prefix") or self.modes.get("suffix")):
            for name in ("context_latents", "context_s"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"conditioning.{name}: set, but no mode uses it. Add mode prefix or suffix, or remove it."
                    )
        return self


class LoraConfig(Section):
    rank: int = key(128, "rank of the adapter", ge=1)
    alpha: float = key(128.0, "alpha of the adapter, whose output is scaled by alpha/rank", gt=0)
    dropout: Fraction = key(0.0, "dropout probability on the adapter's input")
    target_modules: tuple[Text, ...] = key(
        ("to_q", "to_k", "to_v", "to_out.0"), "linear layers with an adapter, by the end of their name; or all-linear"
    )
    init_from: Text | None = key(None, "initial LoRA of the same rank and layers, a .safetensors file or a folder")
    init_alpha: float | None = key(None, "alpha of lora.init_from if its file has none; null: its rank", gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.init_alpha is not None and self.init_from is None:
            raise ValueError("lora.init_alpha: set without lora.init_from. Set lora.init_from too, or remove it.")
        return self


class FullConfig(Section):
    """Training of the transformer's own weights (train.method=full)."""

    modules: tuple[Text, ...] = key(
        (),
        "parts to train, by the end of their name; * stands for any text; empty: the whole transformer; "
        "such as [attn1] or [transformer_blocks.4?]",
    )
    ema_decay: float | None = key(
        None, "decay of a moving average of the weights, such as 0.999, that is evaluated, sampled and exported too; "
        "null: none", gt=0, lt=1,
    )  # fmt: skip
    ema_device: Literal["gpu", "cpu"] = key("gpu", "memory of the moving average: 4 bytes per parameter over all ranks")

    @model_validator(mode="after")
    def _check_ema(self) -> Self:
        if self.ema_device == "cpu" and self.ema_decay is None:
            raise ValueError("full.ema_device: cpu without full.ema_decay. Set full.ema_decay too, or remove it.")
        return self


# Defaults that depend on train.method. A full fine-tune changes every weight, so it needs smaller steps than a LoRA,
# whose B matrices start at 0.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"full": {"optimizer.lr": 1e-5}}


class OptimizerConfig(Section):
    lr: float = key(1e-4, "learning rate after the warmup; default with train.method=full: 1e-5", ge=0)
    betas: tuple[Fraction, Fraction] = key((0.9, 0.95), "AdamW betas")
    eps: float = key(1e-8, "AdamW epsilon", gt=0)
    weight_decay: float = key(1e-3, "AdamW weight decay", ge=0)
    max_grad_norm: float = key(1.0, "global gradient norm for clipping; 0: no clipping", ge=0)
    schedule: Literal["constant", "cosine", "linear"] = key("constant", "learning rate schedule after the warmup")
    warmup_steps: int = key(100, "linear warmup from 0 [optimizer steps]", ge=0)
    final_lr_ratio: float = key(0.0, "final learning rate of cosine and linear, as a fraction of lr", ge=0, le=1)


class TrainConfig(Section):
    method: Method = key("lora", "weights to train: an adapter (lora.*), or the transformer's own (full.*)")
    num_steps: int = key(1000, "length of the run [optimizer steps]", ge=1)
    batch_size: int = key(1, "clips per rank and micro-step", ge=1)
    tokens_per_batch: int | None = key(None, "tokens per rank and micro-step; replaces batch_size", ge=1)
    gradient_accumulation_steps: int = key(1, "micro-steps per optimizer step", ge=1)
    activation_checkpointing: Checkpointing = key(
        "auto",
        "activations recomputed in the backward pass; selective: all but attention's outputs; full: whole blocks; "
        "full+offload: also keeps their inputs in host memory; auto: the first that fits, per bucket, with as many "
        "blocks not recomputed as fit",
    )
    activation_checkpointing_by_bucket: dict[Text, Checkpointing] = key(
        {}, "train.activation_checkpointing of single buckets, such as {81x768x1360: full}"
    )
    memory_check: OnOff = key("auto", "trial of the bucket that needs the most memory, before step 1; auto: on GPUs")
    precision: Literal["bf16", "fp32"] = key("bf16", "number format of the transformer")
    deterministic: bool = key(False, "only deterministic GPU kernels, which are slower; CPU runs always repeat bitwise")
    timeout_s: float = key(7200.0, "time limit for waiting on another rank, encoding included [s]", gt=0)
    step_timeout_s: float = key(
        1800.0, "time limit for a step or a save; after it, the run writes the stacks of all threads and ends [s]", gt=0
    )
    max_bad_steps: int = key(10, "consecutive steps with a non-finite loss or gradient that end the run", ge=1)


class ParallelConfig(Section):
    sequence_size: int = key(
        1, "ranks that share a clip (Ulysses sequence parallelism); divides the ranks and the attention heads", ge=1
    )


class EvalConfig(Section):
    """The evaluation loss during training."""

    every: int | None = key(500, f"evaluation interval, {_ALSO_AT_THE_ENDS}", ge=1)
    held_out: Fraction = key(0.0, "fraction of the files, chosen by hashes of their names, evaluated and never trained")
    path: Text | None = key(
        None, "dataset to evaluate (with data.columns, data.root and data.path_template); replaces eval.held_out"
    )
    num_clips: int = key(
        8, "maximum of held-out clips to evaluate, and of trained clips; spread over the buckets", ge=1
    )
    num_timesteps: int = key(9, "timesteps to evaluate: the middles of equal parts of the schedule", ge=1)


class PromptConfig(Section):
    """One video to generate during training."""

    prompt: Text = key(..., "caption of the video")
    image: Text | None = key(
        None, "first frame, an image file; resized to cover the size, then cropped; not in text-to-video"
    )
    last_image: Text | None = key(None, "last frame, an image file, for a run that trains first_last or last")
    video: Text | None = key(None, "video to continue instead of an image, for a run that trains prefix")
    size: Text | None = key(
        None, "FRAMESxHEIGHTxWIDTH; null: the bucket that crops the image least, or without one the largest"
    )
    seed: int | None = key(None, "seed of the noise; null: sample.seed", ge=0, lt=2**63)
    control: Text | None = key(None, "control video, with conditioning.control")


class SampleConfig(Section):
    """Videos generated during training, with the current weights."""

    every: int | None = key(None, f"sampling interval, {_ALSO_AT_THE_ENDS}", ge=1)
    prompts: tuple[PromptConfig, ...] = key((), "videos to generate, a list of mappings; empty: from evaluated clips")
    num_clips: int = key(2, "evaluated clips whose caption and first frame are used if there are no prompts", ge=1)
    num_steps: int = key(50, "denoising steps", ge=1)
    guidance: float = key(6.0, "classifier-free guidance scale; 1: off", ge=1)
    seed: int = key(0, "seed of the noise", ge=0, lt=2**63)


class CheckpointConfig(Section):
    every: int = key(500, "checkpoint interval; the last step is always saved [optimizer steps]", ge=1)
    keep_last: int = key(3, "number of newest checkpoints to keep", ge=1)
    keep_every: int | None = key(None, "interval of checkpoints that are never removed [optimizer steps]", ge=1)
    resume: Text = key("auto", "auto (the newest checkpoint in output_dir, if any), none, or the path of a checkpoint")


class MetricsConfig(Section):
    every: int = key(1, "interval of TensorBoard, metrics.jsonl and progress lines [optimizer steps]", ge=1)
    progress_bar: bool = key(True, "progress bar on a terminal")
    norms_every: int | None = key(
        10,
        "interval of weight and update norms of a LoRA, not with train.method=full; null: never [optimizer steps]",
        ge=1,
    )
    show_clips: int = key(
        16, "largest number of clips shown in TensorBoard (first frame and caption), from the start of the run", ge=0
    )
    show_batches: int = key(
        0, "number of steps, from the start of the run, whose batches rank 0 decodes for TensorBoard", ge=0
    )


class NetworkConfig(Section):
    """Network settings, which every rank sets for itself: no launcher has to pass them on."""

    interface: Text | None = key(None, "interface of NCCL and gloo, such as eth0; null: theirs, or NCCL_SOCKET_IFNAME")
    env: dict[Text, Text] = key({}, "environment variables for NCCL, gloo and torch, such as {NCCL_IB_HCA: mlx5}")


class RunConfig(Section):
    """The config of a whole run."""

    output_dir: LocalPath = key("outputs/run", "folder for checkpoints, logs and the LoRA")
    seed: int = key(0, "seed of all random draws", ge=0, lt=2**63)
    model: ModelConfig
    data: DataConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    lora: LoraConfig = LoraConfig()
    full: FullConfig = FullConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    network: NetworkConfig = NetworkConfig()

    @property
    def trains_lora(self) -> bool:
        """Whether a LoRA is trained, not the transformer's own weights."""
        return self.train.method == "lora"

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for index, prompt in enumerate(self.sample.prompts if self.sample.every is not None else ()):
            if (prompt.control is not None) != self.conditioning.control:
                problem, advice = (
                    (
                        "missing, but conditioning.control is true",
                        "Pass a video, or use the clips: remove sample.prompts.",
                    )
                    if self.conditioning.control
                    else ("set, but conditioning.control is false", "Remove it, or set conditioning.control=true.")
                )
                raise ValueError(f"sample.prompts[{index}].control: {problem}. {advice}")
        if self.trains_lora:
            for name in ("modules", "ema_decay"):
                if getattr(self.full, name):
                    raise ValueError(
                        f"full.{name}: set, but train.method is lora. Set train.method=full, or remove it."
                    )
            return self
        if self.conditioning.control:
            raise ValueError(
                "conditioning.control: not with train.method=full, because diffusers cannot load a model with more "
                "input channels. Set train.method=lora, or remove it."
            )
        if self.lora.init_from:
            raise ValueError(
                "lora.init_from: not with train.method=full, which trains no LoRA. Merge the LoRA into a model with "
                "`cogds export --to merged --pipeline copy` and set model.path to it, or remove it."
            )
        for name, value in (("quantization", self.model.quantization), ("fp8_matmul", self.model.fp8_matmul)):
            if value not in ("none", False):
                raise ValueError(
                    f"model.{name}: {str(value).lower()}, but train.method=full changes the weights in every step, and "
                    "quantized weights are frozen. Remove it, or train a LoRA."
                )
        return self

    def condition_settings(self, geometry: ModelGeometry) -> ConditionSettings:
        """The settings of the condition modes, in frames."""
        given = self.conditioning
        return settings_in_frames(given.context_latents, given.context_s, given.keyframe_times, self.data.fps, geometry)

    @property
    def metadata_dir(self) -> Path:
        """Folder of the manifests, the index of clips, and the digests of files: local, and shared by all nodes."""
        return Path(self.output_dir, "cache") if "://" in self.data.cache_dir else Path(self.data.cache_dir)


def element_section(field: FieldInfo) -> type[Section] | None:
    """The section that every element of a list of mappings is; None for other keys."""
    args = get_args(field.annotation)
    return args[0] if args and isinstance(args[0], type) and issubclass(args[0], Section) else None


def is_list(field: FieldInfo) -> bool:
    """Whether a key holds a list."""
    return get_origin(field.annotation) is tuple


def is_text(field: FieldInfo) -> bool:
    """Whether a key holds text or one of several words (or null)."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return any(kind is str or get_origin(kind) is Literal or get_args(kind)[:1] == (str,) for kind in kinds)


def choices(annotation: Any) -> tuple[str, ...]:
    """The words that the value of a key, or of its elements, may be; empty if it may be others."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return args
    return choices(args[-1]) if get_origin(annotation) is dict else ()


def _keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


KEYS: dict[str, FieldInfo] = dict(_keys(RunConfig))
SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}


def get(cfg: RunConfig, name: str) -> Any:
    """The value of a dotted key."""
    value: Any = cfg
    for part in name.split("."):
        value = getattr(value, part)
    return value
