"""Videos generated during training with the current weights, next to the base model's videos from the same noise.

Rank 0 prepares the inputs (`SampleSpec`) and shares them. The ranks then make one video each at the same time, through
the diffusers pipeline (`LockstepTransformer`), and send the mp4 to rank 0, the only rank that writes. An error is
logged and loses only its own video. Two kinds of failure end the run: an error inside the transformer, such as running
out of memory, at ZeRO stage 3 or with sequence parallelism, since other ranks wait in that call; and a killed process.
"""

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.config.deepspeed import zero_stage
from cogds.config.schema import PromptConfig
from cogds.core.conditioning import transformer_inputs
from cogds.core.geometry import ClipShape, num_tokens, padded_latent_frames
from cogds.data.cache.store import Cache
from cogds.data.loading.dataset import read_encoded
from cogds.data.loading.index import ClipIndex
from cogds.data.video.media import read_clip, write_video
from cogds.distributed.collectives import broadcast, on_rank0
from cogds.distributed.process_group import is_lost_connection
from cogds.encode.cache_keys import CacheKeys
from cogds.engine.checkpoint import remove_folder, step_name
from cogds.errors import UserError, brief
from cogds.files import whole_file, whole_folder
from cogds.metrics.monitor import Monitor
from cogds.model.evaluation_mode import undisturbed
from cogds.model.pipelines import decode_frames, num_calls, pipeline_of, sample_latents, use_convention
from cogds.process.logs import log_failure
from cogds.train.memory_check import is_out_of_memory
from cogds.train.run import Run
from cogds.train.step import StepBuilder
from cogds.videos.image_grid import add_label, evenly_spaced_frames, make_grid, shrink
from cogds.videos.lockstep import LockstepTransformer, Stopped
from cogds.videos.sample_spec import SampleSpec, load_first_frame

logger = logging.getLogger(__name__)

FOLDER, BASE = "samples", "base"
STRIP_FRAMES, STRIP_WIDTH = 8, 200  # frames of a strip, pixels of each
PLAYED_WIDTH = 320  # pixels of a video that plays in TensorBoard


def make_previews(
    run: Run,
    engine: Any,
    builder: StepBuilder,
    monitor: Monitor,
    watch: Callable[[Callable[[], str]], None] = lambda _: None,
    stopping: Callable[[], bool] = lambda: False,
) -> "Previews | None":
    """The making of videos that `sample.every` asks for; None where there is none to make. Collective.

    watch: is told what is being done, call by call of the transformer (`Watchdog.watch`). stopping: whether this rank
    has been asked to stop: then the videos are given up.
    """
    if run.cfg.sample.every is None:
        return None
    scenes = on_rank0(run.world, lambda: _find_scenes(run))
    if not scenes:
        return None
    previews = Previews(run, engine, builder, monitor, scenes, watch, stopping)
    on_rank0(run.world, previews.introduce)
    return previews


