"""Time and peak memory of each command on a CPU, for a model with the sizes of CogVideoX1.5-5B-I2V.

    python benchmarks/real_geometry.py /tmp/real                  # 5.57 B parameters: 20 GB of disk
    python benchmarks/real_geometry.py /tmp/real --limit 600      # on a CPU with slow products in bf16
    python benchmarks/real_geometry.py /tmp/real --layers 1 --precision fp32  # a rehearsal

The script writes a diffusers folder: the real transformer in bf16 (three files and their index), and a tiny VAE and T5
of the real classes. All weights are random. It then runs the report, preflight, a dry run and the training of a LoRA on
small clips with one rank, exports the LoRA, and loads it with diffusers. FOLDER must not exist. It is removed at the
end.

Some CPUs multiply in bf16 so slowly that a step takes hours. --limit stops the commands that compute steps after that
time, and the table says so. If training was stopped, the script exports a LoRA with random weights instead.

The memory of a command is the largest resident memory of any of its processes, which includes the pages of mapped
files, and once per second that without them. This process stays small, because a child counts the memory that it
inherits. Prints a table, then one line of JSON.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NUM_LAYERS = 42
NUM_FILES = 3  # of the published transformer
BUCKET, NUM_CLIPS, NUM_STEPS = "9x64x96", 2, 2
TENSORS_PER_LAYER = 8  # A and B of four linear layers
TIMEOUT_S = 3600.0


class Result(NamedTuple):
    """A command. peak_gb, own_gb: of its largest process, with and without mapped files. is_ended: by its limit."""

    command: str
    seconds: float
    peak_gb: float
    own_gb: float
    is_ended: bool
    output: str


class Watch(threading.Thread):
    """Samples the memory of all processes of a session, and kills them after a time limit."""

    def __init__(self, session: int, limit_s: float):
        super().__init__(daemon=True)
        self.session, self.limit_s = session, limit_s
        self.peak_bytes, self.own_bytes, self.is_ended = 0, 0, False
        self.is_over = threading.Event()

    def run(self) -> None:
        deadline = time.perf_counter() + self.limit_s
        while not self.is_over.wait(1.0):
            for status in Path("/proc").glob("[0-9]*/status"):
                try:
                    if os.getsid(int(status.parent.name)) == self.session:
                        self._count(status.read_text())
                except OSError:  # it has ended
                    continue
            if time.perf_counter() > deadline:
                self.is_ended = True
                self.kill()
                return

    def _count(self, status: str) -> None:
        sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}
        self.peak_bytes = max(self.peak_bytes, sizes.get("VmHWM", 0))
        self.own_bytes = max(self.own_bytes, sizes.get("RssAnon", 0))

    def kill(self) -> None:
        # At SIGTERM, DeepSpeed's launcher would end other launches on this machine as well.
        os.killpg(self.session, signal.SIGKILL)


def run(
    name: str, command: Sequence[object], codes: Sequence[int] = (0,), limit_s: float = TIMEOUT_S, may_end: bool = False
) -> Result:
    """Run a command in a session of its own and measure it. Ends this program if it fails.

    codes: exit codes that are accepted. may_end: whether the command may be ended by its limit.
    """
    print(f"{name}: {' '.join(map(str, command))}", flush=True)
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    watch = Watch(process.pid, limit_s)
    watch.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.decode(errors="replace"))
            print(f"  {time.perf_counter() - start:6.1f} s  {lines[-1]}", end="", flush=True)
        # Unlike `resource`, wait4 measures this child alone, with the processes that it has waited for.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        watch.kill()
        raise
    finally:
        watch.is_over.set()
    process.returncode = code = os.waitstatus_to_exitcode(status)
    seconds, peak_bytes = time.perf_counter() - start, max(watch.peak_bytes, usage.ru_maxrss * 1024)
    ending = "ended by its limit" if watch.is_ended else f"exit code {code}"
    sizes = round(peak_bytes / 1e9, 2), round(watch.own_bytes / 1e9, 2)
    print(f"{name}: {seconds:.0f} s, {sizes[0]} GB, {sizes[1]} GB without mapped files, {ending}", flush=True)
    if code not in codes and not (watch.is_ended and may_end):
        raise SystemExit(f"error: {name}: {ending}.")
    return Result(name, round(seconds, 1), *sizes, watch.is_ended, "".join(lines))


def write_transformer(folder: Path, num_layers: int) -> None:
    """Write the transformer with random weights. Only one weight is in memory at a time.

    All are parts of the same random numbers, because drawing each would take minutes.
    """
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from measuring import SIZES

    from cogds.model.weight_files import weight_files, write_index
    from cogds.tensor_file import TensorEntry, write_tensors

    def draw(entry: TensorEntry) -> torch.Tensor:
        num_elements = math.prod(entry.shape)
        if len(entry.shape) > 1:
            start = random.randrange(len(numbers) - num_elements + 1)
            return numbers[start : start + num_elements].view(entry.shape)
        # Of a norm, or a bias.
        return torch.full(entry.shape, float(entry.name.endswith("weight")), dtype=entry.dtype)

    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**SIZES["real"].transformer | {"num_layers": num_layers})
    transformer.save_config(folder)
    entries = [
        TensorEntry(name, tuple(weight.shape), torch.bfloat16) for name, weight in transformer.named_parameters()
    ]
    random.seed(0)
    largest = max(math.prod(entry.shape) for entry in entries)
    numbers = torch.empty(largest + 10**6, dtype=torch.bfloat16).normal_(std=0.02)
    files = weight_files(entries, int(sum(entry.num_bytes for entry in entries) / (NUM_FILES - 0.5)))
    for name, part in files.items():
        write_tensors(folder / name, part, map(draw, part), {"format": "pt"})
    write_index(folder, files)


def create(folder: Path, num_layers: int) -> None:
    """Write the model, with the tests' tiny VAE and T5 in the sizes that the transformer needs, and clips."""
    import numpy as np
    from diffusers import AutoencoderKLCogVideoX
    from measuring import SIZES
    from transformers import T5Config, T5EncoderModel

    from cogds.data.video.media import write_video
    from tests.tiny import create_tiny_model

    model, real = folder / "model", SIZES["real"]
    create_tiny_model(model)
    vae = AutoencoderKLCogVideoX.load_config(model / "vae") | {"latent_channels": real.vae["latent_channels"]}
    text = T5Config.from_pretrained(model / "text_encoder").to_dict() | {"d_model": real.transformer["text_embed_dim"]}
    for part in ("transformer", "vae", "text_encoder"):
        shutil.rmtree(model / part)
    AutoencoderKLCogVideoX.from_config(vae).save_pretrained(model / "vae")
    T5EncoderModel(T5Config.from_dict(text)).save_pretrained(model / "text_encoder")
    (model / "transformer").mkdir()
    write_transformer(model / "transformer", num_layers)

    rng, clips = np.random.default_rng(0), folder / "clips"
    clips.mkdir()
    frames, height, width = map(int, BUCKET.split("x"))
    for number in range(NUM_CLIPS):
        first = rng.integers(0, 256, (1, height // 8, width // 8, 3)).repeat(8, 1).repeat(8, 2)
        video = (first + 4 * np.arange(frames + 3)[:, None, None, None]).astype(np.uint8)
        write_video(clips / f"{number}.mp4", video, 16, num_threads=1)
        (clips / f"{number}.txt").write_text("a red circle moves from left to right")


def draw_lora(folder: Path, rank: int) -> None:
    """Write a LoRA with random weights, in place of a trained one."""
    import torch
    from measuring import TARGETS

    from cogds.model.load import empty_transformer, find_model
    from cogds.model.lora.adapter import linear_layers, resolve_targets
    from cogds.model.lora.convert import Adapter, Layer, save_diffusers

    transformer = empty_transformer(find_model(str(folder / "model")))
    sizes, layers = linear_layers(transformer), {}
    torch.manual_seed(0)
    for name in resolve_targets(transformer, TARGETS):
        num_out, num_in = sizes[name]
        a, b = (0.02 * torch.randn(shape) for shape in ((rank, num_in), (num_out, rank)))
        layers[name] = Layer(a.bfloat16(), b.bfloat16(), scale=1.0)
    (folder / "drawn").mkdir()
    save_diffusers(Adapter(layers, {}), folder / "drawn")


def load_in_diffusers(folder: Path) -> None:
    """Load the model and the exported LoRA with diffusers alone, and compare the LoRA in the pipeline with the file."""
    import torch
    from diffusers import CogVideoXImageToVideoPipeline
    from safetensors.torch import load_file

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder / "model", dtype=torch.bfloat16)
    pipeline.load_lora_weights(folder / "exported")
    (file,) = (folder / "exported").glob("*.safetensors")
    weights = load_file(file)
    loaded = {
        "transformer." + re.sub(r"(lora_[AB])\.[^.]+", r"\1", name): parameter
        for name, parameter in pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    assert loaded.keys() == weights.keys()
    equal = [name for name, weight in weights.items() if torch.equal(loaded[name], weight.to(torch.bfloat16))]
    trained = [name for name in equal if "lora_B" in name and loaded[name].any() and loaded[name].isfinite().all()]
    layer = pipeline.transformer.transformer_blocks[-1].attn1.to_q
    (adapter,) = layer.scaling
    counts = {
        "num_parameters": sum(
            parameter.numel() for name, parameter in pipeline.transformer.named_parameters() if "lora_" not in name
        ),
        "num_tensors": len(equal),
        "num_trained": len(trained),
        "scale": layer.scaling[adapter],
        "largest_change": layer.get_delta_weight(adapter).abs().max().item(),
    }
    print(f"RESULT {json.dumps(counts)}")


def losses(run_folder: Path) -> list[float]:
    """The loss of every step."""
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def measure(folder: Path, args: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    """Run all commands. Returns their results, and what the LoRA is in diffusers."""
    python, own = sys.executable, Path(__file__).name
    words = [
        f"model.path={folder / 'model'}", f"data.path={folder / 'clips'}", f"data.buckets=[{BUCKET}]",
        f"data.cache_dir={folder / 'cache'}", f"output_dir={folder / 'run'}", f"train.num_steps={NUM_STEPS}",
        f"train.precision={args.precision}", "optimizer.warmup_steps=0", "eval.every=null", "data.num_workers=1",
        f"lora.rank={args.rank}", f"lora.alpha={args.rank}",
    ]  # fmt: skip
    zero2, cogds = ["--deepspeed", "zero2"], [python, "-m", "cogds"]
    launcher = [Path(python).parent / "deepspeed", "--num_gpus", "1", "--master_port", str(args.port)]
    lora = folder / f"run/lora/step-{NUM_STEPS:06d}"
    parts = [python, f"benchmarks/{own}", folder, "--layers", args.layers, "--rank", args.rank, "--part"]
    steps: dict[str, Any] = {"limit_s": args.limit, "may_end": True}
    results = [
        run("create the folder", [*parts, "create"]),
        run("report", [*cogds, "report", *zero2, *words]),
        run("preflight without a step", [*cogds, "preflight", *zero2, "--skip", "step", *words]),
    ]
    if not args.no_trial_step:  # a step that takes longer than preflight's own limit is a finding, and code 2
        results.append(run("preflight", [*cogds, "preflight", *zero2, *words], (0, 2), **steps))
    train = [*launcher, ROOT / "launch/train.py", "--deepspeed", ROOT / "ds_configs/zero2.json", *words]
    results += [
        run("train --dry-run", [*cogds, "train", "--dry-run", *zero2, *words], **steps),
        run("train", train, **steps),
    ]
    if results[-1].is_ended:
        lora = folder / "drawn"
        results.append(run("draw a LoRA", [*parts, "draw"]))
    else:
        assert (folder / f"run/checkpoints/step-{NUM_STEPS:06d}/state.json").is_file()
    export = [*cogds, "export", lora, "--model", folder / "model", "--to", "diffusers"]
    results += [
        run("export", [*export, "--output", folder / "exported"]),
        run("load in diffusers", [*parts, "load"]),
    ]
    found = re.search(r"^RESULT (.*)$", results[-1].output, re.MULTILINE)
    assert found
    return results, json.loads(found[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--limit", type=float, default=TIMEOUT_S, help="of a command that computes a step [s]")
    parser.add_argument("--no-trial-step", action="store_true", help="leave out the preflight with a step")
    parser.add_argument("--port", type=int, default=29617, help="of DeepSpeed's launcher")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder")
    parser.add_argument("--part", choices=("create", "draw", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part == "create":
        create(args.folder, args.layers)
        return
    if args.part == "draw":
        draw_lora(args.folder, args.rank)
        return
    if args.part == "load":
        load_in_diffusers(args.folder)
        return
    folder = args.folder.absolute()
    folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # kills the command in progress
    try:
        results, lora = measure(folder, args)
        is_trained = not any(result.command == "draw a LoRA" for result in results)
        step_losses = losses(folder / "run") if is_trained else []
        files = {path.name: path.stat().st_size for path in sorted((folder / "model/transformer").iterdir())}
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    from measuring import machine, print_json, read_world, table  # not before: it would make this process large

    rows = [{name: value for name, value in result._asdict().items() if name != "output"} for result in results]
    size = f"{lora['num_parameters']:,} parameters, bucket {BUCKET}, LoRA rank {args.rank}, {args.precision}"
    print(f"{size}, ZeRO-2, one rank")
    head = ("command", "time [s]", "peak memory [GB]", "without mapped files [GB]", "ended by --limit")
    print(table(head, [list(row.values()) for row in rows]))
    print_json(
        "real_geometry", machine(read_world().device), layers=args.layers, precision=args.precision, bucket=BUCKET,
        rows=rows, files=files, is_trained=is_trained, losses=step_losses, lora=lora,
    )  # fmt: skip
    if lora["num_tensors"] != TENSORS_PER_LAYER * args.layers or not lora["num_trained"]:
        raise SystemExit("error: the LoRA in diffusers is not what was trained.")


if __name__ == "__main__":
    main()
