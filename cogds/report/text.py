"""The report as text: a few lines for the start of training, and tables for a terminal."""

from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogds.core.buckets import NO_IMAGE_BUCKET
from cogds.core.suggest import Fit
from cogds.data.layouts.listing import is_other_file
from cogds.formatting import counted, counts, duration, gigabytes, number, percent
from cogds.report.analysis import BucketReport, Report
from cogds.report.quality import HARDLY_MOVES

ESTIMATE_NOTE = "Memory is calculated from shapes. It has not been compared with a GPU."
NOT_MEASURED = "not measured"


def step_text(bucket: BucketReport) -> str:
    """Time per step: measured, with `~` if it follows from the run's mean rate or is estimated, or NOT_MEASURED."""
    if bucket.step_s is None:
        return NOT_MEASURED
    return ("" if bucket.step_is_measured else "~") + duration(bucket.step_s)


def memory_text(bucket: BucketReport) -> str:
    """GPU memory of a bucket, and whether it exceeds the GPU."""
    return gigabytes(bucket.memory.total_bytes) + (", too much" if bucket.shortfall else "")


def epoch_text(report: Report) -> str:
    """`2 GPUs, gradient accumulation 1, 4.5 steps per epoch (about 3 h)`."""
    time = "" if report.epoch_s is None else f" (about {duration(report.epoch_s)})"
    return (
        f"{counted(report.num_ranks, 'GPU')}, gradient accumulation {report.accumulation}, "
        f"{counted(report.steps_per_epoch, 'step')} per epoch{time}"
    )


def time_lines(report: Report) -> list[str]:
    """Sentences about the time of the run and where step times come from; [] if they are unknown."""
    if report.run_s is None:
        return []
    if report.is_estimated:
        source = f"estimated for {report.rate_source}, until steps are measured"
    else:
        source = f"measured in {report.rate_source}; ~ follows from its mean rate"
    return [
        f"{counted(report.num_steps, 'step')} in about {duration(report.run_s)}, without encoding, evaluation and "
        f"videos. Step times are {source}."
    ]


def suggestion_lines(report: Report) -> list[str]:
    """Sentences about better buckets, [] if there are none."""
    if (suggestion := report.suggestion) is None:
        return []
    # Not rounded to sizes, as a suggestion's are, and so the same as elsewhere in the report.
    before = replace(suggestion.before, crop=report.crop_share, upscaled=report.upscaled_share)
    after = suggestion.after
    return [
        f"The buckets fit these clips badly: {_misfit(before)}.",
        f"Better: data.buckets=[{', '.join(suggestion.buckets)}]: {_misfit(after, before)}.",
    ]


def _misfit(fit: Fit, now: Fit | None = None) -> str:
    """`3% of the picture cropped away (19% now), 3% of the clips upscaled (3% now)`. now: to compare with."""
    parts = []
    for name, text in (
        ("crop", "of the picture cropped away"),
        ("upscaled", "of the clips upscaled"),
        ("too_short", "of the clips without a bucket"),
    ):
        share, share_now = getattr(fit, name), getattr(now, name) if now else 0.0
        if name == "crop" or share or share_now:
            parts.append(f"{percent(share)} {text}" + (f" ({percent(share_now)} now)" if now else ""))
    return ", ".join(parts)


def held_out_lines(report: Report) -> list[str]:
    """A sentence about held-out clips, [] if there are none."""
    num = report.num_held_out
    return [f"{counted(num, 'clip')} held out for evaluation."] if num else []


def processing_lines(report: Report) -> list[str]:
    """A sentence about clips whose pixels are converted, [] if there are none."""
    parts = [f"{counted(num, 'clip')} {name}" for name, num in sorted(report.processed.items())]
    return [f"{', '.join(parts)}."] if parts else []


