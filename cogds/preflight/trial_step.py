"""A training step of the largest bucket, with random weights and a random clip."""

import copy
import math
import time
from typing import Any

import torch

from cogds.core.diffusion import v_loss
from cogds.core.memory import MemoryEstimate
from cogds.distributed.collectives import all_gather
from cogds.engine.sequence_groups import share_clips
from cogds.engine.start import build_for_stage, start_engine
from cogds.formatting import gigabytes
from cogds.metrics.step_metrics import peak_memory_bytes
from cogds.model.load import DTYPES
from cogds.preflight.findings import FAIL, OK, WARN, Finding, RankResult, describe_ranks
from cogds.preflight.preflight_job import PreflightJob
from cogds.train.memory_check import is_out_of_memory
from cogds.train.step import Draws, load_step_builder, random_batch
from cogds.train.trained_part import add_trained_part, loaded_as_trained
from cogds.train.tuning import choose_execution, prepare_blocks

NUM_STEPS = 2
# The first step includes warm-up. The second, more reliable one is skipped if the first took longer than this.
MAX_FIRST_STEP_S = 20.0
DEFAULT_ADVICE = (
    "Use ds_configs/zero3.json, model.quantization=nf4, train.activation_checkpointing=full+offload, a smaller batch "
    "or a smaller bucket."
)


def one_step_config(ds_config: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """Return the run's DeepSpeed config with one micro-step per step."""
    changed = copy.deepcopy(ds_config)
    changed["gradient_accumulation_steps"] = 1
    changed["train_batch_size"] = changed["train_micro_batch_size_per_gpu"] * num_ranks
    return changed


def reserve_on_the_fly(estimate: MemoryEstimate, device: torch.device) -> torch.Tensor:
    """Return a tensor as large as what encoding on the fly needs beside a step; empty on a CPU."""
    num_bytes = estimate.on_the_fly_bytes if device.type != "cpu" else 0
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def run_trial_step(job: PreflightJob) -> RankResult:
    """Train the largest bucket for one or two steps. Collective.

    Returns:
        `trial`: the bucket, its batch size and activation checkpointing, the seconds of each step, the loss, the peak
        and the total memory [bytes]. `error` is not empty if the memory was not enough.
    """
    cfg, world, model = job.cfg, job.world, job.model
    dtype, bucket, device = DTYPES[cfg.train.precision], job.largest_bucket, world.device
    batch_size = job.batch_sizes[bucket]
    result: dict[str, Any] = {
        "bucket": str(job.buckets[bucket]),
        "batch_size": batch_size,
        "checkpointing": str(job.checkpointing[bucket]),
        "error": "",
        "estimate": job.estimates[bucket].total_bytes,
        "device": device.type,
        "advice": "",
    }
    start = time.perf_counter()
    try:
        execution = choose_execution(job, job.batch_sizes)
        result["advice"] = execution.buckets[bucket].shortfall
        transformer: Any = build_for_stage(
            model, dtype, job.ds_config, device, cfg.model.quantization, cfg.model.fp8_matmul, loaded_as_trained(job)
        )
        parameters = add_trained_part(transformer, job)
        transformer.train()
        prepare_blocks(transformer, execution)
        share_clips(transformer, world, cfg.train.timeout_s)
        transformer.set_checkpointing(execution.buckets[bucket].checkpointing)
        engine = start_engine(transformer, parameters, one_step_config(job.ds_config, world.size))
        batch = random_batch(
            job.buckets[bucket], batch_size, model.geometry, job.memory.transformer.text_dim, cfg.train.precision
        )
        reserved = reserve_on_the_fly(job.estimates[bucket], device)
        no_caption, settings = batch["text_states"][0], job.condition_settings
        builder = load_step_builder(model, cfg.conditioning, no_caption, dtype, device, settings)
        batch = builder.with_random_conditions(batch, job.buckets[bucket])
        modes = (builder.largest_mode(job.buckets[bucket]),) * batch_size
        result["build_s"] = time.perf_counter() - start
        not_dropped = torch.zeros(batch_size, dtype=torch.bool)
        steps_s: list[float] = []
        for step in range(NUM_STEPS):
            start = time.perf_counter()
            slots = [world.data_rank * batch_size + number for number in range(batch_size)]
            draws = Draws(torch.full((batch_size,), 500), not_dropped, not_dropped, cfg.seed, step, slots, modes)
            inputs, target = builder.build(batch, job.buckets[bucket], draws)
            loss = v_loss(engine(**inputs)[0], target).mean()
            engine.backward(loss)
            engine.step()
            result["loss"] = loss.item()  # waits for the device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            steps_s.append(time.perf_counter() - start)
            result["peak"] = peak_memory_bytes(device)
            if max(all_gather(world, steps_s[0])) > MAX_FIRST_STEP_S:
                break
        result["steps_s"] = steps_s
        del reserved
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        result["error"] = str(error).splitlines()[0]
        result["peak"] = peak_memory_bytes(device)
    if device.type == "cuda":
        result["total"] = torch.cuda.mem_get_info(device)[1]
    if "loss" in result and not math.isfinite(result["loss"]):
        result["loss"] = None  # JSON has neither NaN nor infinity
    return {"trial": result}


def assess_trial_step(results: list[RankResult]) -> list[Finding]:
    """The step must fit into memory on every rank."""
    first = results[0]["trial"]
    bucket = f"{first['bucket']}, batch {first['batch_size']}, activation checkpointing {first['checkpointing']}"
    out_of_memory = [result for result in results if result["trial"]["error"]]
    if out_of_memory:
        trial = out_of_memory[0]["trial"]
        memory = gigabytes(trial["peak"]) + (f" of {gigabytes(trial['total'])}" if "total" in trial else "")
        text = (
            f"{bucket} does not fit into memory on {describe_ranks(out_of_memory)}: {memory} used, estimate "
            f"{gigabytes(trial['estimate'])} ({trial['error']})"
        )
        text += f"; {trial['advice']}" if trial["advice"] else f". {DEFAULT_ADVICE}"
        return [Finding("step", FAIL, text)]
    slowest = max(results, key=lambda result: result["trial"]["steps_s"][-1])["trial"]
    largest = max(results, key=lambda result: result["trial"]["peak"])["trial"]
    seconds = ", ".join(f"{step_s:.2f} s" for step_s in slowest["steps_s"])
    total = f" of {gigabytes(largest['total'])}" if "total" in largest else ""
    kind = "GPU memory" if first["device"] == "cuda" else "memory of the whole process"
    text = (
        f"{bucket}: {seconds} for forward, backward and optimizer step with random weights (built in "
        f"{slowest['build_s']:.1f} s); peak {kind} {gigabytes(largest['peak'])}{total}, estimate "
        f"{gigabytes(largest['estimate'])}"
    )
    findings = [Finding("step", OK, text)]
    if not_finite := [result for result in results if result["trial"]["loss"] is None]:
        text = f"with random weights, the loss is not finite on {describe_ranks(not_finite)}"
        findings.append(Finding("step", WARN, text))
    return findings
