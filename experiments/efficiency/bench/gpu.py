"""The 3B's real shape with random weights on a GPU: seconds, tokens per second, utilisation and memory by way.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.efficiency.bench.counting import count
from experiments.efficiency.bench.ratios import in_turns, table, token_ratio
from experiments.efficiency.bench.shapes import QWEN_3B, Shape, build_policy, make_prompt, make_tokens
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
from tartvg.config import Precision
from tartvg.policy.policy import Policy

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bf16 from the makers' data sheets (SXM where there are two)."""


@dataclass(frozen=True)
class Load:
    """What is run."""

    prompt: int = 3072
    completion: int = 256
    group: int = 8
    steps: int = 64
    """Temporal grid steps of the video."""


def peak_tflops(name: str) -> float | None:
    """The device's dense bf16 peak; None for one that is not in the table."""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def step_calls(policy: Policy, load: Load) -> dict[str, Callable[[], object]]:
    """Each phase of each way as a call. The naive passes take one row at a time: G whole sequences do not fit."""
    item, clip = make_prompt(policy, load.prompt, load.steps)
    tokens = make_tokens(policy, item, load.group, load.completion)
    group = Group(item, clip, tokens, spread_advantages(load.group, policy.device))
    calls: dict[str, Callable[[], object]] = {"vision": partial(policy._encode, clip.patches, clip.grid_thw)}
    drawn = rollouts(policy, item, clip, load.group, load.completion)
    calls |= {f"{way}: rollout": drawn[way] for way in (VISION_ONCE, SHARED)}
    rows = [one_row(group, row) for row in range(load.group)]
    references = [reference(policy, row, VISION_ONCE) for row in rows]

    def naive_reference() -> None:
        for row in rows:
            reference(policy, row, VISION_ONCE)

    def naive_update() -> None:
        policy.zero_grad()
        for row, its_reference in zip(rows, references, strict=True):
            accumulate(policy, row, VISION_ONCE, its_reference)

    calls |= {f"{VISION_ONCE}: reference": naive_reference, f"{VISION_ONCE}: update": naive_update}
    for way in (SHARED, SAVING):
        calls[f"{way}: reference"] = partial(reference, policy, group, way)
        calls[f"{way}: update"] = partial(learn, policy, group, way, reference(policy, group, way))
    return calls


def measure_gpu(folder: Path, load: Load | None = None, shape: Shape = QWEN_3B, repeats: int = 5) -> dict[str, Any]:
    """Run every phase on the current CUDA device and print the table.

    Tokens per second count prompt and completions once, as the naive pass processes them, so that ways compare.
    Utilisation divides the operations that a way really does by its time and by the device's bf16 peak.
    """
    load = load or Load()
    policy = build_policy(shape, folder / "base_gpu", precision=Precision.bf16, device="cuda")
    name = torch.cuda.get_device_name()
    peak, rows = peak_tflops(name), []
    answer: dict[str, Any] = {}
    useful = load.group * (load.prompt + load.completion)
    for phase, call in step_calls(policy, load).items():
        torch.cuda.reset_peak_memory_stats()
        try:
            timing = in_turns({phase: call}, repeats, torch.cuda.synchronize)[phase]
        except torch.cuda.OutOfMemoryError:
            policy.zero_grad()
            torch.cuda.empty_cache()
            rows.append([phase, "out of memory", "", "", "", ""])
            answer[phase] = None
            continue
        memory = torch.cuda.max_memory_allocated() / 2**30
        flops = count(policy, call).flops
        used = flops / timing.median_wall / 1e12
        share = f"{used / peak:.0%}" if peak else "?"
        rate = useful / timing.median_wall
        rows.append([phase, f"{timing.median_wall:.3f}", f"{rate:.0f}", f"{used:.0f}", share, f"{memory:.1f}"])
        answer[phase] = {"seconds": timing.wall, "tflops": used, "peak_gib": memory, "tokens_per_second": rate}
    header = ["phase", "seconds", "tokens / s", "TFLOP / s", "of the peak", "peak GiB"]
    limit = token_ratio(load.prompt, load.completion, load.group)
    print(f"### {name}: 3B shape, bf16, {load}, token ratio {limit:.2f}\n\n{table(header, rows)}")
    return {"device": name, "load": vars(load), "limit": limit, "phases": answer}
