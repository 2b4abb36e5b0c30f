"""The report as text: a few lines for the start of training, and tables for a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cogds.formatting import counted, duration, gigabytes, number, percent
from cogds.report.facts import BucketReport, Report

ESTIMATE_NOTE = "Memory is an estimate from the shapes, not yet compared with a GPU."


def step_text(bucket: BucketReport) -> str:
    """Seconds per step: measured, `~` where only the run's mean rate is known, or "not measured"."""
    if bucket.step_s is None:
        return "not measured"
    return ("" if bucket.step_is_measured else "~") + duration(bucket.step_s)


def memory_text(bucket: BucketReport) -> str:
    """What a bucket takes on a GPU, and whether that is too much."""
    return gigabytes(bucket.memory.total_bytes) + (", too much" if bucket.shortfall else "")


def suggestion_lines(report: Report) -> list[str]:
    """The suggestion in sentences; [] where there is none."""
    if (found := report.suggestion) is None:
        return []
    before, after = found.before, found.after
    return [
        f"The buckets fit these clips badly: {percent(before.crop)} of the picture is cropped away on average, "
        f"{percent(before.upscaled)} of clips are enlarged, {percent(before.too_short)} are too short.",
        f"With data.buckets=[{', '.join(found.buckets)}] it would be {percent(after.crop)}, "
        f"{percent(after.upscaled)} and {percent(after.too_short)}.",
    ]


def held_out_lines(report: Report) -> list[str]:
    """What is held out, in a sentence; [] where nothing is."""
    num = report.num_held_out
    return [f"{counted(num, 'clip')} held out: evaluated, never trained."] if num else []


def warning_lines(report: Report) -> list[str]:
    """What stops a run or does not fit, and what is wrong with captions, in sentences; [] where nothing is."""
    captions, lines = report.captions, [one.shortfall for one in report.buckets if one.num_samples and one.shortfall]
    if report.is_refused:
        lines.append(
            f"Training will not start: {report.num_unusable:,} of {counted(report.num_rows, 'clip')} cannot be used, "
            f"and data.max_unusable allows {percent(report.max_unusable)}."
        )
    if captions.num_missing:
        lines.append(f"{counted(captions.num_missing, 'clip')} without a caption.")
    if captions.num_empty:
        lines.append(f"{counted(captions.num_empty, 'clip')} with an empty caption.")
    if captions.num_too_long:
        lines.append(
            f"{counted(captions.num_too_long, 'caption')} longer than {captions.limit} tokens: the end is not seen."
        )
    return lines


def short_report(report: Report) -> str:
    """A few lines for the start of training."""
    used = [one for one in report.buckets if one.num_samples]
    lines = [
        f"{report.num_clips:,} of {counted(report.num_rows, 'clip')} in {len(used)} of "
        f"{counted(len(report.buckets), 'bucket')}, "
        f"{number(report.steps_per_epoch)} steps an epoch; {percent(report.mean('crop_share'))} of the picture is "
        f"cropped away on average",
        *held_out_lines(report),
    ]
    if report.num_unusable:
        common = ", ".join(f"{one.num_clips:,} x {one.phrase}" for one in report.reasons[:3])
        lines.append(f"{counted(report.num_unusable, 'clip')} not trained: {common}")
    lines += warning_lines(report)
    if largest := report.largest:
        lines.append(
            f"about {gigabytes(largest.memory.total_bytes)} of GPU memory for {largest.shape} with "
            f"train.activation_checkpointing="
            f"{largest.checkpointing} (an estimate), {gigabytes(report.cache_bytes)} of cache"
        )
    return "\n".join(lines + suggestion_lines(report)[:1])


def print_report(report: Report, console: Console | None = None) -> None:
    """The whole report as tables. On what is no terminal: plain text, 160 columns wide."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=max(console.width, 160), color_system=None, highlight=False)
    # File names and captions are data: Text and markup=False keep rich from reading [brackets] in them.
    console.print(Text("What will be trained", style="bold"))
    epoch = "" if report.epoch_s is None else f", about {duration(report.epoch_s)}"
    console.print(
        Text(
            f"{report.num_clips:,} of {counted(report.num_rows, 'clip')}; {counted(report.num_ranks, 'GPU')}, "
            f"{counted(report.accumulation, 'micro-step')} a step, {number(report.steps_per_epoch)} steps an "
            f"epoch{epoch}; cache {gigabytes(report.cache_bytes)}, captions' "
            f"{gigabytes(report.caption_cache_bytes)} included"
        )
    )
    for line in held_out_lines(report):
        console.print(Text(line))
    table = _table(
        *("bucket", "clips", "samples", "tokens", "batch", "micro-steps", "steps", "cropped", "enlarged", "unused"),
        *("cache", "checkpointing", "GPU memory", "s/step"),
        console=console,
    )
    for one in report.buckets:
        table.add_row(
            *map(str, (one.shape, f"{one.num_clips:,}", f"{one.num_samples:,}", f"{one.num_tokens:,}", one.batch_size)),
            *(number(one.micro_steps), number(one.steps)),
            *map(percent, (one.crop_share, one.upscaled_share, one.unused_share)),
            *(gigabytes(one.cache_bytes), one.checkpointing, memory_text(one), step_text(one)),
            style="" if one.num_samples else "dim",
        )
    console.print(table)
    console.print(Text(ESTIMATE_NOTE, style="dim"))
    if report.rate_source:
        console.print(Text(f"Rates of {report.rate_source}; ~: from its mean rate over all buckets.", style="dim"))
    if len(report.set_clips) > 1:
        clips = ", ".join(f"set {index}: {num:,}" for index, num in enumerate(report.set_clips))
        console.print(Text(f"Clips by data set: {clips}"))
    if largest := report.largest:
        console.print(Text(f"\nGPU memory of {largest.shape}, the largest", style="bold"))
        terms = _table("part", "size", console=console)
        for name, size in largest.memory.terms().items():
            terms.add_row(name, gigabytes(size))
        terms.add_row("at the worst moment", gigabytes(largest.memory.total_bytes), style="bold")
        if report.gpu_bytes is not None:
            terms.add_row("a GPU has", gigabytes(report.gpu_bytes))
        if largest.pinned_bytes:
            terms.add_row("pinned host memory for it", gigabytes(largest.pinned_bytes))
        console.print(terms)
    if report.num_unusable:
        console.print(Text("\nWhat will not be trained", style="bold"))
        reasons = _table("clips", "why", "for example", console=console)
        for reason in report.reasons:
            reasons.add_row(f"{reason.num_clips:,}", Text(reason.phrase), Text("\n".join(map(repr, reason.examples))))
        if report.num_other_reasons:
            reasons.add_row(f"{report.num_other_reasons:,}", "other reasons", "")
        console.print(reasons)
    for line in warning_lines(report) + suggestion_lines(report):
        console.print(Text(line))


def _table(*columns: str, console: Console) -> Table:
    """A table whose columns of numbers stand right; without lines where there is no terminal."""
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("bucket", "why", "for example", "part") else "right")
    return table
