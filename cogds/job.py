"""A resolved run: configs, model folder, buckets, sizes and memory model, each computed once.

    job = load_job(args, read_world())

Every verb that takes a run config starts here.
"""

import argparse
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from cogds.config.deepspeed import load_ds_config, resolve
from cogds.config.loading import load_config, replace
from cogds.config.schema import KEYS, RunConfig, get
from cogds.core.buckets import generate_buckets, parse_buckets
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.condition_modes import ConditionSettings, condition_frames, pieces_of, used_modes
from cogds.core.flops import forward_flops
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.memory import (
    CUDA_CONTEXT_BYTES,
    USABLE_SHARE,
    MemoryModel,
    OnTheFlyEncoding,
    TrainedSize,
    TransformerSize,
    ZeroSettings,
)
from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.core.vae_memory import needs_tiles, vae_can_encode
from cogds.data.cache.keys import cache_key, digest_files
from cogds.data.cache.local_copy import LocalCopy, default_folder
from cogds.data.cache.store import Cache
from cogds.distributed.world import World
from cogds.errors import UserError, did_you_mean
from cogds.files import check_creatable, make_folders
from cogds.model.control import control_inputs
from cogds.model.load import DTYPES, ModelFolder, empty_transformer, find_model
from cogds.model.lora.adapter import resolve_targets
from cogds.model.trained_weights import match_weights
from cogds.model.transformer.sequence_parallel import check_sequence
from cogds.shapes.clips import draw_demo_clips

# Batches encoded on the fly that wait to be trained. One is enough if encoding keeps up; the second covers a slow clip.
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """A run before its data is known.

    targets: full names of the layers that get a LoRA, or of the weights to train (train.method). num_ranks: ranks of
    the run. They differ from `world`, the ranks around this process, if this process only reports on the run.
    evaluated_only: encode no clips except those that are evaluated. tiled: the buckets that the VAE encodes in tiles
    (`encode.tiling` chooses them by the GPUs). held_out_limit: the largest hash that the run to resume holds out
    (`core.held_out`); None: by eval.held_out.
    """

    cfg: RunConfig
    ds_config: dict[str, Any]
    model: ModelFolder
    buckets: tuple[ClipShape, ...]
    targets: tuple[str, ...]
    world: World
    num_ranks: int
    evaluated_only: bool = False
    tiled: frozenset[ClipShape] = frozenset()
    held_out_limit: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the transformer and the VAE."""
        return DTYPES[self.cfg.train.precision]

    @property
    def condition_settings(self) -> ConditionSettings:
        """The settings of the condition modes, in frames."""
        return self.cfg.condition_settings(self.model.geometry)

    def condition_frames(self, shape: ClipShape) -> tuple[int, ...]:
        """The pixel frames of a bucket's clips that the condition modes need, besides the first frame as an image."""
        modes = used_modes(self.cfg.conditioning.modes)
        return condition_frames(modes, shape.frames, self.model.geometry, self.condition_settings)

    @property
    def caches_trained_clips(self) -> bool:
        """Whether the clips to train are encoded into the cache."""
        return self.cfg.data.encode == "cached" and not self.evaluated_only

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Clips per rank and micro-step for each bucket: a constant, or as many as fit into the token budget."""
        budget = self.cfg.train.tokens_per_batch
        if budget is None:
            return (self.cfg.train.batch_size,) * len(self.buckets)
        return tuple(max(1, budget // num_tokens(shape, self.model.geometry)) for shape in self.buckets)

    @cached_property
    def memory(self) -> MemoryModel:
        """The memory of one rank, calculated from shapes. Reads no weights."""
        transformer, cfg = empty_transformer(self.model), self.cfg
        num_base = sum(parameter.numel() for parameter in transformer.parameters())
        return MemoryModel(
            geometry=self.model.geometry,
            transformer=TransformerSize.from_config(self.model.transformer_config, num_base),
            trained=self._trained_size(transformer),
            vae=self.model.vae_size,
            zero=ZeroSettings.from_config(self.ds_config.get("zero_optimization", {})),
            num_ranks=self.num_ranks,
            precision=cfg.train.precision,
            buckets=self.buckets,
            quantization=cfg.model.quantization,
            fp8_matmul=cfg.model.fp8_matmul,
            sequence_size=cfg.parallel.sequence_size,
            has_control=cfg.conditioning.control,
            ema_on_gpu=cfg.full.ema_decay is not None and cfg.full.ema_device == "gpu",
            # One more batch is being encoded.
            on_the_fly=OnTheFlyEncoding(self.model.num_text_parameters, self.tiled, BATCHES_AHEAD + 1)
            if cfg.data.encode == "on_the_fly"
            else None,
            modes=used_modes(cfg.conditioning.modes),
            condition=self.condition_settings,
        )

    def _trained_size(self, transformer: Any) -> TrainedSize:
        if not self.cfg.trains_lora:
            weights = dict(transformer.named_parameters())
            return TrainedSize.from_targets(self.targets, sum(weights[name].numel() for name in self.targets), rank=0)
        layers, rank = dict(transformer.named_modules()), self.cfg.lora.rank
        num_lora = sum(rank * (layers[name].in_features + layers[name].out_features) for name in self.targets)
        if self.cfg.conditioning.control:
            geometry = self.model.geometry
            num_lora += self.model.hidden_size * control_inputs(
                geometry.latent_channels, geometry.patch_size_t, geometry.patch_size
            )
        return TrainedSize.from_targets(self.targets, num_lora, rank)

    def plan(self, mixture: Mixture) -> Plan:
        """Return the order of training from the first step. mixture: how often each clip is trained."""
        cfg, model = self.cfg, self.model
        tokens = [num_tokens(shape, model.geometry) for shape in self.buckets]
        costs = tuple(forward_flops(count, model.num_layers, model.hidden_size) for count in tokens)
        return Plan(
            mixture.virtual_sizes,
            self.batch_sizes,
            self.num_ranks // cfg.parallel.sequence_size,
            cfg.train.gradient_accumulation_steps,
            cfg.seed,
            costs=costs if cfg.data.sync == "cost" else (),
            tolerance=cfg.data.cost_tolerance,
        )

    @cached_property
    def cache(self) -> Cache:
        """The encoded clips and captions."""
        return open_cache(self.cfg)

    def make_folders(self, with_output: bool = True) -> None:
        """Create the folders that the run writes to. Raises UserError, naming the key, if it cannot write there.

        with_output: also create the output folder. Otherwise, only check that this is possible.
        """
        if with_output:
            make_folders({"output_dir": self.cfg.output_dir})
        else:
            check_creatable("output_dir", self.cfg.output_dir)
        make_folders({"data.cache_dir": str(self.cfg.metadata_dir)})
        self.cache.check_writable()

    def weights_digest(self) -> str:
        """Return a digest of the transformer's weights. Files that have not changed are not read again."""
        self.model.fetch("transformer")
        files = sorted(str(path) for path in (self.model.path / "transformer").iterdir() if path.is_file())
        digests = digest_files(files, self.cfg.metadata_dir / "files.json")
        return cache_key({"files": list(digests.values())})


