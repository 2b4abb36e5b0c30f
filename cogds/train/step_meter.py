"""Measurements of each optimizer step: time by phase, throughput, memory, LoRA norms, coverage of the data.

They never wait for the GPU: values on the device stay tensors, and the times of a GPU's phases are read one step late.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from cogds.core.coverage import share_seen
from cogds.core.flops import PEAK_TFLOPS, training_flops
from cogds.core.geometry import num_tokens
from cogds.core.plan import MicroBatch
from cogds.metrics.step_metrics import RankValues, SquaredNorms, peak_host_bytes, peak_memory_bytes
from cogds.metrics.stopwatch import PhaseTimer, Stopwatch
from cogds.train.norms import LoraNorms
from cogds.train.run import Run


class StepMeter:
    """Measures the optimizer steps of one rank, one after another.

    begin(phase): the start of "inputs", "forward", "backward" or "optimizer".
    """

    def __init__(self, run: Run, engine: Any) -> None:
        self._run, device = run, run.world.device
        self._clock, self._phases = Stopwatch(), PhaseTimer(device)
        self.begin = self._phases.begin
        # Of a full fine-tune, the weights before a step would take as much memory as the weights.
        self._norms = LoraNorms(engine, run.world, run.model.num_layers) if run.cfg.trains_lora else None
        # At ZeRO stage 3, and if ranks share a clip, all ranks end a forward pass together with the slowest one, so its
        # time does not show which rank that is.
        self._is_forward_local = run.world.sequence_size == 1 and engine.zero_optimization_stage() < 3
        self._wait_before_s, self._peak_bytes = math.nan, 0.0
        self._tokens = [num_tokens(shape, run.model.geometry) for shape in run.buckets]
        sizes = run.job.memory.transformer, run.job.memory.trained
        self._tflops = [training_flops(tokens, *sizes).model_flops / 1e12 for tokens in self._tokens]
        has_peak = device.type == "cuda" and run.cfg.train.precision == "bf16"
        self._peak_tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if has_peak else None

    def restart(self) -> None:
        """Start the time of the next step now, so that it does not include callbacks."""
        self._clock.lap()

    def before_update(self, step: int) -> None:
        """Prepare for the weight update of optimizer step `step` (0 is the first)."""
        if self._norms and self._measures_norms(step):
            self._norms.snapshot()

    def finish_step(
        self, step: int, micro_batches: Sequence[MicroBatch], wait_s: float
    ) -> tuple[dict[str, float], RankValues, SquaredNorms | None]:
        """Return the scalars of step `step`, the values that differ by rank, and the norms if they are due.

        wait_s: time spent waiting for the loader.
        """
        norms = self._norms.measure() if self._norms and self._measures_norms(step) else None
        phases, step_s, world = self._phases.lap(), self._clock.lap(), self._run.world
        # On a GPU the phases are those of the step before.
        on_cpu = world.device.type == "cpu"
        waited_s = wait_s if on_cpu else self._wait_before_s
        busy_s = waited_s + phases.get("forward", math.nan) if self._is_forward_local else math.nan
        self._wait_before_s = wait_s
        samples = [
            (micro_batch.batch_size_of(rank), micro_batch.bucket_of(rank))
            for micro_batch in micro_batches
            for rank in range(world.data_size)
        ]
        tflops = sum(num * self._tflops[bucket] for num, bucket in samples) / step_s / world.size
        scalars = {
            "data/coverage": share_seen(self._run.plan.coverage(step + 1), self._run.data.mixture),
            "perf/step_s": step_s,
            "perf/data_wait_s": wait_s,
            "perf/data_wait": wait_s / step_s,
            **{f"perf/{name}_s": seconds for name, seconds in phases.items()},
            "perf/samples_per_s": sum(micro_batch.num_slots for micro_batch in micro_batches) / step_s,
            "perf/tokens_per_s": sum(num * self._tokens[bucket] for num, bucket in samples) / step_s,
            "perf/tflops": tflops,
        }
        if self._peak_tflops:
            scalars["perf/mfu"] = tflops / self._peak_tflops
        # The peak of all steps so far. The allocator's own peak is reset by `run_callbacks`.
        self._peak_bytes = max(self._peak_bytes, float(peak_memory_bytes(world.device)))
        rank_values = RankValues(busy_s, self._peak_bytes, float(peak_host_bytes()))
        return scalars, rank_values, norms

    def _measures_norms(self, step: int) -> bool:
        every = self._run.cfg.metrics.norms_every
        return every is not None and (step + 1) % every == 0
