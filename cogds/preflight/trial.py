"""One step of the largest bucket as the run takes it, but for its weights and its clip, which are random numbers."""

import copy
import math
import time
from typing import Any

import torch

from cogds.core.diffusion import v_loss
from cogds.distributed.collectives import all_gather
from cogds.engine.sequence_groups import share_clips
from cogds.engine.start import build_for_stage, start_engine
from cogds.formatting import gigabytes
from cogds.metrics.step_metrics import peak_memory_bytes
from cogds.model.load import DTYPES
from cogds.model.lora.adapter import inject
from cogds.preflight.finding import FAIL, OK, WARN, Facts, Finding, who
from cogds.preflight.job import CheckedJob
from cogds.train.step import Draws, load_step_builder, random_batch
from cogds.train.tuning import choose_execution, prepare_blocks

NUM_STEPS = 2
# A second step, which is the one to believe, is taken where the first was quicker than this.
QUICK_S = 20.0


def one_step_config(ds_config: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """The run's DeepSpeed config with one micro-step a step."""
    changed = copy.deepcopy(ds_config)
    changed["gradient_accumulation_steps"] = 1
    changed["train_batch_size"] = changed["train_micro_batch_size_per_gpu"] * num_ranks
    return changed


def look_trial(job: CheckedJob) -> Facts:
    """`trial`: the bucket, seconds of each step, the loss, peak and total bytes of memory. Collective."""
    cfg, world, model = job.cfg, job.world, job.model
    dtype, bucket, device = DTYPES[cfg.train.precision], job.largest, world.device
    result: dict[str, Any] = {"bucket": str(job.buckets[bucket]), "batch_size": job.batch_sizes[bucket], "error": ""}
    result |= {"estimate": job.estimates[bucket].total_bytes, "device": device.type, "advice": ""}
    start = time.perf_counter()
    try:
        execution = choose_execution(job, job.batch_sizes)
        result["advice"] = execution.buckets[bucket].shortfall
        transformer: Any = build_for_stage(
            model, dtype, job.ds_config, device, cfg.model.quantization, cfg.model.fp8_matmul
        )
        parameters = inject(
            transformer, cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.target_modules, cfg.seed
        )
        transformer.train()
        prepare_blocks(transformer, execution)
        share_clips(transformer, world, cfg.train.timeout_s)
        transformer.set_checkpointing(execution.buckets[bucket].checkpointing)
        engine = start_engine(transformer, parameters, one_step_config(job.ds_config, world.size))
        batch = random_batch(
            job.buckets[bucket], job.batch_sizes[bucket], model.geometry, job.memory.transformer.text_dim,
            cfg.train.precision,
        )  # fmt: skip
        builder = load_step_builder(model, cfg.conditioning, batch["text_states"][0], dtype, device)
        result["build_s"] = time.perf_counter() - start
        kept, size = torch.zeros(job.batch_sizes[bucket], dtype=torch.bool), job.batch_sizes[bucket]
        steps_s: list[float] = []
        for step in range(NUM_STEPS):
            start = time.perf_counter()
            slots = [world.data_rank * size + number for number in range(size)]
            draws = Draws(torch.full((size,), 500), kept, kept, cfg.seed, step, slots)
            inputs, target = builder.build(batch, job.buckets[bucket], draws)
            loss = v_loss(engine(**inputs)[0], target).mean()
            engine.backward(loss)
            engine.step()
            result["loss"] = loss.item()  # waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            steps_s.append(time.perf_counter() - start)
            result["peak"] = peak_memory_bytes(device)
            if max(all_gather(world, steps_s[0])) > QUICK_S:
                break
        result["steps_s"] = steps_s
    except torch.OutOfMemoryError as error:
        result["error"] = str(error).splitlines()[0]
        result["peak"] = peak_memory_bytes(device)
    if device.type == "cuda":
        result["total"] = torch.cuda.mem_get_info(device)[1]
    if "loss" in result and not math.isfinite(result["loss"]):
        result["loss"] = None  # JSON has no such number
    return {"trial": result}


def judge_trial(facts: list[Facts]) -> list[Finding]:
    """The step fits into memory and ends."""
    first = facts[0]["trial"]
    what = f"{first['bucket']}, batch {first['batch_size']}"
    full = [one for one in facts if one["trial"]["error"]]
    if full:
        worst = full[0]["trial"]
        memory = gigabytes(worst["peak"]) + (f" of {gigabytes(worst['total'])}" if "total" in worst else "")
        return [
            Finding("step", FAIL, f"{what} does not fit into memory on {who(full)}: {memory} taken, "
                    f"the estimate is {gigabytes(worst['estimate'])}; {worst['error']}. "
                    + (worst["advice"] or "Try ds_configs/zero3.json, model.quantization=nf4, "
                       "train.activation_checkpointing=full+offload, a "
                       "smaller batch or a smaller bucket"))
        ]  # fmt: skip
    found = []
    slowest = max(facts, key=lambda one: one["trial"]["steps_s"][-1])["trial"]
    largest = max(facts, key=lambda one: one["trial"]["peak"])["trial"]
    seconds = ", ".join(f"{second:.2f} s" for second in slowest["steps_s"])
    share = f" of {gigabytes(largest['total'])}" if "total" in largest else ""
    kind = "of GPU memory" if first["device"] == "cuda" else "of memory, the whole process's"
    text = (
        f"{what}: {seconds} for forward, backward and optimizer step (random weights, ready in "
        f"{slowest['build_s']:.1f} s); peak {gigabytes(largest['peak'])}{share} {kind}, the estimate is "
        f"{gigabytes(largest['estimate'])}"
    )
    found.append(Finding("step", OK, text))
    if odd := [one for one in facts if one["trial"]["loss"] is None]:
        found.append(Finding("step", WARN, f"the loss is not a finite number on {who(odd)}, with random weights"))
    return found
