"""Videos generated during training with the current weights, next to the base model's videos from the same noise.

Rank 0 prepares the inputs (`SampleSpec`) and shares them. The ranks then make one video each at the same time, through
the diffusers pipeline (`LockstepTransformer`), and send the mp4 to rank 0, the only rank that writes. An error is
logged and loses only its own video. Two kinds of failure end the run: an error inside the transformer, such as running
out of memory, at ZeRO stage 3 or with sequence parallelism, since other ranks wait in that call; and a killed process.
"""

import contextlib
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.config.deepspeed import zero_stage
from cogds.config.schema import PromptConfig
from cogds.core.condition_modes import Mode, pieces_of, used_modes
from cogds.core.conditioning import mean_latents
from cogds.core.geometry import ClipShape, num_tokens
from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import read_encoded
from cogds.data.loading.index import ClipIndex
from cogds.data.storage.location import display_name
from cogds.data.video.media import read_clip, write_video
from cogds.distributed.collectives import broadcast, on_rank0
from cogds.distributed.process_group import is_lost_connection
from cogds.encode.cache_keys import CacheKeys
from cogds.engine.checkpoint import remove_folder, step_name
from cogds.errors import UserError, brief
from cogds.files import whole_file, whole_folder
from cogds.formatting import counted
from cogds.job import open_cache
from cogds.model.control import control_of, encode_control, given_control
from cogds.model.evaluation_mode import evaluation_mode
from cogds.model.pipelines import (
    Denoising,
    apply_convention,
    build_pipeline,
    count_transformer_calls,
    decode_frames,
    sample_latents,
)
from cogds.process.logs import log_failure
from cogds.process.progress import Bar, progress_bar
from cogds.train.callbacks import TrainContext
from cogds.train.memory_check import is_out_of_memory
from cogds.train.run import Run
from cogds.train.step import StepBuilder
from cogds.train.summary import labeled
from cogds.videos.conditions import conditions_of_clip, shown_image
from cogds.videos.image_grid import add_label, evenly_spaced_frames, make_grid, shrink
from cogds.videos.lockstep import LockstepTransformer, Stopped
from cogds.videos.sample_folder import BASE, Prompt, write_prompts
from cogds.videos.sample_spec import SampleSpec, load_conditions, read_control

logger = logging.getLogger(__name__)

FOLDER = "samples"
STRIP_FRAMES, STRIP_WIDTH = 4, 360  # frames of a video in an image, pixels of each; TensorBoard shows half of them
PLAYED_WIDTH = 400  # pixels of a video that plays in TensorBoard


def make_sample_callback(context: TrainContext) -> "SampleCallback | None":
    """Return the callback that makes the videos of a run, or None if there are none to make. Collective."""
    run = context.run
    if run.cfg.sample.every is None:
        return None
    specs = on_rank0(run.world, lambda: _find_specs(run, context.builder))
    if not specs:
        return None
    callback = SampleCallback(context, specs, run.cfg.sample.every)
    on_rank0(run.world, callback.announce)
    return callback


