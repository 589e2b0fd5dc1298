"""HTML of single answers: film strips that compare two policies, and what the policy said while it learned."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from tartvg import rewards
from tartvg.evaluation.score import answer_iou
from tartvg.report.questions import question_of
from tartvg.report.strips import Lane, contact_row, lane_text, lanes_of, ticks
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.types import GroundingSample, Prediction, RewardBreakdown, Rollout, RolloutGroup, Span

MAX_CHARACTERS = 4000
"""Longer completions are cut in the page; rollouts.jsonl and predictions.jsonl hold them whole."""
TAGGED = re.compile(r"(<timestamp>[^<]{0,200}</timestamp>)|(<answer>[^<]{0,200}</answer>)")


@dataclass(frozen=True)
class Case:
    """One test query answered by two policies (or by one: then `before` is None)."""

    kind: str
    """`best improved`, `typical` or `worst`."""
    before: Prediction | None
    after: Prediction
    windows: tuple[Span, ...]
    iou_before: float
    iou_after: float


def choose_cases(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    samples_by_id: Mapping[str, GroundingSample],
    num_each: int = 2,
) -> list[Case]:
    """The greedy answers that improved most, changed as the median does, and lost most: `num_each` of each kind.

    Without `before`, the best, the median and the worst IoU. What the two were not asked alike is left out. The choice
    is a function of the predictions alone.
    """
    old = {p.sample_id: p for p in before if p.sample_index == 0}
    cases = []
    for p in sorted((p for p in after if p.sample_index == 0), key=lambda p: p.sample_id):
        windows = samples_by_id[p.sample_id].windows if p.sample_id in samples_by_id else p.windows
        first = old.get(p.sample_id)
        if windows and (not old if first is None else question_of(first) == question_of(p)):
            iou_before = answer_iou(first.answer, windows) if first else 0.0
            cases.append(Case("", first, p, windows, iou_before, answer_iou(p.answer, windows)))
    # Ties in the change are broken by the final IoU: the best should also look good, the worst also look bad.
    cases.sort(key=lambda c: (c.iou_after - c.iou_before, c.iou_after), reverse=True)
    num = min(num_each, len(cases))
    best, rest = cases[:num], cases[num:]
    worst = rest[-min(num, len(rest)) :] if rest else []
    rest = rest[: len(rest) - len(worst)]
    middle = max(0, (len(rest) - num) // 2)
    typical = rest[middle : middle + num]
    labelled = [("best improved" if old else "best", best), ("typical", typical), ("worst", worst[::-1])]
    return [replace(case, kind=kind) for kind, part in labelled for case in part]


def choose_extremes(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    samples_by_id: Mapping[str, GroundingSample],
    num_each: int = 2,
) -> list[Case]:
    """The greedy answers of `after` that gained most and lost most against `before`, and its best and worst ones.

    No query twice; a kind that has no further query gets fewer. The choice is a function of the predictions alone.
    """
    cases = choose_cases(before, after, samples_by_id, num_each=len(after))
    cases.sort(key=lambda c: c.after.sample_id)
    chosen: list[Case] = []

    def take(kind: str, rank: Callable[[Case], float], is_wanted: Callable[[Case], bool]) -> None:
        taken = {c.after.sample_id for c in chosen}
        left = sorted((c for c in cases if c.after.sample_id not in taken and is_wanted(c)), key=rank, reverse=True)
        chosen.extend(replace(c, kind=kind) for c in left[:num_each])

    take("gained most", lambda c: c.iou_after - c.iou_before, lambda c: c.iou_after > c.iou_before)
    take("lost most", lambda c: c.iou_before - c.iou_after, lambda c: c.iou_after < c.iou_before)
    take("best", lambda c: c.iou_after, lambda c: True)
    take("worst", lambda c: -c.iou_after, lambda c: True)
    return chosen


def case_html(
    case: Case,
    names: tuple[str, str],
    samples_by_id: Mapping[str, GroundingSample],
    rubrics: tuple[Rubric | None, Rubric | None] = (None, None),
) -> str:
    """One card: query, film strip with both policies' anchors and answers, both texts. Damaged videos show why.

    With `rubrics` each text is followed by the reward terms that its own run gives it.
    """
    after, sample = case.after, samples_by_id.get(case.after.sample_id)
    length = sample.duration if sample else after.duration
    lanes = [Lane("truth", "truth", case.windows)]
    change = f"IoU {case.iou_after:.2f} ({names[1]})"
    texts = [said_html(names[1], after.text, _terms_of(after.text, sample, rubrics[1]))]
    if case.before is not None:
        lanes += lanes_of(case.before.anchors, case.before.answer, f"{names[0]}: ")
        change = f"IoU {case.iou_before:.2f} ({names[0]}) → {case.iou_after:.2f} ({names[1]})"
        texts.insert(0, said_html(names[0], case.before.text, _terms_of(case.before.text, sample, rubrics[0])))
    lanes += lanes_of(after.anchors, after.answer, f"{names[1]}: ")
    return (
        f'<article class="card"><p class="kind">{escape(case.kind)}</p><h3>{escape(after.query)}</h3>'
        f'<p class="meta">{escape(Path(after.video).name)}, {length:.1f} s. {escape(change)}</p>'
        f"{_strip_html(sample.video if sample else None, length, lanes)}"
        f'<div class="pair">{"".join(texts)}</div></article>'
    )


def _strip_html(video: Path | None, duration: float, lanes: Sequence[Lane]) -> str:
    """Frames as one picture and bars as positioned boxes on the same axis: sharp and readable at every width."""
    if duration <= 0:
        return '<p class="note">No film strip: the duration is unknown.</p>'
    frames = '<p class="note">No frames: the video is not among the samples of this data set.</p>'
    if video is not None:
        try:
            data = base64.b64encode(contact_row(video, duration)).decode()
            frames = f'<img class="frames" alt="Frames at even times" src="data:image/jpeg;base64,{data}">'
        except ValueError:
            frames = '<p class="note">No frames: the video could not be read.</p>'
    rows = "".join(_lane_html(lane, duration) for lane in lanes)
    marks = "".join(f'<span style="left:{100 * t / duration:.2f}%">{t:g}</span>' for t in ticks(duration))
    return (
        f'<figure class="strip"><div class="lane">{frames}</div>{rows}<div class="lane seconds" aria-hidden="true">'
        f'<span class="label">seconds</span><span class="axis">{marks}</span></div></figure>'
    )


def _lane_html(lane: Lane, duration: float) -> str:
    bars = ""
    for span in lane.spans:
        start, end = max(span.start, 0.0), min(span.end, duration)
        if end >= start and start <= duration:
            left, width = 100 * start / duration, 100 * (end - start) / duration
            bars += f'<span class="bar {lane.kind}" style="left:{left:.2f}%;width:{width:.2f}%"></span>'
    text = lane_text(lane)
    if any(span.length < 0 for span in lane.spans):
        text += " (reversed)"
    elif lane.spans and not bars:
        text += " (outside)"
    return (
        f'<div class="lane"><span class="label">{escape(lane.label)}</span>'
        f'<span class="track" aria-hidden="true">{bars}</span><span class="numbers">{escape(text)}</span></div>'
    )


def said_html(name: str, text: str, terms: str = "") -> str:
    """A completion, escaped, with its anchors and its answer marked; `terms` is HTML to put under it."""
    cut = text[:MAX_CHARACTERS]
    more = f'<p class="note">… {len(text) - len(cut):,} more characters</p>' if len(cut) < len(text) else ""
    return f'<div class="said"><h4>{escape(name)}</h4><p class="text">{marked(cut) or "(empty)"}</p>{more}{terms}</div>'


def marked(text: str) -> str:
    """Escaped HTML of a completion; `<timestamp>…</timestamp>` and `<answer>…</answer>` become marks."""
    parts, end = [], 0
    for match in TAGGED.finditer(text):
        kind = "anchor" if match.group(1) else "answer"
        parts += [escape(text[end : match.start()]), f'<mark class="{kind}">{escape(match.group())}</mark>']
        end = match.end()
    return "".join([*parts, escape(text[end:])])


def rollouts_html(groups: Sequence[RolloutGroup]) -> str:
    """The best and the worst rollout of one step, with their reward terms; empty without groups."""
    pairs = sorted(
        ((group, rollout) for group in groups for rollout in group.rollouts), key=lambda pair: pair[1].reward.total
    )
    if not pairs:
        return ""
    chosen = [("best", pairs[-1])] + ([("worst", pairs[0])] if len(pairs) > 1 else [])
    return "".join(_rollout_html(rank, *pair) for rank, pair in chosen)


def terms_html(reward: RewardBreakdown) -> str:
    """Every term of a reward, before its weight, and the weighted total."""
    titles = {term.name: term.title for term in rewards.rubric.TERMS}
    terms = [
        ("total", reward.total),
        *((titles.get(name, name), value) for name, value in reward.terms.items()),
        *((f"anchor {i} IoU", value) for i, value in enumerate(reward.anchor_ious, start=1)),
    ]
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{value:.2f}</dd></div>" for name, value in terms)
    return f'<dl class="terms">{listed}</dl>'


def _terms_of(text: str, sample: GroundingSample | None, rubric: Rubric | None) -> str:
    if rubric is None or sample is None or not sample.windows:
        return ""
    return terms_html(rubric.score(parse_response(text, is_direct=rubric.anchors.is_direct), sample))


def _rollout_html(rank: str, group: RolloutGroup, rollout: Rollout) -> str:
    truth = ", ".join(f"{w} s" for w in group.prompt.sample.windows)
    faults = ", ".join(f.value for f in rollout.response.faults)
    return (
        f'<article class="card"><p class="kind">step {group.step}, {rank}</p>'
        f"<h3>{escape(group.prompt.sample.query)}</h3>"
        f'<p class="meta">truth {escape(truth)}{escape(f"; faults: {faults}" if faults else "")}</p>'
        f"{terms_html(rollout.reward)}"
        f'<p class="text">{marked(rollout.completion.text[:MAX_CHARACTERS]) or "(empty)"}</p></article>'
    )
