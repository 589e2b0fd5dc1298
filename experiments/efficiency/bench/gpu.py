"""The released models' real shapes with random weights on a GPU: seconds, tokens per second, utilisation and memory.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.efficiency.bench.counting import count
from experiments.efficiency.bench.ratios import in_turns, table, token_ratio
from experiments.efficiency.bench.shapes import QWEN_3B, QWEN_7B, Shape, build_policy, make_prompt, make_tokens
from experiments.efficiency.bench.ways import (
    SAVING,
    SHARED,
    VISION_ONCE,
    Group,
    accumulate,
    learn,
    one_row,
    reference,
    rollouts,
    spread_advantages,
)
from tartvg.config import LoraCompute, LoraConfig, Precision, TrainerConfig
from tartvg.policy.policy import Policy
from tartvg.policy.torch_setup import set_up_torch
from tartvg.training.out_of_memory import free_cached_memory, is_out_of_memory
from tartvg.training.throughput import peak_flops

RELEASED: dict[str, Shape] = {"3B": QWEN_3B, "7B": QWEN_7B}
Call = Callable[[], object]
Prepared = Callable[[], Call]
"""Makes what a phase needs, and returns the call to time: either may run out of memory."""


@dataclass(frozen=True)
class Load:
    """What is run."""

    prompt: int = 3072
    completion: int = 256
    group: int = 8
    steps: int = 64
    """Temporal grid steps of the video."""


def released_policy(shape: Shape, folder: Path, device: str) -> Policy:
    """A policy of that shape, set up as conf/policy/qwen2_5_vl_7b.yaml sets up the released ones."""
    lora = LoraConfig(compute=LoraCompute.native)
    return build_policy(shape, folder, precision=Precision.bf16, device=device, logit_chunk=512, lora=lora)


def phases_of(policy: Policy, load: Load) -> Iterator[tuple[str, Prepared]]:
    """Each phase of each way. The naive passes take one row at a time: G whole sequences do not fit."""
    item, clip = make_prompt(policy, load.prompt, load.steps)
    tokens = make_tokens(policy, item, load.group, load.completion)
    group = Group(item, clip, tokens, spread_advantages(load.group, policy.device))
    rows = [one_row(group, row) for row in range(load.group)]

    def naive_reference() -> None:
        for row in rows:
            reference(policy, row, VISION_ONCE)

    def naive_update() -> Call:
        references = [reference(policy, row, VISION_ONCE) for row in rows]

        def update() -> None:
            policy.zero_grad()
            for row, its_reference in zip(rows, references, strict=True):
                accumulate(policy, row, VISION_ONCE, its_reference)

        return update

    yield "vision", lambda: partial(policy._encode, clip.patches, clip.grid_thw)
    for way in (VISION_ONCE, SHARED):
        call = rollouts(policy, item, clip, load.group, load.completion)[way]
        yield f"{way}: rollout", lambda call=call: call
    yield f"{VISION_ONCE}: reference", lambda: naive_reference
    yield f"{VISION_ONCE}: update", naive_update
    for way in (SHARED, SAVING):
        yield f"{way}: reference", lambda way=way: partial(reference, policy, group, way)
        yield f"{way}: update", lambda way=way: partial(learn, policy, group, way, reference(policy, group, way))


def measure_gpu(
    folder: Path, device: str = "cuda", repeats: int = 5, shapes: Mapping[str, Shape] = RELEASED,
    load: Load | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run every phase of every shape on `device` and print a table for each.

    Tokens per second count prompt and completions once, as the naive pass processes them, so that ways compare.
    Utilisation divides the operations that a way really does by its time and by the device's bf16 peak.
    """
    load = load or Load()
    where = torch.device(device)
    set_up_torch(
        TrainerConfig(accelerator="cpu" if where.type == "cpu" else "gpu", num_threads=torch.get_num_threads())
    )
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    limit = token_ratio(load.prompt, load.completion, load.group)
    answer: dict[str, Any] = {"device": name, "load": vars(load), "limit": limit, "shapes": {}}
    header = ["phase", "seconds", "tokens / s", "TFLOP / s", "of the peak", "peak GiB"]
    for label, shape in shapes.items():
        policy = released_policy(shape, folder / f"base_{label}", device)
        found = {phase: measure(policy, prepare, repeats, load) for phase, prepare in phases_of(policy, load)}
        rows = [[phase, *cells(values, peak_flops(name))] for phase, values in found.items()]
        print(f"### {name}: {label} shape, bf16, {load}, token ratio {limit:.2f}\n\n{table(header, rows)}", flush=True)
        answer["shapes"][label] = found
        del policy
        gc.collect()
        free_cached_memory()
    return answer


def measure(policy: Policy, prepare: Prepared, repeats: int, load: Load) -> dict[str, Any] | None:
    """Seconds, operations and peak memory of one phase; None where it does not fit."""
    device = policy.device
    is_cuda = device.type == "cuda"
    found: dict[str, Any] | None = None
    try:
        call = prepare()
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        wait = partial(torch.cuda.synchronize, device) if is_cuda else lambda: None
        timing = in_turns({"it": call}, repeats, wait)["it"]
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if is_cuda else 0.0
        used = count(policy, call).flops / timing.median_wall / 1e12
        rate = load.group * (load.prompt + load.completion) / timing.median_wall
        found = {"seconds": timing.wall, "tflops": used, "peak_gib": peak, "tokens_per_second": rate}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    policy.zero_grad()
    free_cached_memory()
    return found


def cells(found: dict[str, Any] | None, peak: float | None) -> list[str]:
    """A phase as cells of the table; `peak` in FLOP/s."""
    if found is None:
        return ["out of memory", "", "", "", ""]
    seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
    share = f"{found['tflops'] * 1e12 / peak:.0%}" if peak else "?"
    rate, used, memory = found["tokens_per_second"], found["tflops"], found["peak_gib"]
    return [f"{seconds:.3f}", f"{rate:.0f}", f"{used:.0f}", share, f"{memory:.1f}"]