class SampleCallback:
    """Makes videos during training (`callbacks.Callback`). The base model's videos are made once."""

    name = "making videos"
    at_start = True
    on_stop = False

    def __init__(self, context: TrainContext, specs: Mapping[str, SampleSpec], every: int):
        """specs: by file stem, the same on all ranks."""
        self.every = every
        self._run, self._engine, self._builder = context.run, context.engine, context.builder
        self._ema = context.ema
        self._monitor, self._watch, self._is_stopping = context.monitor, context.watch, context.is_stopping
        self._specs = specs
        self._folder = Path(self._run.cfg.output_dir) / FOLDER
        self._base: dict[str, bytes] = {}  # on rank 0: the base model's videos, as mp4
        self._pipeline = build_pipeline(self._run.model, self._engine.module, self._builder.vae)
        # Calls of the transformer for one video.
        self._num_calls = count_transformer_calls(self._pipeline, self._run.cfg.sample.num_steps)
        apply_convention(self._pipeline, self._run.cfg.conditioning.image_latents)

    def announce(self) -> None:
        """Log what will be made, check that it can be written, and read the base model's videos. On rank 0."""
        run = self._run
        num_rounds = -(-len(self._specs) // run.world.data_size)
        shapes = ", ".join(dict.fromkeys(str(spec.shape) for spec in self._specs.values()))
        logger.info(
            labeled(
                "samples",
                f"{counted(len(self._specs), 'video')} ({shapes}) every {counted(self.every, 'step')}, "
                f"{num_rounds * self._num_calls} forward passes per rank, in {self._folder}",
            )
        )
        for warning in dict.fromkeys(filter(None, map(self._size_warning, self._specs.values()))):
            logger.warning(warning)
        self._monitor.add_text(FOLDER, "\n".join(f"{stem}: {spec.prompt}" for stem, spec in self._specs.items()))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
            if run.first_step:  # otherwise the folder is another run's
                for stem in self._specs:
                    file = self._folder / BASE / f"{stem}.mp4"
                    if file.is_file():
                        self._base[stem] = file.read_bytes()
        except OSError as error:
            logger.warning(
                f"{self._folder}: cannot be written to ({brief(error)}), so videos will be lost. Make it writable; the "
                "run need not be stopped."
            )

    def _size_warning(self, spec: SampleSpec) -> str:
        """Return a warning if running out of memory in this video would end the run, and it has the most tokens."""
        run = self._run
        stage, sequence_size = zero_stage(run.ds_config), run.world.sequence_size
        trained = [shape for shape, sizes in zip(run.buckets, run.data.index.sizes) if sum(sizes)]
        tokens, *trained_tokens = (num_tokens(shape, run.model.geometry) for shape in (spec.shape, *trained))
        if (stage < 3 and sequence_size == 1) or tokens <= max(trained_tokens):
            return ""
        cause = "ZeRO stage 3" if stage == 3 else f"parallel.sequence_size={sequence_size}"
        return (
            f"sample.prompts: {spec.shape} has {tokens:,} tokens, more than the largest trained bucket with "
            f"{max(trained_tokens):,}. With {cause}, a video that runs out of memory ends the run. Set a smaller size."
        )

    def run(self, step: int) -> None:
        """Make the videos after `step` optimizer steps, and those of the base model that are missing. Collective."""
        start, world, specs = time.perf_counter(), self._run.world, self._specs
        exists, missing = on_rank0(
            world, lambda: (self._has_videos(step), [stem for stem in specs if stem not in self._base])
        )
        if exists:
            return
        # Training starts from the base model, unless it starts from a LoRA.
        is_untrained = step == 0 and not self._run.cfg.lora.init_from
        base: dict[str, bytes] = {}
        videos: dict[str, bytes] = {}
        try:
            with _sampling_mode(self._engine.module, self._builder):
                # Of a full fine-tune, the base model exists only before the first step.
                if missing and self._run.cfg.trains_lora:
                    with _lora_disabled(self._engine.module):
                        base = self._generate({stem: specs[stem] for stem in missing}, "base model")
                elif missing and step == 0:
                    base = self._generate({stem: specs[stem] for stem in missing}, "base model")
                if not is_untrained:
                    with self._ema.in_model() if self._ema else contextlib.nullcontext():
                        videos = self._generate(specs, f"step {step}")
        except Stopped:
            return
        if world.rank == 0:
            self._base |= base
            if is_untrained:
                videos = {stem: self._base[stem] for stem in specs if stem in self._base}
            self._write(step, videos)
            self._show(step, videos)
        self._monitor.add_scalars(step, {"sample/seconds": time.perf_counter() - start})

    def _has_videos(self, step: int) -> bool:
        """Whether the run resumes at a step whose videos exist already."""
        with contextlib.suppress(OSError):
            return step == self._run.first_step > 0 and (self._folder / step_name(step)).is_dir()
        return False

    def _generate(self, specs: Mapping[str, SampleSpec], model: str) -> dict[str, bytes]:
        """Return the mp4s by file stem on rank 0, without those that failed. Collective. model: name for messages."""
        world, videos = self._run.world, {}
        stems = list(specs)
        num_calls = -(-len(stems) // world.data_size) * self._num_calls
        bar = progress_bar(model, "step", num_calls, world.rank == 0, leave=False, has_numbers=False)
        with contextlib.closing(bar):
            for start in range(0, len(stems), world.data_size):
                batch = stems[start : start + world.data_size]
                own_spec = specs[batch[world.data_rank]] if world.data_rank < len(batch) else None
                numbers = f"{start + 1}" if len(batch) == 1 else f"{start + 1}-{start + len(batch)}"
                own_result = self._generate_one(own_spec, f"{model}, video {numbers} of {len(stems)}", bar)
                for number, stem in enumerate(batch):
                    result = broadcast(world, number * world.sequence_size, own_result)
                    if isinstance(result, bytes):
                        videos[stem] = result
                    elif world.rank == 0:
                        logger.warning(f"{model}: no video of '{specs[stem].prompt}': {result}")
        return videos if world.rank == 0 else {}

    def _generate_one(self, spec: SampleSpec | None, model: str, bar: Bar) -> bytes | str:
        """Return an mp4, or the reason why there is none. Collective. Raises Stopped.

        spec: of this rank's video; None if it has none and only takes part in the forward passes. model: name for
        messages. bar: counts the forward passes.
        """
        run, sample, failure, latents = self._run, self._run.cfg.sample, "", None
        prompt = spec.prompt if spec else "another rank"

        start = bar.n

        def on_call(number: int) -> None:
            bar.set_description_str(f"{model}, {number + 1}/{self._num_calls}", refresh=False)
            bar.update(start + number - bar.n)
            self._watch(lambda: f"{model}: denoising step {number + 1} of {self._num_calls} of '{prompt}'")

        transformer = LockstepTransformer(
            self._engine, run.world, self._num_calls,
            idle_inputs=self._idle_inputs() if zero_stage(run.ds_config) == 3 else None,
            on_call=on_call, is_stopping=self._is_stopping,
        )  # fmt: skip
        if spec is not None:
            self._pipeline.transformer = transformer
            try:
                denoising = Denoising(sample.num_steps, sample.guidance, run.data.empty_caption_states)
                with given_control(self._engine.module, spec.control):
                    latents = sample_latents(
                        self._pipeline, spec.conditions, spec.states, spec.shape, spec.seed, denoising
                    )
            except Stopped:
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and is_lost_connection(error):
                    raise  # the run ends and can be resumed as it is
                if transformer.in_forward and transformer.needs_all_ranks:
                    if is_out_of_memory(error):
                        raise _out_of_memory_error(spec, error) from error
                    raise
                failure = brief(error)
                log_failure(logger, f"{model}: the video of '{prompt}' failed: {failure}", error)
            finally:
                self._pipeline.transformer = self._engine.module  # releases the tensors of `transformer`
            _free_memory(run.world.device)
        transformer.finish(has_failed=bool(failure))
        bar.update(start + self._num_calls - bar.n)
        if spec is None or latents is None or run.world.sequence_rank:
            return failure
        self._watch(lambda: f"{model}: decoding '{prompt}'")
        try:
            return _encode_mp4(decode_frames(self._pipeline, latents, spec.shape).numpy(), run.cfg.data.fps)
        except Exception as error:
            log_failure(logger, f"{model}: decoding the video of '{prompt}' failed: {brief(error)}", error)
            return brief(error)
        finally:
            _free_memory(run.world.device)

    def _idle_inputs(self) -> dict[str, Any]:
        """Return the smallest inputs of the transformer, in the model's dtype."""
        shape = min(self._run.buckets, key=lambda bucket: num_tokens(bucket, self._run.model.geometry))
        return self._builder.zero_inputs(shape, 1, self._builder.empty_caption_states.dtype)[0]

    def _write(self, step: int, videos: Mapping[str, bytes]) -> None:
        """Write the videos of a step, all or none, and the base model's that are not written yet."""
        folder = self._folder / step_name(step)
        try:
            for leftover in (self._folder / BASE).glob("*.tmp.mp4"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            for leftover in self._folder.glob("step-*.tmp"):
                shutil.rmtree(leftover, ignore_errors=True)
            for stem, video in self._base.items():
                file = self._folder / BASE / f"{stem}.mp4"
                if not file.is_file():
                    with whole_file(file) as partial:
                        partial.write_bytes(video)
            prompts = {stem: Prompt(spec.prompt, str(spec.shape), spec.seed) for stem, spec in self._specs.items()}
            images = {stem: shown_image(spec.conditions) for stem, spec in self._specs.items()}
            first_frames = {stem: image for stem, image in images.items() if image is not None}
            write_prompts(self._folder, prompts, first_frames)
            if not videos:
                return
            if folder.exists():
                remove_folder(folder)
            with whole_folder(folder) as partial:
                for stem, video in videos.items():
                    (partial / f"{stem}.mp4").write_bytes(video)
        except OSError as error:
            logger.warning(f"{folder}: the videos of step {step} could not be written ({brief(error)})")

    def _show(self, step: int, videos: Mapping[str, bytes]) -> None:
        """Write each video to TensorBoard next to the base model's, as frames and as a video."""
        fps = self._run.cfg.data.fps
        for stem, video in videos.items():
            spec = self._specs[stem]
            try:
                shown = {"base": self._base[stem]} if stem in self._base else {}
                shown |= {f"step {step}": video} if step or not shown else {}
                frames = {label: _decode_mp4(mp4, spec.shape, fps) for label, mp4 in shown.items()}
                strips, played = compare_videos(frames)
                self._monitor.add_image(step, f"{FOLDER}/{stem}", strips)
                self._monitor.add_video(step, f"{FOLDER}/{stem}/clip", played, fps)
            except Exception as error:
                log_failure(logger, f"the video of '{spec.prompt}' could not be shown: {brief(error)}", error)


def compare_videos(videos: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with a column of frames of each video, and a video in which all play.

    TensorBoard's cards are narrow, so landscape videos play one above the other. videos: uint8 [F, H, W, 3], by label.
    """
    columns = []
    for label, video in videos.items():
        first, *others = [shrink(frame[None], STRIP_WIDTH) for frame in evenly_spaced_frames(video, STRIP_FRAMES)]
        columns.append([add_label(first, label), *others])
    cells = [add_label(shrink(video, PLAYED_WIDTH), label) for label, video in videos.items()]
    height, width = next(iter(videos.values())).shape[1:3]
    return make_grid(list(zip(*columns)))[0], make_grid([[cell] for cell in cells] if width > height else [cells])


def _find_specs(run: Run, builder: StepBuilder) -> dict[str, SampleSpec]:
    """Return the videos to make by file stem. What cannot be made is left out with a warning."""
    sample, specs = run.cfg.sample, []
    try:
        cache = open_cache(run.cfg)
        if sample.prompts:
            keys, snapshot = CacheKeys(run.cfg, run.model), cache.snapshot("captions")
            for number, prompt in enumerate(sample.prompts):
                try:
                    key = keys.caption(prompt.prompt).hex()
                    states = cache.read("captions", key, snapshot.place(key) or "")["text_states"]
                    specs.append(_spec_of_prompt(run, number, prompt, states, builder))
                except Exception as error:
                    log_failure(
                        logger, f"sample.prompts[{number}]: '{prompt.prompt}' is left out: {brief(error)}", error
                    )
        else:
            specs = _specs_of_clips(run, cache)
    except Exception as error:
        log_failure(logger, f"sample.every: no videos will be made: {brief(error)}", error)
    if not specs:
        logger.warning("sample.every: there is nothing to make videos of, so the run is trained without them")
    return {spec.file_stem(sample.num_steps, sample.guidance): spec for spec in specs}


def _spec_of_prompt(
    run: Run, number: int, prompt: PromptConfig, states: torch.Tensor, builder: StepBuilder
) -> SampleSpec:
    """Raises UserError if the image or the size is not usable."""
    key = f"sample.prompts[{number}]"
    shape, conditions = load_conditions(prompt, run.cfg, run.buckets, run.model.geometry, key)
    seed = run.cfg.sample.seed if prompt.seed is None else prompt.seed
    control, source = None, ""
    if prompt.control:
        frames = read_control(prompt.control, shape, run.cfg.data.fps, f"{key}.control")
        patch_size_t, tiled = run.model.geometry.patch_size_t, shape in run.job.tiled
        pixels, source = torch.from_numpy(frames), hashlib.blake2b(frames.tobytes(), digest_size=16).hexdigest()
        control = encode_control(builder.vae, pixels, patch_size_t, device=builder.device, tiled=tiled).cpu()
    return SampleSpec(prompt.prompt, shape, seed, conditions, states, control, source)


def _specs_of_clips(run: Run, cache: Cache) -> list[SampleSpec]:
    """Use captions and given frames of held-out clips, or of trained clips if none are held out, in every mode."""
    sample, specs, settings = run.cfg.sample, [], run.job.condition_settings
    modes: tuple[Mode, ...] = used_modes(run.cfg.conditioning.modes) if run.model.family.takes_image else ("none",)
    data, is_cached = run.data, run.cfg.data.encode == "cached"
    index = data.held_out if data.held_out is not None else data.index if is_cached else data.trained
    if index is None:
        raise UserError(
            "data.encode: on_the_fly keeps no clips to make videos of. Set sample.prompts, or set eval.every."
        )
    for row in evenly_spaced_rows(index, sample.num_clips):
        clip = index[row]
        try:
            encoded, control, source = read_encoded(cache, clip), None, ""
            if run.cfg.conditioning.control:
                geometry = run.model.geometry
                moments, scale = encoded["control_moments"][None], geometry.family.scaling_factor
                control, source = mean_latents(moments, scale, geometry.patch_size_t), clip.clip_key
            caption, states = clip.captions[0].text, encoded["text_states"]
            numbers = run.job.condition_frames(clip.shape)
            for mode in modes:
                pieces = pieces_of(mode, clip.shape.frames, run.model.geometry, settings)
                conditions = conditions_of_clip(mode, pieces, encoded, numbers)
                specs.append(SampleSpec(caption, clip.shape, sample.seed, conditions, states, control, source))
        except Exception as error:
            log_failure(logger, f"{display_name(clip.path)}: no video will be made of it: {brief(error)}", error)
    return specs


def evenly_spaced_rows(index: ClipIndex, num: int) -> list[int]:
    """Return `num` rows, evenly spaced over the video buckets, or over all buckets if there are only images."""
    sizes = [sum(sets) for sets in index.sizes]
    video_buckets = [bucket for bucket, size in enumerate(sizes) if size and index.buckets[bucket].frames > 1]
    buckets = video_buckets or range(len(sizes))
    ranges = [range(index.row(bucket, 0), index.row(bucket, sizes[bucket])) for bucket in buckets]
    total = sum(map(len, ranges))
    num = min(num, total)
    chosen = []
    for number in range(num):
        position = (2 * number + 1) * total // (2 * num)
        for rows in ranges:
            if position < len(rows):
                chosen.append(rows[position])
                break
            position -= len(rows)
    return list(dict.fromkeys(chosen))


@contextlib.contextmanager
def _sampling_mode(transformer: Any, builder: StepBuilder) -> Iterator[None]:
    """Set up the transformer and the VAE for sampling, and restore them afterwards."""
    vae, device = builder.vae, builder.device
    was_tiled = vae.use_tiling
    _free_memory(device)
    # Guidance needs a batch of two, and videos may have other lengths. Do not compile for them.
    with evaluation_mode(transformer, device), torch.compiler.set_stance("force_eager"):
        vae.disable_tiling()  # encodes the image without tiles, as in training
        try:
            yield
        finally:
            vae.use_tiling = was_tiled
            _free_memory(device)


@contextlib.contextmanager
def _lora_disabled(transformer: Any) -> Iterator[None]:
    control = control_of(transformer)
    transformer.disable_adapters()
    if control is not None:
        control.scale = 0.0
    try:
        yield
    finally:
        transformer.enable_adapters()
        if control is not None:
            control.scale = 1.0


def _encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """Return an mp4 of uint8 [F, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        write_video(file, frames, fps)
        return file.read_bytes()


def _decode_mp4(video: bytes, shape: ClipShape, fps: float) -> np.ndarray:
    """Return the frames of an mp4 from `_encode_mp4`, uint8 [F, h, w, 3], at most PLAYED_WIDTH wide."""
    width = min(PLAYED_WIDTH, shape.width)
    height = max(2, round(shape.height * width / shape.width / 2) * 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        file.write_bytes(video)
        return read_clip(file, ClipShape(shape.frames, height, width), fps)


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _out_of_memory_error(spec: SampleSpec, error: Exception) -> UserError:
    return UserError(
        f"sample.prompts: the video of '{spec.prompt}' ({spec.shape}) ran out of memory in the transformer "
        f"({brief(error)}). Set a smaller size, or sample.every=null, and run the same command to resume."
    )