class Previews:
    """Makes the videos of a run (`callbacks.Callback`). Those of the base model are made once."""

    name = "making videos"
    at_start = True
    on_stop = False

    def __init__(
        self,
        run: Run,
        engine: Any,
        builder: StepBuilder,
        monitor: Monitor,
        scenes: Mapping[str, SampleSpec],
        watch: Callable[[Callable[[], str]], None],
        stopping: Callable[[], bool],
    ):
        """scenes: by the name of their file, the same on all ranks."""
        assert run.cfg.sample.every is not None
        self.every: int = run.cfg.sample.every
        self._run, self._engine, self._builder, self._monitor = run, engine, builder, monitor
        self._scenes, self._watch, self._stopping = scenes, watch, stopping
        self._folder = Path(run.cfg.output_dir) / FOLDER
        self._base: dict[str, bytes] = {}  # on rank 0: the base model's videos, as mp4
        self._pipeline = pipeline_of(run.model, engine.module, builder.vae)
        self._num_calls = num_calls(self._pipeline, run.cfg.sample.num_steps)  # of the transformer, for one video
        use_convention(self._pipeline, run.cfg.conditioning.image_latents)

    def introduce(self) -> None:
        """On rank 0, before the first step: what will be made, whether it can be written, what is there already."""
        run, sample = self._run, self._run.cfg.sample
        num_rounds = -(-len(self._scenes) // run.world.data_size)
        shapes = ", ".join(dict.fromkeys(str(scene.shape) for scene in self._scenes.values()))
        logger.info(
            f"videos every {sample.every} steps: {len(self._scenes)} of {shapes}, for which every rank calls the "
            f"transformer {num_rounds * self._num_calls} times; into {self._folder}"
        )
        for line in dict.fromkeys(filter(None, map(self._risk, self._scenes.values()))):
            logger.warning(line)
        self._monitor.add_text(FOLDER, "\n".join(f"{name}: {scene.prompt}" for name, scene in self._scenes.items()))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
            if run.first_step:  # else it is another run's
                for name in self._scenes:
                    file = self._folder / BASE / f"{name}.mp4"
                    if file.is_file():
                        self._base[name] = file.read_bytes()
        except OSError as error:
            logger.warning(
                f"{self._folder} cannot be written ({brief(error)}): mend that, or the run's videos are lost"
            )

    def _risk(self, scene: SampleSpec) -> str:
        """What is risked with a video of more tokens than any bucket that is trained, else ""."""
        run = self._run
        stage, sharing = zero_stage(run.ds_config), run.world.sequence_size
        trained = [shape for shape, sizes in zip(run.buckets, run.data.index.sizes) if sum(sizes)]
        own, *most = (num_tokens(shape, run.model.geometry) for shape in (scene.shape, *trained))
        if (stage < 3 and sharing == 1) or own <= max(most):
            return ""
        return (
            f"videos of {scene.shape} take {own:,} tokens, and no bucket that is trained more than {max(most):,}: if "
            f"memory runs out in one, {'ZeRO stage 3' if stage == 3 else f'parallel.sequence_size={sharing}'} ends the "
            f"job; "
            "give sample.prompts a smaller size"
        )

    def run(self, step: int) -> None:
        """The videos of the weights after `step` steps, and what is missing of the base model's. Collective."""
        start, world, scenes = time.perf_counter(), self._run.world, self._scenes
        there, missing = on_rank0(
            world, lambda: (self._is_there(step), [one for one in scenes if one not in self._base])
        )
        if there:
            return
        # What training begins with is the base model, unless it begins with a LoRA.
        untrained = step == 0 and not self._run.cfg.lora.init_from
        base: dict[str, bytes] = {}
        made: dict[str, bytes] = {}
        try:
            with _ready_to_sample(self._engine.module, self._builder):
                if missing:
                    with _without_lora(self._engine.module):
                        base = self._film({name: scenes[name] for name in missing}, "the base model's")
                if not untrained:
                    made = self._film(scenes, f"step {step}'s")
        except Stopped:
            return
        if world.rank == 0:
            self._base |= base
            if untrained:
                made = {name: self._base[name] for name in scenes if name in self._base}
            self._keep(step, made)
            self._show(step, made)
        self._monitor.add_scalars(step, {"sample/seconds": time.perf_counter() - start})

    def _is_there(self, step: int) -> bool:
        """Whether the run goes on from a step whose videos it has made before."""
        with contextlib.suppress(OSError):
            return step == self._run.first_step > 0 and (self._folder / step_name(step)).is_dir()
        return False

    def _film(self, scenes: Mapping[str, SampleSpec], whose: str) -> dict[str, bytes]:
        """mp4s by name, on rank 0; of those that failed, none. Collective."""
        world, videos = self._run.world, {}
        names = list(scenes)
        for start in range(0, len(names), world.data_size):
            batch = names[start : start + world.data_size]
            mine = scenes[batch[world.data_rank]] if world.data_rank < len(batch) else None
            outcome = self._film_one(mine, whose)
            for number, name in enumerate(batch):
                found = broadcast(world, number * world.sequence_size, outcome)
                if isinstance(found, bytes):
                    videos[name] = found
                elif world.rank == 0:
                    logger.warning(
                        f"{whose} video of '{scenes[name].prompt}' could not be made: {found}; training goes on"
                    )
        return videos if world.rank == 0 else {}

    def _film_one(self, scene: SampleSpec | None, whose: str) -> bytes | str:
        """An mp4, or why there is none. scene: this rank's, None where it has none. Collective; raises Stopped."""
        run, sample, failure, latents = self._run, self._run.cfg.sample, "", None
        prompt = scene.prompt if scene else "another rank"

        def begin_call(number: int) -> None:
            self._watch(lambda: f"denoising step {number + 1} of {self._num_calls} of {whose} video of '{prompt}'")

        idle = self._idle_inputs() if zero_stage(run.ds_config) == 3 else None
        lockstep = LockstepTransformer(
            self._engine, run.world, self._num_calls,
            idle_inputs=idle, on_call=begin_call, is_stopping=self._stopping,
        )  # fmt: skip
        if scene is not None:
            self._pipeline.transformer = lockstep
            try:
                latents = sample_latents(
                    self._pipeline, scene.pixels, scene.states, run.data.empty_caption_states, scene.shape,
                    sample.num_steps, sample.guidance, scene.seed,
                )  # fmt: skip
            except Stopped:
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and is_lost_connection(error):
                    raise  # nothing to mend: the same command goes on, as it is
                if lockstep.in_forward and lockstep.needs_all_ranks:
                    if is_out_of_memory(error):
                        raise _uncatchable(scene, error) from error
                    raise
                failure = brief(error)
                log_failure(logger, f"{whose} video of '{prompt}' failed: {failure}", error)
            finally:
                self._pipeline.transformer = self._engine.module  # else what `lockstep` holds stays until the next one
            _free(run.world.device)
        lockstep.finish(has_failed=bool(failure))
        if latents is None or run.world.sequence_rank:
            return failure
        self._watch(lambda: f"decoding {whose} video of '{prompt}'")
        try:
            return _encoded(decode_frames(self._pipeline, latents, scene.shape).numpy(), run.cfg.data.fps)  # type: ignore[union-attr]
        except Exception as error:
            log_failure(logger, f"decoding {whose} video of '{prompt}' failed: {brief(error)}", error)
            return brief(error)
        finally:
            _free(run.world.device)

    def _idle_inputs(self) -> dict[str, Any]:
        """The smallest call of the transformer, of the model's dtype."""
        geometry, states = self._run.model.geometry, self._builder.empty_caption_states[None]
        shape = min(self._run.buckets, key=lambda one: num_tokens(one, geometry))
        height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
        latents = states.new_zeros(
            1, padded_latent_frames(shape.frames, geometry), geometry.latent_channels, height, width
        )
        timesteps = torch.zeros(1, dtype=torch.int64, device=states.device)
        return transformer_inputs(latents, latents, states, timesteps, self._builder.rotary(shape), geometry)

    def _keep(self, step: int, made: Mapping[str, bytes]) -> None:
        """Write the videos, complete or not at all."""
        folder = self._folder / step_name(step)
        try:
            for left in (self._folder / BASE).glob("*.tmp.mp4"):  # of a process that was killed
                left.unlink(missing_ok=True)
            for left in self._folder.glob("step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            for name, video in self._base.items():
                file = self._folder / BASE / f"{name}.mp4"
                if not file.is_file():  # the disk may have been full before
                    with whole_file(file) as partial:
                        partial.write_bytes(video)
            if not made:
                return
            if folder.exists():
                remove_folder(folder)
            with whole_folder(folder) as partial:
                for name, video in made.items():
                    (partial / f"{name}.mp4").write_bytes(video)
        except OSError as error:
            logger.warning(
                f"the videos of step {step} cannot be written into {folder} ({brief(error)}): training goes on"
            )

    def _show(self, step: int, made: Mapping[str, bytes]) -> None:
        """In TensorBoard: strips of frames, and what plays, before and after, with the first frame beside them."""
        fps = self._run.cfg.data.fps
        for name, video in made.items():
            scene = self._scenes[name]
            try:
                videos = {"base": self._base[name]} if name in self._base else {}
                videos |= {f"step {step}": video} if step or not videos else {}
                frames = {label: _decoded(one, scene.shape, fps) for label, one in videos.items()}
                strips, played = beside(scene.pixels, frames)
                self._monitor.add_image(step, f"{FOLDER}/{name}", strips)
                self._monitor.add_video(step, f"{FOLDER}/{name}/clip", played, fps)
            except Exception as error:  # a picture for people is worth no run
                log_failure(
                    logger, f"the video of '{scene.prompt}' cannot be shown: {brief(error)}; training goes on", error
                )


def beside(first: np.ndarray, videos: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a strip of frames a video, and a video in which they play; each with the first frame beside it.

    first: uint8 [H, W, 3]; videos: uint8 [F, H, W, 3] by their label.
    """
    image = shrink(first[None], STRIP_WIDTH)
    strips = []
    for label, video in videos.items():
        frames = [shrink(frame[None], STRIP_WIDTH) for frame in evenly_spaced_frames(video, STRIP_FRAMES)]
        strips.append([add_label(make_grid([[image, *frames]]), label)])
    parts = [add_label(shrink(first[None], PLAYED_WIDTH), "first frame")]
    parts += [add_label(shrink(video, PLAYED_WIDTH), label) for label, video in videos.items()]
    wide = first.shape[1] > first.shape[0]
    return make_grid(strips)[0], make_grid([[part] for part in parts] if wide else [parts])


def _find_scenes(run: Run) -> dict[str, SampleSpec]:
    """What to make videos from, by the name of its file. What is broken is said and left out."""
    sample, scenes = run.cfg.sample, []
    try:
        cache = Cache(run.cfg.data.cache_dir)
        if sample.prompts:
            names, places = CacheKeys(run.cfg, run.model), cache.snapshot("captions")
            for number, one in enumerate(sample.prompts):
                try:
                    key = names.caption(one.prompt).hex()
                    states = cache.read("captions", key, places.place(key) or "")["text_states"]
                    scenes.append(_from_prompt(run, one, states))
                except Exception as error:
                    log_failure(logger, f"sample.prompts[{number}], '{one.prompt}', is left out: {brief(error)}", error)
        else:
            scenes = _from_clips(run, cache)
    except Exception as error:
        log_failure(logger, f"no videos will be made during training: {brief(error)}", error)
    if not scenes:
        logger.warning("sample.every is set, but there is nothing left to make videos of: training goes on without")
    return {scene.file_stem(sample.num_steps, sample.guidance): scene for scene in scenes}


def _from_prompt(run: Run, one: PromptConfig, states: torch.Tensor) -> SampleSpec:
    """Raises UserError where its image or its size will not do."""
    shape, pixels = load_first_frame(one.image, one.size, run.buckets, run.model.geometry)
    return SampleSpec(one.prompt, shape, run.cfg.sample.seed if one.seed is None else one.seed, pixels, states)


def _from_clips(run: Run, cache: Cache) -> list[SampleSpec]:
    """Captions and first frames of held-out clips, else of those that are trained."""
    sample, scenes = run.cfg.sample, []
    data, cached = run.data, run.cfg.data.encode == "cached"
    index = data.held_out if data.held_out is not None else data.index if cached else data.trained
    if index is None:
        raise UserError("data.encode=on_the_fly keeps no clips to make videos of: give sample.prompts, or eval.every")
    for number in evenly_spaced_rows(index, sample.num_clips):
        clip = index[number]
        try:
            encoded = read_encoded(cache, clip)
            pixels = encoded["first_frame"].permute(1, 2, 0).contiguous().numpy()
            scenes.append(SampleSpec(clip.caption, clip.shape, sample.seed, pixels, encoded["text_states"]))
        except Exception as error:
            log_failure(logger, f"the video of {clip.path} is left out: {brief(error)}", error)
    return scenes


def evenly_spaced_rows(index: ClipIndex, num: int) -> list[int]:
    """Rows of so many clips, evenly spaced over the buckets of videos; over pictures where there is nothing else."""
    sizes = [sum(sets) for sets in index.sizes]
    moving = [bucket for bucket, size in enumerate(sizes) if size and index.buckets[bucket].frames > 1]
    rows = [range(index.row(bucket, 0), index.row(bucket, sizes[bucket])) for bucket in moving or range(len(sizes))]
    total = sum(map(len, rows))
    num = min(num, total)
    chosen = []
    for place in ((2 * number + 1) * total // (2 * num) for number in range(num)):
        for one in rows:
            if place < len(one):
                chosen.append(one[place])
                break
            place -= len(one)
    return list(dict.fromkeys(chosen))


@contextlib.contextmanager
def _ready_to_sample(transformer: Any, builder: StepBuilder) -> Iterator[None]:
    """Inside, the transformer and the VAE are as sampling wants them; after it, all is as it was."""
    vae, device = builder.vae, builder.device
    tiling = vae.use_tiling
    _free(device)
    # The batch of two that guidance makes, and other lengths: nothing is compiled for them.
    with undisturbed(transformer, device), torch.compiler.set_stance("force_eager"):
        vae.disable_tiling()  # the image is encoded whole, as in training
        try:
            yield
        finally:
            vae.use_tiling = tiling
            _free(device)


@contextlib.contextmanager
def _without_lora(transformer: Any) -> Iterator[None]:
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def _encoded(frames: np.ndarray, fps: float) -> bytes:
    """An mp4 of uint8 [F, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        write_video(file, frames, fps)
        return file.read_bytes()


def _decoded(video: bytes, shape: ClipShape, fps: float) -> np.ndarray:
    """The frames of an mp4 that `_encoded` made, uint8 [F, h, w, 3], small."""
    width = min(PLAYED_WIDTH, shape.width)
    height = max(2, round(shape.height * width / shape.width / 2) * 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        file.write_bytes(video)
        return read_clip(file, ClipShape(shape.frames, height, width), fps)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _uncatchable(scene: SampleSpec, error: Exception) -> UserError:
    return UserError(
        f"the video of '{scene.prompt}' ({scene.shape}) failed inside the transformer ({brief(error)}), where the "
        "other ranks wait for this one: give sample.prompts a smaller size, or set sample.every=null; the same command "
        "goes on from the last checkpoint"
    )