def open_cache(cfg: RunConfig) -> Cache:
    """The cache of a run, with a copy on this node if it is at a URL."""
    data = cfg.data
    return Cache(data.cache_dir, LocalCopy(data.local_cache_dir or default_folder(), int(data.local_cache_gb * 1e9)))


def load_job(
    args: argparse.Namespace,
    world: World,
    num_ranks: int | None = None,
    changes: Mapping[str, Any] | None = None,
    evaluated_only: bool = False,
) -> Job:
    """Resolve a command line. Draws the demo's clips if the config asks for them.

    args: from `arguments.parse_args`. num_ranks: ranks of the run, by default those of `world`. changes: values of
    config keys that the verb sets. evaluated_only: see `Job`. Raises UserError if anything is wrong with the configs or
    the model.
    """
    cfg, explicit = load_config(args.config, args.overrides)
    ds_config = load_ds_config(args.deepspeed)
    cfg = replace(cfg, changes or {})
    num_ranks = num_ranks or world.size
    world = dataclasses.replace(world, sequence_size=cfg.parallel.sequence_size)
    if cfg.data.draw_demo_clips:
        draw_demo_clips(cfg.data.path)
    model = find_model(cfg.model.path, cfg.model.revision)
    check_conditioning(cfg, explicit, model)
    check_sequence(cfg.parallel.sequence_size, num_ranks, model.transformer_config["num_attention_heads"])
    buckets = make_buckets(cfg, model)
    check_modes(cfg, model, buckets)
    targets = tuple(find_targets(cfg, empty_transformer(model)))
    ds_config, cfg = resolve(ds_config, cfg, explicit, num_ranks, model.hidden_size, args.deepspeed)
    tiled = tiled_buckets(cfg, model, buckets)
    return Job(cfg, ds_config, model, buckets, targets, world, num_ranks, evaluated_only, tiled)


def check_modes(cfg: RunConfig, model: ModelFolder, buckets: Sequence[ClipShape]) -> None:
    """Raise UserError if the clips of a bucket are too short for a condition mode."""
    settings = cfg.condition_settings(model.geometry)
    for shape in buckets:
        for mode in used_modes(cfg.conditioning.modes):
            try:
                pieces_of(mode, shape.frames, model.geometry, settings)
            except UserError as error:
                raise UserError(f"conditioning.modes: bucket {shape}: {error}") from None


