"""Check that all checkpointing modes, attention kernels and compilation give the same results on this device.

    python benchmarks/agree.py [--size mid] [--bucket FxHxW] [--precision bf16|fp32] [--limit-s S]

Compares the output of one clip and the LoRA's gradients with float32 without checkpointing and with torch's kernel, as
relative L2 distances, with random weights and inputs. The reference for a configuration is the baseline in the same
precision: it is wrong if its distance is more than twice as large, or if it fails although its kernel works in another
configuration. The exit code is then 1. A kernel that does not support this GPU, type or shape is a row with its error.
Prints a table, then one line of JSON.
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
    print_json,
    print_machine,
    table,
)
from quantized_loss import transformer_of

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape, num_tokens
from cogds.model.lora.adapter import inject
from cogds.model.transformer.attention import activate_kernel, installed_kernels

SLACK = 1e-5  # allowed distance if that of the baseline is 0

Setup = tuple[str, str, bool]  # checkpointing, kernel, compiled


def with_lora(transformer: Any, rank: int) -> list[torch.nn.Parameter]:
    """Add a LoRA with random B instead of zeros."""
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
    """Return output and gradients, flattened, in float32 on the host."""
    for parameter in parameters:
        parameter.grad = None
    output = transformer(**inputs)[0]
    v_loss(output, target).mean().backward()
    gradients = [parameter.grad.float().flatten().cpu() for parameter in parameters if parameter.grad is not None]
    return output.detach().float().flatten().cpu(), torch.cat(gradients)


def setups(kernels: list[str], compiled: bool) -> list[Setup]:
    """All configurations, starting with the baseline. Compiled ones, which take longest, come last, with one kernel."""
    eager: list[Setup] = [(checkpointing, kernel, False) for kernel in kernels for checkpointing in CHECKPOINTING_MODES]
    fused = [kernel for kernel in kernels if kernel not in ("torch", "math")]
    return eager + [(checkpointing, (fused or ["torch"])[0], True) for checkpointing in CHECKPOINTING_MODES if compiled]


def main(argv: list[str] | None = None) -> None:
    """Compare all configurations and print the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mid" if device.type == "cuda" else "tiny")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--precision", default="bf16" if device.type == "cuda" else "fp32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="compare compiled blocks as well")
    parser.add_argument("--limit-s", type=float, help="process age after which nothing new is started [s]")
    args = parser.parse_args(argv)
    deadline = deadline_of(args.limit_s)
    size, dtype = SIZES[args.size], DTYPES[args.precision]
    folder, shape = model_of(size), ClipShape.parse(args.bucket or size.bucket)
    info = machine(device)
    print_machine(info)
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
    for checkpointing, kernel, compiled in setups(list(installed_kernels(device)), args.compile):
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
        except Exception as error:  # the kernel does not support this GPU, type or shape
            row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            row["wrong"] = kernel in works
            continue
        works.add(kernel)
        row["output"], row["gradient"] = map(distance, found, reference)
        baseline = rows[0] if "output" in rows[0] else row
        row["wrong"] = any(row[name] > 2 * baseline[name] + SLACK for name in ("output", "gradient"))
        print(f"  {checkpointing}, {kernel}, {'compiled' if compiled else 'eager'}: {row}", flush=True)

    if "output" not in rows[0]:
        sys.exit(f"error: the baseline failed: {rows[0]['error']}")
    print(f"{size.name}, {shape}, {num_tokens(shape, folder.geometry)} tokens, {args.precision}")
    head = ("checkpointing", "kernel", "compiled", "output", "gradient", "")
    cells = []
    for row in rows:
        numbers = (f"{row[name]:.2e}" if name in row else None for name in ("output", "gradient"))
        verdict = "WRONG" if row.get("wrong") else "" if "error" in row else "agrees"
        text = " ".join(filter(None, (verdict, row.get("error", ""))))
        cells.append([row["checkpointing"], row["kernel"], row["compiled"], *numbers, text[:60]])
    print(table(head, cells))
    num_wrong = sum(row.get("wrong", False) for row in rows)
    print_json(
        "agree", info, size=size.name, bucket=str(shape), precision=args.precision, num_wrong=num_wrong, rows=rows
    )
    if num_wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
