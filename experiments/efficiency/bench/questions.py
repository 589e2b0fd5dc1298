"""The questions of the efficiency experiment, each a function that prints its table and returns its numbers.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.efficiency.bench.memory import measure
from experiments.efficiency.bench.phases import measure_phases, phase_table, write_video
from experiments.efficiency.bench.ratios import Timing, in_turns, own_share, table, token_ratio
from experiments.efficiency.bench.shapes import SMALL, Shape, build_policy, make_prompt, make_tokens
from experiments.efficiency.bench.ways import (
    NAIVE,
    SAVING,
    SHARED,
    VISION_ONCE,
    Group,
    gradient,
    learn,
    reference,
    rollouts,
    spread_advantages,
    update,
)
from tartvg.policy.policy import Policy

Answer = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how it is measured."""

    folder: Path
    repeats: int = 3
    device: str = "cpu"
    shape: Shape = SMALL

    def wait(self) -> None:
        """Return when the device has finished."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    @property
    def base(self) -> Path:
        """Where the random base lies."""
        return self.folder / f"base_{self.shape.hidden}"

    def policy(self) -> Policy:
        """A fresh policy; tokens that ours never says may count, as other engines do not know of them."""
        policy = build_policy(self.shape, self.base, device=self.device)
        policy.ban([])
        return policy

    def group(self, policy: Policy, prompt: int, completion: int, size: int) -> Group:
        """One group of exact lengths."""
        item, clip = make_prompt(policy, prompt)
        tokens = make_tokens(policy, item, size, completion)
        return Group(item, clip, tokens, spread_advantages(size, policy.device))


def _against(times: dict[str, Timing], ours: str, limits: dict[str, float]) -> tuple[str, Answer]:
    rows, answer = [], {}
    for name, timing in times.items():
        wall, cpu = timing.over(times[ours])
        share = f"{cpu / limits[name]:.0%} of {limits[name]:.2f}" if name in limits else ""
        seconds = f"{timing.median_wall:.2f} ({min(timing.wall):.2f} to {max(timing.wall):.2f})"
        rows.append([name, seconds, f"{timing.median_cpu:.2f}", f"{wall:.2f}", f"{cpu:.2f}", share])
        answer[name] = {"wall": timing.wall, "cpu": timing.cpu, "wall_ratio": wall, "cpu_ratio": cpu}
    header = ["", "seconds: median (range)", "CPU seconds", "times ours", "in CPU time", "of the token ratio"]
    return table(header, rows), answer


def ask_update(bench: Bench, prompt: int = 1024, completion: int = 64, size: int = 8, *, with_trl: bool) -> Answer:
    """Reference and policy pass of one group, forward and backward; agreement first."""
    policy = bench.policy()
    group = bench.group(policy, prompt, completion, size)
    calls = {way: partial(update, policy, group, way) for way in (VISION_ONCE, SHARED, SAVING)}
    _check_ways(policy, group)
    if with_trl:
        from experiments.efficiency.bench.trl_engine import agreement, make_trainer, trl_inputs, trl_update

        trainer = make_trainer(policy, size, completion, bench.folder / "trl")
        found = agreement(policy, trainer, group)
        print(f"agreement with TRL before timing: {found}")
        found.check()
        calls["TRL 1.16"] = partial(trl_update, policy, trainer, trl_inputs(policy, group))
    limit = token_ratio(prompt, completion, size)
    text, answer = _against(in_turns(calls, bench.repeats, bench.wait), SHARED, {VISION_ONCE: limit})
    print(f"### Update, P = {prompt}, C = {completion}, G = {size}\n\n{text}")
    return {"P": prompt, "C": completion, "G": size, "limit": limit, "ways": answer}


def _check_ways(policy: Policy, group: Group) -> None:
    """All ways compute the same before any is timed. Raises RuntimeError."""
    found = {}
    for way in (VISION_ONCE, SHARED, SAVING):
        found[way] = learn(policy, group, way, reference(policy, group, way)), gradient(policy)
    logps, grads = found[VISION_ONCE]
    for way in (SHARED, SAVING):
        gap = float((found[way][0] - logps).abs().max())
        error = float((found[way][1] - grads).norm() / grads.norm())
        print(f"agreement of {way} with the naive path: log-probabilities {gap:.1e}, gradient {error:.1e}")
        if policy.model.dtype == torch.float32 and (gap > 1e-5 or error > 1e-5):
            raise RuntimeError(f"{way} does not compute what the naive path does")


def ask_rollout(bench: Bench, prompt: int = 1024, completion: int = 32, size: int = 8) -> Answer:
    """G completions of one prompt, against the library's generate."""
    policy = bench.policy()
    item, clip = make_prompt(policy, prompt)
    calls = rollouts(policy, item, clip, size, completion)
    named = {
        "generate, pixels G times": calls[NAIVE],
        "generate(num_return_sequences=G)": calls[VISION_ONCE],
        "ours": calls[SHARED],
    }
    text, answer = _against(in_turns(named, bench.repeats, bench.wait), "ours", {})
    print(f"### Rollout, P = {prompt}, C = {completion}, G = {size}\n\n{text}")
    return {"P": prompt, "C": completion, "G": size, "ways": answer}


