"""A whole GRPO step of one group by phase: seconds, operations, tokens, tower passes.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from experiments.efficiency.bench.counting import Counts, count
from experiments.efficiency.bench.ratios import Timing, in_turns, table
from experiments.efficiency.bench.shapes import make_tokens
from experiments.efficiency.bench.ways import (
    NAIVE,
    SHARED,
    VISION_ONCE,
    Group,
    learn,
    reference,
    rollouts,
    see,
    spread_advantages,
)
from tartvg.config import AdvantageScale, AnchorsConfig, RewardConfig
from tartvg.data.video import read_clip
from tartvg.grpo import group_advantages
from tartvg.policy.inputs import clip_patches
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.types import GroundingSample, Span

PHASES = ("decode", "vision", "prefill", "decode tokens", "reward", "reference", "update")
ANSWER = (
    "<think> <timestamp>1.00 to 5.00</timestamp> <timestamp>2.00 to 4.00</timestamp> </think>"
    "<answer>2.00 to 4.00</answer>"
)


@dataclass(frozen=True)
class Phase:
    """One phase of one way."""

    timing: Timing
    counts: Counts


def write_video(path: Path, seconds: int, side: int = 112) -> None:
    """Noise at 8 frames a second: nothing for the codec to save."""
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(8 * seconds):
            frame = av.VideoFrame.from_ndarray(generator.integers(0, 256, (side, side, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def measure_phases(
    policy: Policy, video: Path, group_size: int, completion: int, repeats: int, wait: Callable[[], None]
) -> tuple[int, dict[str, dict[str, Phase]]]:
    """P, and for each way its phases. `decode tokens` is the whole rollout without its prefill.

    `naive` differs from `vision once` in the tower only: rollout, reference and update encode G copies each. Both draw
    their rollouts with the library's generate(num_return_sequences=G), whose prefill contains one more tower pass.
    """
    sample = GroundingSample("bench", video, "when does it happen", (Span(2, 4),), 60.0, "train")
    clip = read_clip(video, policy.settings.frames, policy.family.patch_form.side)
    item = policy.prepare(build_prompt(sample, AnchorsConfig()), clip)
    tokens = make_tokens(policy, item, group_size, completion)
    group = Group(
        item, clip_patches(clip, policy.family.patch_form), tokens, spread_advantages(group_size, policy.device)
    )
    calls = _calls(policy, group, completion)
    times, counts = in_turns(calls, repeats, wait), {name: count(policy, call) for name, call in calls.items()}
    found: dict[str, dict[str, Phase]] = {}
    for way in (NAIVE, VISION_ONCE, SHARED):
        kind = VISION_ONCE if way == NAIVE else way
        names = dict.fromkeys(PHASES, "") | {
            "decode": "decode", "vision": "G visions" if way == NAIVE else "vision", "reward": "reward",
            "prefill": f"{kind} prefill", "decode tokens": f"{kind} rollout", "reference": f"{kind} reference",
            "update": f"{kind} update",
        }  # fmt: skip
        found[way] = {phase: Phase(times[name], counts[name]) for phase, name in names.items()}
        found[way]["decode tokens"] = _without(found[way]["decode tokens"], found[way]["prefill"])
    return item.inputs.length, found


def _calls(policy: Policy, group: Group, completion: int) -> dict[str, Callable[[], object]]:
    size, item, clip = len(group.advantages), group.item, group.clip
    rubric, sample = Rubric(RewardConfig(), AnchorsConfig()), item.prompt.sample

    def reward() -> Tensor:
        totals = [rubric.score(parse_response(ANSWER), sample).total for _ in range(size)]
        return group_advantages(torch.tensor(totals), AdvantageScale.sample_std)

    def every_pass_sees_copies() -> None:
        for _ in ("rollout", "reference", "update"):
            see(policy, clip, size)

    calls: dict[str, Callable[[], object]] = {
        "decode": partial(read_clip, sample.video, policy.settings.frames, policy.family.patch_form.side),
        "vision": partial(see, policy, clip, 1),
        "G visions": every_pass_sees_copies,
        "reward": reward,
    }
    for way in (VISION_ONCE, SHARED):
        calls[f"{way} prefill"] = rollouts(policy, item, clip, size, 1)[way]
        calls[f"{way} rollout"] = rollouts(policy, item, clip, size, completion)[way]
        calls[f"{way} reference"] = partial(reference, policy, group, way)
        calls[f"{way} update"] = partial(learn, policy, group, way, reference(policy, group, way))
    return calls


def _without(whole: Phase, part: Phase) -> Phase:
    """What is left of a phase after one that it begins with."""
    timing = Timing(
        tuple(w - p for w, p in zip(whole.timing.wall, part.timing.wall, strict=True)),
        tuple(w - p for w, p in zip(whole.timing.cpu, part.timing.cpu, strict=True)),
    )
    a, b = whole.counts, part.counts
    return Phase(timing, Counts(a.flops - b.flops, a.tokens - b.tokens, a.videos - b.videos))


def phase_table(found: dict[str, dict[str, Phase]]) -> str:
    """One row per way and phase, and their sums."""
    rows: list[list[object]] = []
    for way, phases in found.items():
        for name, phase in phases.items():
            t, c = phase.timing, phase.counts
            cells = [f"{t.median_wall:.3f}", f"{t.median_cpu:.3f}", f"{c.flops / 1e9:.2f}", c.tokens, c.videos]
            rows.append([f"{way}: {name}", *cells])
        wall = sum(p.timing.median_wall for p in phases.values())
        cpu = sum(p.timing.median_cpu for p in phases.values())
        work = [sum(getattr(p.counts, name) for p in phases.values()) for name in ("flops", "tokens", "videos")]
        rows.append([f"**{way}: all**", f"{wall:.3f}", f"{cpu:.3f}", f"{work[0] / 1e9:.2f}", work[1], work[2]])
    return table(["phase", "seconds", "CPU seconds", "GFLOP", "tokens", "tower passes"], rows)
