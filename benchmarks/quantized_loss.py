"""Measure the effect of quantization and fp8 matmuls on the loss, against the base in bf16, on the same batches.

    python benchmarks/quantized_loss.py [--size mid | --model FOLDER] [--bucket 17x192x256] [--steps 0]
        [--quantizations int8,fp8,nf4] [--fp8-matmul off,on]

Reports the loss at four noise levels with an untrained LoRA, the distance of the output and the LoRA's gradients from
those of the full base (relative L2), the size of the base's weights, and the seconds of a forward and backward pass.
The full base in float32 is included as a reference, since its distance is the error of bf16 itself. With --steps, each
LoRA is trained on these batches, and its final loss is reported.

Without --model, the weights are random. The distances are then more meaningful than the loss: pass a real model for
real results. Latents and captions are random in both cases. Prints a table, then one line of JSON.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import measuring  # noqa: F401 (before torch)
import torch
from measuring import (
    DTYPES,
    SIZES,
    TARGETS,
    cast,
    distance,
    free,
    machine,
    make_batches,
    model_of,
    print_json,
    print_machine,
    table,
)

from cogds.config.schema import CHECKPOINTING_MODES
from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape, num_tokens
from cogds.errors import UserError
from cogds.model.load import ModelFolder, build_transformer, find_model, load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.transformer.quantize import QUANTIZATIONS, PackedLinear, check_quantization, pack_block

TIMESTEPS = (125, 375, 625, 875)


def transformer_of(
    folder: ModelFolder, is_random: bool, precision: str, quantization: str, fp8_matmul: bool, device: Any
) -> Any:
    """Load or build the quantized transformer. Random weights, drawn in bf16, are the same for every quantization."""
    if not is_random:
        return load_transformer(folder, DTYPES[precision], device, quantization, fp8_matmul)
    torch.manual_seed(0)
    transformer = build_transformer(folder, torch.bfloat16, device)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    for block in transformer.transformer_blocks:
        pack_block(block, quantization, fp8_matmul, fill=True)
    return transformer


def weight_bytes(transformer: Any) -> int:
    """Bytes of all parameters and quantized weights."""
    tensors = list(transformer.parameters())
    for layer in transformer.modules():
        if isinstance(layer, PackedLinear) and layer.packed is not None:
            tensors += layer.packed.parts
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def losses(transformer: Any, batches: list[tuple[dict[str, Any], torch.Tensor]]) -> list[float]:
    """Return the loss of every batch, and accumulate the LoRA's gradients."""
    values = []
    for inputs, target in batches:
        loss = v_loss(transformer(**inputs)[0], target).mean()
        loss.backward()
        values.append(loss.detach())
    return [loss.item() for loss in values]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def measure(
    folder: ModelFolder,
    is_random: bool,
    kind: tuple[str, str, bool],
    batches: list[tuple[dict[str, Any], torch.Tensor]],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Measure one quantization. kind: precision, quantization, fp8_matmul."""
    precision, quantization, fp8_matmul = kind
    check_quantization(quantization, fp8_matmul, precision, 2, device)
    transformer = transformer_of(folder, is_random, precision, quantization, fp8_matmul, device)
    row: dict[str, Any] = {"precision": precision, "quantization": quantization, "fp8_matmul": fp8_matmul}
    row["weights_mb"] = round(weight_bytes(transformer) / 1e6, 3)
    parameters = inject(transformer, args.rank, float(args.rank), 0.0, TARGETS, 0)
    transformer.train()
    transformer.set_checkpointing(args.checkpointing)
    batches = [(cast(inputs, DTYPES[precision]), target) for inputs, target in batches]
    with torch.no_grad():
        row["output"] = torch.cat([transformer(**inputs)[0].float().flatten().cpu() for inputs, _ in batches])
    start = time.perf_counter()
    row["losses"] = losses(transformer, batches)
    row["forward_backward_s"] = round((time.perf_counter() - start) / len(batches), 3)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    row["gradient"] = torch.cat([gradient.float().flatten().cpu() for gradient in gradients])
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    for _ in range(args.steps):
        optimizer.zero_grad()
        losses(transformer, batches)
        optimizer.step()
    row["trained_loss"] = mean(losses(transformer, batches)) if args.steps else None
    free(device)
    return row


HEAD = ("type", "quantization", "fp8 matmul", "weights MB", "loss", "change %", "worst %", "output", "gradient",
        "fwd+bwd s", "trained")  # fmt: skip


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    start = [row["precision"], row["quantization"], row["fp8_matmul"]]
    if "error" in row:
        return [*start, None, "not run", *[None] * 6]
    trained = row["trained_loss"]
    return [
        *start, f"{row['weights_mb']:.3f}", f"{row['loss']:.6f}", f"{100 * row['loss_change']:+.4f}",
        f"{100 * row['largest_loss_change']:.4f}", f"{row['output_distance']:.5f}", f"{row['gradient_distance']:.5f}",
        row["forward_backward_s"], None if trained is None else f"{trained:.6f}",
    ]  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> None:
    """Add each row's distances from the first row."""
    first = rows[0]
    expected, output, gradient = first["losses"], first["output"], first["gradient"]
    for row in rows:
        if "error" in row:
            continue
        row["loss"] = mean(row["losses"])
        row["loss_change"] = row["loss"] / mean(expected) - 1
        row["largest_loss_change"] = max(abs(own / theirs - 1) for own, theirs in zip(row["losses"], expected))
        row["output_distance"] = distance(row.pop("output"), output)
        row["gradient_distance"] = distance(row.pop("gradient"), gradient)


def main(argv: list[str] | None = None) -> None:
    """Measure every quantization and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="size of a random model (default: tiny on a CPU, real on a GPU)")
    parser.add_argument("--model", help="model folder or hub id, in place of random weights")
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH")
    parser.add_argument("--quantizations", default="int8,fp8,nf4")
    parser.add_argument("--fp8-matmul", default="off,on")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps to train the LoRA")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of these steps")
    parser.add_argument("--rank", type=int, help="rank of the LoRA")
    parser.add_argument(
        "--checkpointing", default="full", choices=CHECKPOINTING_MODES, help="activation checkpointing mode"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[args.size or ("real" if device.type == "cuda" or args.model else "tiny")]
    folder = find_model(args.model) if args.model else model_of(size)
    if args.model:
        size = replace(size, name=args.model, transformer=folder.transformer_config, vae=folder.vae_config)
    shape, args.rank = ClipShape.parse(args.bucket or size.bucket), args.rank or size.lora_rank
    quantizations, switches = args.quantizations.split(","), args.fp8_matmul.split(",")
    if unknown := {*quantizations} - {*QUANTIZATIONS} | {*switches} - {"off", "on"}:
        parser.error(
            f"unknown {', '.join(unknown)}: --quantizations takes {', '.join(QUANTIZATIONS)}, and --fp8-matmul takes "
            "off, on"
        )
    info = machine(device)
    print_machine(info)
    batches = make_batches(size, folder, shape, TIMESTEPS, device)
    kinds = [("bf16", "none", False), ("fp32", "none", False)]
    for quantization in dict.fromkeys(["none", *quantizations]):
        supported = switches if quantization in ("none", "fp8") else {*switches} & {"off"}
        kinds += [
            ("bf16", quantization, switch == "on") for switch in supported if (quantization, switch) != ("none", "off")
        ]
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        row = dict(zip(("precision", "quantization", "fp8_matmul"), kind))
        try:
            rows.append(measure(folder, not args.model, kind, batches, args, device))
        except UserError as error:
            rows.append({**row, "error": str(error)})
        except torch.OutOfMemoryError:
            rows.append({**row, "error": "out of memory"})
    if "error" in rows[0]:
        raise SystemExit(f"error: the full base in bf16 failed: {rows[0]['error']}")
    compare(rows)
    print(f"{size.name}, {shape}, {num_tokens(shape, folder.geometry)} tokens, LoRA rank {args.rank}, timesteps "
          f"{TIMESTEPS}")  # fmt: skip
    print(table(HEAD, [cells(row) for row in rows]))
    for row in rows:
        if "error" in row:
            print(f"{row['quantization']}, fp8 matmul {row['fp8_matmul']}: {row['error']}")
    print_json(
        "quantized_loss", info, size=size.name, weights=args.model or "random", bucket=str(shape), rank=args.rank,
        steps=args.steps, lr=args.lr, checkpointing=args.checkpointing, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