SWEEP = ((256, 64, 8), (512, 64, 8), (1024, 32, 8), (1024, 64, 4), (1024, 64, 8), (1024, 64, 16), (1024, 256, 8))


def ask_sweep(bench: Bench, points: tuple[tuple[int, int, int], ...] = SWEEP) -> Answer:
    """Naive over shared update across P, C and G beside the token ratio."""
    policy, rows, answer = bench.policy(), [], []
    for prompt, completion, size in points:
        group = bench.group(policy, prompt, completion, size)
        calls = {way: partial(update, policy, group, way) for way in (VISION_ONCE, SHARED)}
        times = in_turns(calls, max(1, bench.repeats // 2), bench.wait)
        wall, cpu = times[VISION_ONCE].over(times[SHARED])
        limit = token_ratio(prompt, completion, size)
        rows.append([prompt, completion, size, f"{wall:.2f}", f"{cpu:.2f}", f"{limit:.2f}", f"{cpu / limit:.0%}"])
        answer.append({"P": prompt, "C": completion, "G": size, "wall": wall, "cpu": cpu, "limit": limit})
        print(table(["P", "C", "G", "measured", "in CPU time", "token ratio", "share"], rows[-1:]).splitlines()[-1])
    header = ["P", "C", "G", "measured", "in CPU time", "token ratio", "share"]
    print("### Sweep: naive update over shared update\n\n" + table(header, rows))
    return {"points": answer}


def ask_memory(bench: Bench, prompt: int = 1024, completion: int = 64, sizes: tuple[int, ...] = (2, 16)) -> Answer:
    """Peak memory of an update from the smallest to the largest group, by way."""
    bench.policy()  # writes the base
    answer: Answer = {}
    for way in (VISION_ONCE, SHARED, SAVING):
        peaks = [measure(way, bench.base, prompt, completion, size, bench.device) for size in sizes]
        answer[way] = {"sizes": sizes, "mib": peaks, "per_rollout": (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0])}
    fair = answer[VISION_ONCE]["per_rollout"] * own_share(prompt, completion)
    rows = []
    for way, found in answer.items():
        mib = [f"{value:.0f}" for value in found["mib"]]
        rows.append([way, *mib, f"{found['per_rollout']:.2f}", f"{found['per_rollout'] / fair:.2f}"])
    header = ["peak MiB", *(f"G = {n}" for n in sizes), "per rollout", "times its own tokens' share"]
    print(f"### Memory of the update, P = {prompt}, C = {completion}\n\n{table(header, rows)}")
    return {"P": prompt, "C": completion, "fair_per_rollout": fair, "ways": answer}


def ask_phases(bench: Bench, completion: int = 64, size: int = 8, seconds: int = 60) -> Answer:
    """A whole step of one group on a real video file, by phase."""
    policy, video = bench.policy(), bench.folder / "noise.mp4"
    write_video(video, seconds)
    length, found = measure_phases(policy, video, size, completion, max(1, bench.repeats // 2), bench.wait)
    print(f"### One group's step by phase, P = {length}, C = {completion}, G = {size}\n\n{phase_table(found)}")
    ways: Answer = {}
    for way, phases in found.items():
        medians = {name: {"wall": p.timing.median_wall, "cpu": p.timing.median_cpu} for name, p in phases.items()}
        ways[way] = {name: {**medians[name], **vars(p.counts)} for name, p in phases.items()}
    return {"P": length, "C": completion, "G": size, "ways": ways}
