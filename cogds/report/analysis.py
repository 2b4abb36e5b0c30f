"""Which clips will be trained, in which buckets, and at what cost. `text` and `html` present the result.

Opens neither clips nor model files and loops over no rows: twenty million clips take a few seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.buckets import NO_IMAGE_BUCKET, TOO_SHORT
from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.flops import ASSUMED_EFFICIENCY, PEAK_TFLOPS, estimate_seconds, training_flops
from cogds.core.geometry import ClipShape, ModelGeometry, cached_caption_bytes, cached_clip_bytes, num_tokens
from cogds.core.memory import MemoryEstimate, MemoryModel
from cogds.core.memory_advice import explain_shortfall
from cogds.core.suggest import (
    ClipSizes,
    Suggestion,
    are_single_frames,
    count_sizes,
    crop_shares,
    fit,
    merge_sizes,
    suggest_areas,
    suggest_buckets,
    suggest_lengths,
)
from cogds.data.storage.location import display_name
from cogds.report.quality import ClipQuality, clip_quality

# Rows processed at a time, to bound memory for tables of millions of clips.
ROWS_AT_ONCE = 1 << 20
NUM_EXAMPLES = 3
MAX_REASONS = 20
MAX_SUGGESTED = 24
# Other buckets are suggested above any of these: mean share cropped, shares of clips upscaled and too short.
MAX_CROPPED, MAX_UPSCALED, MAX_TOO_SHORT = 0.15, 0.25, 0.1
# Steps at the start of a run whose times are ignored: they compile and warm up.
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class ClipTable:
    """The dataset, one row per clip of the manifest, without held-out clips.

    Attributes:
        table: columns path, kind, width, height (as displayed), processing, status ("ok" or "unusable"), reason ("short
            phrase: detail"), caption, start_s, end_s, set, digest, motion, duplicate_of.
        buckets: int [N], -1 for a clip without a bucket.
        frames: int [N], at the target frame rate, within the clip's time range.
        num_windows: int [N], samples of each clip. None: one each.
        num_held_out: clips not in the table because they are held out for evaluation.
        skipped: what the listing of the datasets skipped: reason -> number.
        num_mirrored: int [N], samples of each clip that are mirror images of others. None: none.
    """

    table: pa.Table
    buckets: np.ndarray
    frames: np.ndarray
    num_windows: np.ndarray | None = None
    num_held_out: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    num_mirrored: np.ndarray | None = None

    def samples_of(self, rows: slice) -> np.ndarray:
        """Number of samples of each of these rows, int64."""
        trained = self.buckets[rows] >= 0
        return np.where(trained, 1 if self.num_windows is None else self.num_windows[rows], 0).astype(np.int64)

    def mirrored_of(self, rows: slice) -> np.ndarray | int:
        """Number of samples of each of these rows that are mirror images."""
        return 0 if self.num_mirrored is None else self.num_mirrored[rows]


@dataclass(frozen=True)
class Captions:
    """Numbers of clips with caption problems, and of distinct captions.

    Attributes:
        limit: of a caption, in tokens.
        per_clip: smallest and largest number of captions of a usable clip, and the mean.
    """

    num_missing: int
    num_empty: int
    num_too_long: int
    num_distinct: int
    limit: int
    per_clip: tuple[int, int, float] = (1, 1, 1.0)


@dataclass(frozen=True)
class Rates:
    """How fast a run is.

    Attributes:
        tokens_per_s: over all ranks.
        step_s: seconds per optimizer step by bucket.
        source: the file with the measurements, or how they were estimated.
        is_estimate: whether nothing was measured.
    """

    tokens_per_s: float
    step_s: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    is_estimate: bool = False


@dataclass(frozen=True)
class TrainingSetup:
    """Settings of the run that decide its cost.

    Attributes:
        batch_sizes: clips per rank and micro-step, by bucket.
        accumulation: micro-steps per optimizer step.
        checkpointing: activation checkpointing, by bucket.
        is_cached: whether clips are encoded into a cache before training.
        epoch_sizes: samples of each bucket in one epoch, repeats included. None: the clips' windows.
        steps_per_epoch: optimizer steps. None: calculated from the samples.
        num_steps: optimizer steps of the run.
        max_unusable: share of unusable clips up to which training starts.
        has_own_buckets: whether data.buckets is set.
        gpu_bytes: memory of one GPU, None on CPUs.
        model_notes: where the settings differ from what the model was trained for.
    """

    memory: MemoryModel
    batch_sizes: Sequence[int]
    accumulation: int
    checkpointing: Sequence[BlockCheckpointing]
    is_cached: bool = True
    epoch_sizes: Sequence[float] | None = None
    steps_per_epoch: float | None = None
    num_steps: int = 0
    rates: Rates | None = None
    max_unusable: float = 1.0
    has_own_buckets: bool = False
    gpu_bytes: float | None = None
    model_notes: Sequence[str] = ()

    @property
    def buckets(self) -> tuple[ClipShape, ...]:
        return self.memory.buckets

    @property
    def geometry(self) -> ModelGeometry:
        return self.memory.geometry

    @property
    def num_data_ranks(self) -> int:
        """Groups of ranks that train different clips."""
        return self.memory.num_ranks // self.memory.sequence_size


@dataclass(frozen=True)
class BucketReport:
    """One bucket. Shares are in [0, 1], and 0 without clips.

    Attributes:
        micro_steps, steps: of one epoch.
        crop_share: mean share of the picture cropped away.
        upscaled_share: share of clips that are upscaled.
        unused_share: mean share of a clip's frames that are in no sample.
        checkpointing: activation checkpointing.
        pinned_bytes: host memory per GPU.
        shortfall: a sentence if the bucket does not fit into GPU memory, else "".
        step_s: None if unknown.
        step_is_measured: whether step_s was measured in this bucket, or follows from the run's mean rate, or is an
            estimate.
    """

    shape: ClipShape
    num_clips: int
    num_samples: int
    num_tokens: int
    batch_size: int
    micro_steps: float
    steps: float
    crop_share: float
    upscaled_share: float
    unused_share: float
    cache_bytes: int
    checkpointing: BlockCheckpointing
    memory: MemoryEstimate
    pinned_bytes: int
    shortfall: str
    step_s: float | None
    step_is_measured: bool


@dataclass(frozen=True)
class Reason:
    """A reason why clips are not trained, their number, and the paths of a few."""

    phrase: str
    num_clips: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The whole report.

    Attributes:
        num_steps: optimizer steps of the run.
        epoch_s: None if the step time of a bucket with clips is unknown.
        processed: what is done to pixels (`VideoInfo.processing`), and the number of trained clips.
    """

    num_rows: int
    buckets: tuple[BucketReport, ...]
    reasons: tuple[Reason, ...]
    num_other_reasons: int
    captions: Captions
    caption_cache_bytes: int
    steps_per_epoch: float
    num_ranks: int
    accumulation: int
    num_steps: int
    epoch_s: float | None
    rate_source: str
    is_estimated: bool
    suggestion: Suggestion | None
    set_clips: tuple[int, ...]
    max_unusable: float = 1.0
    gpu_bytes: float | None = None
    num_held_out: int = 0
    num_single_frames: int = 0
    has_own_buckets: bool = False
    quality: ClipQuality = field(default_factory=ClipQuality)
    processed: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    model_notes: Sequence[str] = ()
    has_fixed_size: bool = False

    @property
    def run_s(self) -> float | None:
        """Seconds of all steps, without encoding, evaluation and videos. None if the time of a step is unknown."""
        return self.epoch_s and self.epoch_s / self.steps_per_epoch * self.num_steps

    @property
    def is_refused(self) -> bool:
        """Whether training will not start because too many clips are unusable."""
        return self.num_unusable > self.max_unusable * self.num_rows

    @property
    def used_buckets(self) -> tuple[BucketReport, ...]:
        """The buckets that have clips."""
        return tuple(bucket for bucket in self.buckets if bucket.num_samples)

    @property
    def num_clips(self) -> int:
        return sum(bucket.num_clips for bucket in self.buckets)

    @property
    def num_unusable(self) -> int:
        return self.num_rows - self.num_clips - self.num_held_out

    @property
    def cache_bytes(self) -> int:
        return self.caption_cache_bytes + sum(bucket.cache_bytes for bucket in self.buckets)

    @property
    def largest(self) -> BucketReport | None:
        """The bucket with clips that needs the most GPU memory."""
        return max(self.used_buckets, key=lambda bucket: bucket.memory.total_bytes, default=None)

    @property
    def crop_share(self) -> float:
        """Mean share of the picture cropped away, over trained clips."""
        return sum(bucket.crop_share * bucket.num_clips for bucket in self.buckets) / max(1, self.num_clips)

    @property
    def upscaled_share(self) -> float:
        """Share of trained clips that are upscaled."""
        return sum(bucket.upscaled_share * bucket.num_clips for bucket in self.buckets) / max(1, self.num_clips)


def make_report(clips: ClipTable, setup: TrainingSetup, captions: Captions) -> Report:
    """Analyze the dataset for a run."""
    sums, sizes = _count(clips, setup.buckets)
    samples = sums["samples"] if setup.epoch_sizes is None else np.asarray(setup.epoch_sizes, np.float64)
    # If a bucket has fewer batches than there are ranks, the remaining ranks train copies: see core.plan.
    local = np.minimum(setup.batch_sizes, np.maximum(1, samples))
    micro_steps = samples / (local * np.clip(samples // local, 1, setup.num_data_ranks))
    steps = micro_steps / setup.accumulation
    memory, element_bytes = setup.memory, setup.memory.element_bytes
    buckets = []
    for index, shape in enumerate(setup.buckets):
        num_clips, batch_size = int(sums["clips"][index]), setup.batch_sizes[index]
        step_s, is_measured = _step_s(shape, batch_size, setup)
        buckets.append(
            BucketReport(
                shape=shape,
                num_clips=num_clips,
                num_samples=int(sums["samples"][index]),
                num_tokens=num_tokens(shape, setup.geometry),
                batch_size=batch_size,
                micro_steps=float(micro_steps[index]),
                steps=float(steps[index]),
                crop_share=float(sums["crop"][index] / max(1, num_clips)),
                upscaled_share=float(sums["upscaled"][index] / max(1, num_clips)),
                unused_share=float(sums["unused"][index] / max(1, num_clips)),
                cache_bytes=(
                    int(sums["samples"][index])
                    * cached_clip_bytes(shape, setup.geometry, element_bytes, memory.has_control)
                    if setup.is_cached
                    else 0
                ),
                checkpointing=setup.checkpointing[index],
                memory=memory.estimate(shape, batch_size, setup.checkpointing[index]),
                pinned_bytes=memory.pinned_host_bytes(shape, batch_size, setup.checkpointing[index]),
                shortfall=explain_shortfall(memory, shape, batch_size, setup.checkpointing[index], setup.gpu_bytes),
                step_s=step_s,
                step_is_measured=is_measured,
            )
        )
    reasons, num_others = _reasons(clips)
    caption_bytes = cached_caption_bytes(setup.geometry, memory.transformer.text_dim, element_bytes)
    return Report(
        num_rows=len(clips.table) + clips.num_held_out,
        buckets=tuple(buckets),
        reasons=reasons,
        num_other_reasons=num_others,
        captions=captions,
        caption_cache_bytes=captions.num_distinct * caption_bytes if setup.is_cached else 0,
        steps_per_epoch=float(steps.sum()) if setup.steps_per_epoch is None else setup.steps_per_epoch,
        num_ranks=memory.num_ranks,
        accumulation=setup.accumulation,
        num_steps=setup.num_steps,
        epoch_s=_epoch_s(buckets),
        rate_source=setup.rates.source if setup.rates else "",
        is_estimated=setup.rates is not None and setup.rates.is_estimate,
        suggestion=_suggestion(sizes, setup),
        set_clips=tuple(int(number) for number in sums["sets"]),
        max_unusable=setup.max_unusable,
        gpu_bytes=setup.gpu_bytes,
        num_held_out=clips.num_held_out,
        num_single_frames=int(sums["single"].sum()),
        has_own_buckets=setup.has_own_buckets,
        quality=clip_quality(clips.table, pa.array(clips.buckets >= 0)),
        processed=_count_processed(clips),
        skipped=clips.skipped,
        model_notes=setup.model_notes,
        has_fixed_size=setup.geometry.has_fixed_size,
    )


def read_rates(file: Path) -> Rates | None:
    """Read rates from an earlier run's `metrics.jsonl`. None if there is no file or it has too few steps.

    A bucket's step time is the median over the steps that trained no other bucket.
    """
    if not file.is_file():
        return None
    tokens_per_s: list[float] = []
    by_bucket: dict[str, list[float]] = {}
    num_steps = 0
    with file.open() as lines:
        for line in lines:
            try:
                scalars = json.loads(line)
                rate, step_s = float(scalars["perf/tokens_per_s"]), float(scalars["perf/step_s"])
            except (ValueError, KeyError, TypeError):
                continue  # not a training step, or a line cut short by a kill
            num_steps += 1
            if num_steps <= WARM_UP_STEPS:
                continue
            tokens_per_s.append(rate)
            names = [name.partition("bucket=")[2] for name in scalars if name.startswith("train/loss/bucket=")]
            if len(names) == 1:
                by_bucket.setdefault(names[0], []).append(step_s)
    if not tokens_per_s:
        return None
    return Rates(median(tokens_per_s), {name: median(times) for name, times in by_bucket.items()}, str(file))


def estimate_rates(setup: TrainingSetup, device: str) -> Rates:
    """Estimate the rates on a GPU from the operations of a step. device: a key of `PEAK_TFLOPS`."""
    memory, step_s, num_trained = setup.memory, {}, 0.0
    for shape, batch_size, checkpointing in zip(setup.buckets, setup.batch_sizes, setup.checkpointing, strict=True):
        tokens = num_tokens(shape, setup.geometry)
        clip = training_flops(tokens, memory.transformer, memory.trained)
        flops = clip.hardware_flops(checkpointing) * batch_size * setup.accumulation / memory.sequence_size
        step_s[str(shape)] = estimate_seconds(flops, device)
        num_trained += tokens * batch_size * setup.num_data_ranks * setup.accumulation
    source = f"{device} at {100 * ASSUMED_EFFICIENCY:.0f}% of its peak of {PEAK_TFLOPS[device]:,.0f} TFLOP/s"
    return Rates(num_trained / sum(step_s.values()), step_s, source, is_estimate=True)


def _epoch_s(buckets: Sequence[BucketReport]) -> float | None:
    """Seconds per epoch, None if the step time of a bucket with clips is unknown."""
    total_s = 0.0
    for bucket in buckets:
        if bucket.num_samples and bucket.step_s is None:
            return None
        total_s += bucket.steps * (bucket.step_s or 0.0)
    return total_s


def _step_s(shape: ClipShape, batch_size: int, setup: TrainingSetup) -> tuple[float | None, bool]:
    """Seconds per optimizer step of a bucket, and whether they were measured in this bucket."""
    if setup.rates is None:
        return None, False
    if str(shape) in setup.rates.step_s:
        return setup.rates.step_s[str(shape)], not setup.rates.is_estimate
    tokens = num_tokens(shape, setup.geometry) * batch_size * setup.num_data_ranks * setup.accumulation
    return tokens / setup.rates.tokens_per_s, False


def _count(clips: ClipTable, buckets: Sequence[ClipShape]) -> tuple[dict[str, np.ndarray], ClipSizes]:
    """Sum over clips by bucket (`sets`: by dataset), and count the sizes of all usable clips."""
    num, longest = len(buckets), max(shape.frames for shape in buckets)
    shapes = np.array([(shape.frames, shape.height, shape.width) for shape in buckets])
    names = ("clips", "samples", "crop", "upscaled", "unused", "single")
    sums, parts = {name: np.zeros(num) for name in names}, []
    sums["sets"] = np.zeros(int(pc.max(clips.table.column("set")).as_py() or 0) + 1 if len(clips.table) else 1)
    for start in range(0, len(clips.table), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(clips.table)))
        part = clips.table.slice(start, rows.stop - start)
        height, width = (pc.fill_null(part.column(name), 0).to_numpy() for name in ("height", "width"))
        usable = pc.equal(part.column("status"), "ok").to_numpy() & (height > 0) & (width > 0)
        frames, bucket, samples = clips.frames[rows], clips.buckets[rows].astype(np.int64), clips.samples_of(rows)
        windows = samples - clips.mirrored_of(rows)
        parts.append(count_sizes(frames[usable], height[usable], width[usable], longest))
        trained = (bucket >= 0) & usable
        bucket, samples, windows, frames = (values[trained] for values in (bucket, samples, windows, frames))
        target = shapes[bucket]
        crop = crop_shares(height[trained], width[trained], target[:, 1], target[:, 2])
        upscaled = (target[:, 1] > height[trained]) | (target[:, 2] > width[trained])
        unused = 1 - np.minimum(1, windows * target[:, 0] / np.maximum(frames, 1))
        single = are_single_frames(frames, bucket, buckets)
        for name, values in zip(names, (None, samples, crop, upscaled, unused, single)):
            sums[name] += np.bincount(bucket, weights=values, minlength=num)
        sets = pc.fill_null(part.column("set"), 0).to_numpy()[trained].astype(np.int64)
        sums["sets"] += np.bincount(sets, minlength=len(sums["sets"]))
    empty = np.zeros(0, np.int64)
    return sums, merge_sizes(parts) if parts else ClipSizes(empty, empty, empty, empty)


def _reasons(clips: ClipTable) -> tuple[tuple[Reason, ...], int]:
    """The most frequent reasons, most frequent first, and the number of clips with any other reason."""
    unusable = pc.not_equal(clips.table.column("status"), "ok").to_numpy()
    counts: dict[str, int] = {}
    examples: dict[str, tuple[str, ...]] = {}
    listed = clips.table.select(["path", "reason"]).filter(pa.array(unusable))
    if len(listed):
        texts = pc.fill_null(listed.column("reason"), "no reason given")
        phrases = pc.list_element(pc.split_pattern(texts, ":", max_splits=1), 0).combine_chunks().dictionary_encode()
        indices, names = phrases.indices.to_numpy(), phrases.dictionary.to_pylist()
        total = np.bincount(indices, minlength=len(names))
        for number in np.argsort(-total, kind="stable")[:MAX_REASONS].tolist():
            rows = np.flatnonzero(indices == number)[:NUM_EXAMPLES]
            counts[names[number]] = int(total[number])
            examples[names[number]] = _display_names(listed, rows)
    # Usable clips without a bucket. The manifest gives no reason for these.
    without_bucket = ~unusable & (clips.buckets < 0)
    is_image = clips.frames == 1
    for phrase, rows in ((TOO_SHORT, without_bucket & ~is_image), (NO_IMAGE_BUCKET, without_bucket & is_image)):
        if number := int(rows.sum()):
            counts[phrase] = number
            examples[phrase] = _display_names(clips.table, np.flatnonzero(rows)[:NUM_EXAMPLES])
    reasons = [Reason(phrase, number, examples[phrase]) for phrase, number in counts.items()]
    reasons.sort(key=lambda reason: (-reason.num_clips, reason.phrase))
    return tuple(reasons), int(unusable.sum() + without_bucket.sum()) - sum(counts.values())


def _display_names(table: pa.Table, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(map(display_name, table.column("path").take(pa.array(rows)).to_pylist()))


def _count_processed(clips: ClipTable) -> dict[str, int]:
    """Number of trained clips by what is done to their pixels."""
    texts = clips.table.column("processing").filter(pa.array(clips.buckets >= 0))
    num_mirrored = 0 if clips.num_mirrored is None else int(clips.num_mirrored.sum())
    counts: dict[str, int] = {}
    for item in pc.value_counts(texts).to_pylist():
        for name in filter(None, (item["values"] or "").split(", ")):
            counts[name] = counts.get(name, 0) + item["counts"]
    return counts | ({"trained mirrored too": num_mirrored} if num_mirrored else {})


def _suggestion(sizes: ClipSizes, setup: TrainingSetup) -> Suggestion | None:
    """Suggest buckets if the given ones fit badly and others improve on them."""
    if not len(sizes):
        return None
    now = fit(sizes, setup.buckets)
    if now.crop <= MAX_CROPPED and now.upscaled <= MAX_UPSCALED and now.too_short <= MAX_TOO_SHORT:
        return None
    given_lengths = [shape.frames for shape in setup.buckets]
    videos = [frames for frames in given_lengths if frames > 1]
    lengths = suggest_lengths(sizes, videos or given_lengths, setup.geometry, MAX_TOO_SHORT)
    if (sizes.frames == 1).any():
        lengths = sorted({1, *lengths})
    given = {shape.height * shape.width for shape in setup.buckets}
    areas = suggest_areas(sizes, [max(given)], MAX_UPSCALED)
    max_buckets = max(MAX_SUGGESTED, len(setup.buckets))
    suggestion = suggest_buckets(sizes, setup.buckets, areas, lengths, setup.geometry, max_buckets)
    return suggestion if set(suggestion.buckets) != set(map(str, setup.buckets)) else None
