"""Whether every way of running the transformer computes the same on this device: before anything is timed.

    python benchmarks/agree.py [--size mid] [--bucket FxHxW] [--precision bf16|fp32] [--limit-s S]

Activation checkpointing, attention kernels, compiled or not: the output of one clip and the LoRA's gradients, each as
its distance (relative L2) from float32 with nothing recomputed and torch's own kernel. The plain way in the same
precision is the yardstick: a way that is more than twice as far is wrong, and so is one that fails with a kernel that
works otherwise; then the code is 1. A kernel that cannot do this GPU, type or shape is a row that says so. Random
weights and inputs. Prints a table, then one line of JSON.
"""

import argparse
import sys
import time
from typing import Any

import torch
from measuring import (
    DTYPES,
    SIZES,
    TARGETS,
    cast,
    deadline_of,
    distance,
    free,
    machine,
    make_batches,
    model_of,
    say_json,
    say_machine,
    table,
)
from quantized_loss import transformer_of

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape, num_tokens
from cogds.model.lora.adapter import inject
from cogds.model.transformer.attention import activate_kernel, installed_kernels

SLACK = 1e-5  # of a distance, where the yardstick itself is nothing

Way = tuple[str, str, bool]  # checkpointing, kernel, compiled


def with_lora(transformer: Any, rank: int) -> list[torch.nn.Parameter]:
    """Add a LoRA that does something: its B is random and not zero."""
    parameters = inject(transformer, rank, float(rank), 0.0, TARGETS, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    transformer.train()
    return parameters


def outcome(
    transformer: Any, parameters: list[torch.nn.Parameter], inputs: dict[str, Any], target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradients, flat, in float32 on the host."""
    for parameter in parameters:
        parameter.grad = None
    output = transformer(**inputs)[0]
    v_loss(output, target).mean().backward()
    gradients = [parameter.grad.float().flatten().cpu() for parameter in parameters if parameter.grad is not None]
    return output.detach().float().flatten().cpu(), torch.cat(gradients)


def ways(kernels: list[str], compiled: bool) -> list[Way]:
    """The plain one first; compiled ones last, which take longest, with the first kernel that is not torch's."""
    found: list[Way] = [(checkpointing, kernel, False) for kernel in kernels for checkpointing in CHECKPOINTING_MODES]
    fused = [kernel for kernel in kernels if kernel not in ("torch", "math")]
    return found + [(checkpointing, (fused or ["torch"])[0], True) for checkpointing in CHECKPOINTING_MODES if compiled]


def main(argv: list[str] | None = None) -> None:
    """Compare all ways, print the table, print the line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid" if device.type == "cuda" else "tiny")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--precision", default="bf16" if device.type == "cuda" else "fp32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="compiled blocks too")
    parser.add_argument("--limit-s", type=float, help="begin nothing new when the process is so old")
    args = parser.parse_args(argv)
    deadline = deadline_of(args.limit_s)
    size, dtype = SIZES[args.size], DTYPES[args.precision]
    folder, shape = model_of(size), ClipShape.parse(args.bucket or size.bucket)
    facts = machine(device)
    say_machine(facts)
    ((inputs, target),) = make_batches(size, folder, shape, [500], device)

    exact = transformer_of(folder, True, "fp32", "none", False, device)
    reference = outcome(exact, with_lora(exact, size.lora_rank), cast(inputs, torch.float32), target)
    del exact
    free(device)
    transformer = transformer_of(folder, True, args.precision, "none", False, device)
    parameters = with_lora(transformer, size.lora_rank)
    inputs = cast(inputs, dtype)
    rows: list[dict[str, Any]] = []
    works: set[str] = set()  # kernels
    for checkpointing, kernel, compiled in ways(list(installed_kernels(device)), args.compile):
        row: dict[str, Any] = {"checkpointing": checkpointing, "kernel": kernel, "compiled": compiled}
        rows.append(row)
        if deadline is not None and time.monotonic() > deadline:
            row["error"] = "no time left"
            continue
        try:
            activate_kernel(kernel, device)
            transformer.set_kernel(kernel)
            transformer.set_checkpointing(checkpointing)
            if compiled and not rows[-2]["compiled"]:
                transformer.compile_blocks()
            found = outcome(transformer, parameters, inputs, target)
        except Exception as error:  # a kernel that cannot do this GPU, type or shape
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            row["wrong"] = kernel in works
            continue
        works.add(kernel)
        row["output"], row["gradient"] = map(distance, found, reference)
        plain = rows[0] if "output" in rows[0] else row
        row["wrong"] = any(row[name] > 2 * plain[name] + SLACK for name in ("output", "gradient"))
        print(f"  {checkpointing}, {kernel}, {'compiled' if compiled else 'eager'}: {row}", flush=True)

    if "output" not in rows[0]:
        sys.exit(f"there is nothing to compare with, the plain way did not run: {rows[0]['error']}")
    print(f"{size.name}, {shape}, {num_tokens(shape, folder.geometry)} tokens, {args.precision}")
    head = ("checkpointing", "kernel", "compiled", "output", "gradient", "")
    cells = []
    for row in rows:
        numbers = (f"{row[name]:.2e}" if name in row else None for name in ("output", "gradient"))
        verdict = "WRONG" if row.get("wrong") else "" if "error" in row else "as near as the plain way"
        told = " ".join(filter(None, (verdict, row.get("error", ""))))
        cells.append([row["checkpointing"], row["kernel"], row["compiled"], *numbers, told[:60]])
    print(table(head, cells))
    num_wrong = sum(row.get("wrong", False) for row in rows)
    say_json(
        "agree", facts, size=size.name, bucket=str(shape), precision=args.precision, num_wrong=num_wrong, rows=rows
    )
    if num_wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
