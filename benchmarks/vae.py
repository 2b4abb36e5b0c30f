"""Measure the VAE's encoding with its weights in the default memory layout and in channels_last_3d.

    python benchmarks/vae.py [--size real] [--bucket 81x768x1360] [--precision bf16] [--rounds 3]

Encodes one random clip in tiles, whole if `data.vae_tiling` allows it, and its first frame, with random weights. Prints
a table and one line of JSON: seconds, peak memory (of tensors on a GPU, of the process on a CPU), and the relative
distance of the encoding from that of the default layout.
"""

import argparse
import copy
import functools
from dataclasses import replace

import torch
from measuring import SIZES, distance, interleaved, machine, model_of, print_json, random_vae, seconds_text, table

from cogds.core.geometry import ClipShape
from cogds.core.vae_memory import vae_can_encode
from cogds.distributed.world import read_world
from cogds.encode.encoder import encode_pixels
from cogds.model.load import DTYPES


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH (default: the size's own)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    size, device = SIZES[args.size], read_world().device
    shape, vae_size = ClipShape.parse(args.bucket or size.bucket), model_of(size).vae_size
    vae = random_vae(size, DTYPES[args.precision], device)
    vaes = {"default": vae, "channels_last_3d": copy.deepcopy(vae)}
    for module in vaes["channels_last_3d"].modules():
        if isinstance(module, torch.nn.Conv3d):  # the VAE has 2-D convolutions too
            module.to(memory_format=torch.channels_last_3d)
    cases = [(shape, True), *([(shape, False)] if vae_can_encode(shape, False, vae_size) else [])]
    cases.append((replace(shape, frames=1), False))
    rows = []
    for clip, is_tiled in cases:
        numbers = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (clip.frames, clip.height, clip.width, 3), dtype=torch.uint8, generator=numbers)
        calls = {name: functools.partial(encode_pixels, vaes[name], pixels, is_tiled) for name in vaes}
        timings = interleaved(calls, args.rounds, device)
        is_complete = not any(timing.error for timing in timings.values())
        moments = {name: call().float() for name, call in calls.items()} if is_complete else {}
        for name, timing in timings.items():
            row = {"clip": str(clip), "tiled": is_tiled, "layout": name, **timing.numbers()}
            if moments:
                row["distance"] = distance(moments[name], moments["default"])
            rows.append(row)
    cells = [
        [row["clip"], row["tiled"], row["layout"], seconds_text(row), row.get("peak_gb"), row.get("distance")]
        for row in rows
    ]
    print(table(("clip", "tiled", "layout", "seconds", "peak GB", "distance"), cells))
    print_json("vae", machine(device), size=size.name, precision=args.precision, rows=rows)


if __name__ == "__main__":
    main()