def caption_lines(report: Report) -> list[str]:
    """A sentence about several captions of a clip, [] if every clip has one."""
    fewest, most, mean = report.captions.per_clip
    if most == 1:
        return []
    amount = f"{most}" if fewest == most else f"{fewest} to {most}, {mean:.1f} on average"
    return [f"Captions per clip: {amount}. They take turns: each time a clip is trained, the next one is used."]


def empty_bucket_lines(report: Report) -> list[str]:
    """A sentence about buckets without clips, [] if there are none."""
    empty = [str(bucket.shape) for bucket in report.buckets if not bucket.num_samples]
    return [f"{counted(len(empty), 'bucket')} without clips: {', '.join(empty)}."] if empty else []


def quality_lines(report: Report) -> list[str]:
    """Sentences about motion and duplicates, [] if there is nothing to say."""
    quality, lines = report.quality, []
    if quality.num_scored:
        lines.append(
            f"Median motion {quality.median_motion:.3f} of the longer side per second, of "
            f"{counted(quality.num_scored, 'clip')} with a score."
        )
    if quality.num_near_duplicates:
        lines.append(f"{counted(quality.num_near_duplicates, 'near duplicate')} of other clips (duplicate_of).")
    return lines


def warning_lines(report: Report) -> list[str]:
    """Sentences about buckets that do not fit, bad clips and captions, and skipped files; [] if there are none."""
    captions, lines = report.captions, [bucket.shortfall for bucket in report.used_buckets if bucket.shortfall]
    if report.is_refused:
        lines.append(
            f"Training will not start: {report.num_unusable:,} of {counted(report.num_rows, 'clip')} cannot be used, "
            f"and data.max_unusable allows {percent(report.max_unusable)}."
        )
    if number := sum(reason.num_clips for reason in report.reasons if reason.phrase == NO_IMAGE_BUCKET):
        frames = sorted({1, *(bucket.shape.frames for bucket in report.buckets)})
        size = report.buckets[0].shape
        lines.append(
            f"{counted(number, 'image')} not trained, because no bucket has 1 frame: set data.bucket_frames={frames}, "
            f"or add buckets such as 1x{size.height}x{size.width} to data.buckets."
        )
    if report.quality.num_still:
        lines.append(
            f"{counted(report.quality.num_still, 'clip')} hardly moving (motion below {HARDLY_MOVES:g}): the LoRA "
            "learns to move less."
        )
    if report.quality.num_copies:
        lines.append(f"{counted(report.quality.num_copies, 'clip')} with the same content as another clip.")
    if captions.num_missing:
        lines.append(f"{counted(captions.num_missing, 'clip')} without a caption.")
    if captions.num_empty:
        lines.append(f"{counted(captions.num_empty, 'clip')} with an empty caption.")
    if captions.num_too_long:
        lines.append(
            f"{counted(captions.num_too_long, 'caption')} longer than {captions.limit} tokens: the rest is cut off."
        )
    return lines + skipped_lines(report)


def skipped_lines(report: Report) -> list[str]:
    """A sentence about what the listing of the datasets skipped, with the reasons; [] if it skipped nothing."""
    other = {reason: num for reason, num in report.skipped.items() if is_other_file(reason)}
    rest = {reason: num for reason, num in report.skipped.items() if reason not in other}
    parts = [
        *([counts(rest)] if rest else []),
        *([f"neither a clip nor the caption of one: {counts(other)}"] if other else []),
    ]
    return [f"Skipped in the datasets: {'; '.join(parts)}."] if parts else []