def check_conditioning(cfg: RunConfig, explicit: Collection[str], model: ModelFolder) -> None:
    """Raise UserError if a key about given frames is set to something for a text-to-video model, which has none."""
    keys = ("conditioning.image_", "conditioning.modes", "conditioning.context_", "conditioning.keyframe_")
    for name in sorted(explicit) if not model.family.takes_image else ():
        if name.startswith(keys) and (value := get(cfg, name)) not in (KEYS[name].default, 0):
            raise UserError(
                f"{name}: {value} is set, but {cfg.model.path} is a text-to-video model, which has no first frame as "
                "input. Remove the key."
            )


def find_targets(cfg: RunConfig, transformer: Any) -> list[str]:
    """Return the names of the layers that get a LoRA, or of the weights to train. Raises UserError for unknown ones."""
    if cfg.trains_lora:
        return resolve_targets(transformer, cfg.lora.target_modules)
    return match_weights((name for name, _ in transformer.named_parameters()), cfg.full.modules)


def make_buckets(cfg: RunConfig, model: ModelFolder) -> tuple[ClipShape, ...]:
    """Return the buckets of the config, listed or generated. Raises UserError if the model does not support one."""
    if cfg.data.buckets:
        buckets = parse_buckets(cfg.data.buckets, model.geometry)
    else:
        buckets = generate_buckets(
            cfg.data.bucket_sizes, cfg.data.bucket_aspect_ratios, cfg.data.bucket_frames, model.geometry
        )
    for shape in buckets:
        # Every step encodes the first frame of each clip without tiles, as the image-to-video pipeline does.
        if model.family.takes_image and not vae_can_encode(
            dataclasses.replace(shape, frames=1), tiling=False, vae=model.vae_size
        ):
            raise UserError(
                f"data.buckets: {shape} is too large. The VAE cannot encode a {shape.height}x{shape.width} image "
                "without tiles, as the pipeline does. Choose a smaller bucket."
            )
    return buckets


def tiled_buckets(
    cfg: RunConfig, model: ModelFolder, buckets: Sequence[ClipShape], gpu_bytes: float | None = None
) -> frozenset[ClipShape]:
    """Return the buckets whose clips the VAE encodes in tiles: the config's choice, or those that do not fit whole.

    gpu_bytes: memory of the smallest GPU, on which the VAE is alone. Without it, the limit is `UNTILED_BYTES`: on CPUs,
    and if clips are encoded on the fly, when training needs the GPU.
    """
    if cfg.data.vae_tiling != "auto":
        return frozenset(buckets if cfg.data.vae_tiling == "on" else ())
    vae = model.vae_size
    if gpu_bytes is None or cfg.data.encode == "on_the_fly":
        return frozenset(shape for shape in buckets if needs_tiles(shape, vae))
    element_bytes = DTYPES[cfg.train.precision].itemsize
    free_bytes = USABLE_SHARE * gpu_bytes - CUDA_CONTEXT_BYTES - vae.num_parameters * element_bytes
    return frozenset(shape for shape in buckets if needs_tiles(shape, vae, element_bytes, free_bytes))


def choose_checkpointing(
    job: Job, batch_sizes: Sequence[int], gpu_bytes: float | None
) -> tuple[BlockCheckpointing, ...]:
    """Return the activation checkpointing of each bucket: the config's, or for `auto` the fastest that fits.

    `auto` lets as many blocks as fit keep all activations. A mode in the config applies to all blocks. If nothing fits,
    `auto` becomes the mode that needs the least memory. gpu_bytes: memory of one GPU; None if there is no
    limit. Raises UserError if the config names a bucket that the run does not have.
    """
    names, by_bucket = [str(shape) for shape in job.buckets], job.cfg.train.activation_checkpointing_by_bucket
    for name in by_bucket:
        if name not in names:
            raise UserError(
                f"train.activation_checkpointing_by_bucket: {name} is not a bucket of this run"
                f"{did_you_mean(name, names)}. Choose one of {', '.join(names)}."
            )
    modes = [by_bucket.get(name, job.cfg.train.activation_checkpointing) for name in names]
    if gpu_bytes is None:
        return tuple(BlockCheckpointing("none" if mode == "auto" else mode) for mode in modes)
    return tuple(
        job.memory.best_checkpointing(shape, batch_size, gpu_bytes) if mode == "auto" else BlockCheckpointing(mode)
        for shape, batch_size, mode in zip(job.buckets, batch_sizes, modes)
    )
