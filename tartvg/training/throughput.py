"""Throughput and peak memory of a training step: what a GPU user looks at first.

    perf/seconds_per_step            wall time of the whole step; its phases are `time/<phase>_s`
    perf/tokens_per_second_sampled   completion tokens of all ranks per second of sampling
    perf/tokens_per_second_trained   prompt and completion tokens of all ranks per second of updates
    perf/mfu                         model FLOPs utilisation of the update, where the GPU's peak is known
    memory/peak_gib                  peak memory of the rank that needs most, in 2^30 bytes
    memory/peak_gib_rank<r>          the same of each rank, where there are several

Memory is the allocator's peak within the step on a GPU, and the largest resident set so far on a CPU.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

from tartvg.training import distributed

GIB = 2**30
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of one GPU, by a part of its name (NVIDIA's data sheets); the first match counts."""
FLOPS_PER_WEIGHT = 4
"""Per token and frozen weight: 2 in the forward pass, 2 for the gradient of the activations. A frozen weight needs no
gradient of its own, and recomputed activations do not count."""


class Throughput:
    """Counts one step's tokens on this rank."""

    def __init__(self, num_weights: int, device: torch.device) -> None:
        self.num_weights = num_weights
        """Of the language model."""
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Start a step."""
        self.start = time.perf_counter()
        self.num_sampled = self.num_trained = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def metrics(self, times: Mapping[str, float]) -> dict[str, float]:
        """Metrics of the step; `times` holds `time/<phase>_s` of the slowest rank. Collective."""
        sampled, trained = distributed.all_reduce_sum(self.num_sampled, self.num_trained)
        found = {"perf/seconds_per_step": distributed.all_reduce_max(time.perf_counter() - self.start)[0]}
        sample_s, update_s = times["time/sample_s"], times["time/update_s"]
        if sampled and sample_s:
            found["perf/tokens_per_second_sampled"] = sampled / sample_s
        if trained and update_s:
            found["perf/tokens_per_second_trained"] = trained / update_s
            peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
            if peak is not None:
                found["perf/mfu"] = utilisation(trained, self.num_weights, update_s, peak * distributed.world_size())
        return found | self._memory()

    def _memory(self) -> dict[str, float]:
        count = distributed.world_size()
        each = [0.0] * count
        each[distributed.rank() if count > 1 else 0] = self.peak_bytes() / GIB
        each = distributed.all_reduce_sum(*each)
        ranks = {f"memory/peak_gib_rank{rank}": value for rank, value in enumerate(each)} if count > 1 else {}
        return {"memory/peak_gib": max(each)} | ranks

    def peak_bytes(self) -> int:
        """Peak memory of this rank."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a GPU in bf16; None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def utilisation(num_tokens: float, num_weights: int, seconds: float, peak: float) -> float:
    """Share of the peak FLOP/s that the update's arithmetic reaches; attention's own products are not counted."""
    return FLOPS_PER_WEIGHT * num_weights * num_tokens / (seconds * peak)