def short_report(report: Report) -> str:
    """A few lines for the start of training."""
    lines = [
        f"{report.num_clips:,} of {counted(report.num_rows, 'clip')} in {len(report.used_buckets)} of "
        f"{counted(len(report.buckets), 'bucket')}; {percent(report.crop_share)} of the picture is cropped away on "
        "average",
        *held_out_lines(report),
        *processing_lines(report),
        *caption_lines(report),
        *time_lines(report),
    ]
    if report.num_unusable:
        reasons = ", ".join(f"{reason.num_clips:,} x {reason.phrase}" for reason in report.reasons[:3])
        lines.append(f"{counted(report.num_unusable, 'clip')} not trained: {reasons}")
    lines += warning_lines(report)
    if (largest := report.largest) and report.gpu_bytes is not None:
        lines.append(
            f"about {gigabytes(largest.memory.total_bytes)} of GPU memory (calculated) for {largest.shape} with "
            f"activation checkpointing {largest.checkpointing}; {gigabytes(report.cache_bytes)} of cache"
        )
    return "\n".join(lines + suggestion_lines(report)[:1])


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the whole report as tables. Without a terminal: plain text, 160 columns wide."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 160), color_system=None, highlight=False)
    # File names and captions are data: Text keeps rich from interpreting [brackets] in them.
    console.print(Text("Clips that will be trained", style="bold"))
    console.print(
        Text(
            f"{report.num_clips:,} of {counted(report.num_rows, 'clip')}; {epoch_text(report)}; "
            f"cache {gigabytes(report.cache_bytes)}, including {gigabytes(report.caption_cache_bytes)} for captions"
        )
    )
    for line in held_out_lines(report) + caption_lines(report) + processing_lines(report):
        console.print(Text(line))
    console.print(_bucket_table(report, console))
    for line in empty_bucket_lines(report):
        console.print(Text(line, style="dim"))
    console.print(Text(ESTIMATE_NOTE, style="dim"))
    for line in time_lines(report) or ["Time not measured yet: --gpu h100 estimates it, for example."]:
        console.print(Text(line))
    if len(report.set_clips) > 1:
        clips = ", ".join(f"set {index}: {num:,}" for index, num in enumerate(report.set_clips))
        console.print(Text(f"Clips by dataset: {clips}"))
    if largest := report.largest:
        console.print(Text(f"\nGPU memory of {largest.shape}, the bucket that needs the most", style="bold"))
        terms = _table("part", "size", console=console)
        for name, size in largest.memory.terms().items():
            terms.add_row(name, gigabytes(size))
        terms.add_row("peak", gigabytes(largest.memory.total_bytes), style="bold")
        if report.gpu_bytes is not None:
            terms.add_row("GPU size", gigabytes(report.gpu_bytes))
        if largest.pinned_bytes:
            terms.add_row("pinned host memory per GPU", gigabytes(largest.pinned_bytes))
        console.print(terms)
    if report.num_unusable:
        console.print(Text("\nClips that will not be trained", style="bold"))
        reasons = _table("clips", "reason", "examples", console=console)
        for reason in report.reasons:
            reasons.add_row(f"{reason.num_clips:,}", Text(reason.phrase), Text("\n".join(map(repr, reason.examples))))
        if report.num_other_reasons:
            reasons.add_row(f"{report.num_other_reasons:,}", "other reasons", "")
        console.print(reasons)
    for line in quality_lines(report) + warning_lines(report) + suggestion_lines(report):
        console.print(Text(line))


def _bucket_table(report: Report, console: Console) -> Table:
    table = _table(
        *("bucket", "clips", "samples", "tokens", "batch", "micro-steps", "steps", "cropped", "upscaled", "unused"),
        *("cache", "checkpointing", "GPU memory", "time/step"),
        console=console,
    )
    for bucket in report.used_buckets:
        counts = (bucket.num_clips, bucket.num_samples, bucket.num_tokens, bucket.batch_size)
        table.add_row(
            str(bucket.shape),
            *(f"{count:,}" for count in counts),
            *(number(bucket.micro_steps), number(bucket.steps)),
            *map(percent, (bucket.crop_share, bucket.upscaled_share, bucket.unused_share)),
            *(gigabytes(bucket.cache_bytes), str(bucket.checkpointing), memory_text(bucket), step_text(bucket)),
        )
    return table


def _table(*columns: str, console: Console) -> Table:
    """A table with right-aligned numbers. Without rules if there is no terminal."""
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("bucket", "reason", "examples", "part") else "right")
    return table
