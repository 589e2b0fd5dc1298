"""The README.md of an exported model: what it is, how it was made and scored, how it is asked, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tartvg.evaluation.score import scorecard_from_json
from tartvg.types import Estimate

CHAIN = ("rollouts", "grpo1", "filter", "sft", "grpo2")
"""Stages that an adapter may have behind it, in order."""


@dataclass(frozen=True)
class Shift:
    """How far a merge moved the answers to some queries."""

    num_queries: int
    num_tokens: int
    num_equal: int
    """Greedy answers that are the same to the letter."""
    mean: float
    """Mean absolute change of a token's log-probability, in nats."""
    largest: float


@dataclass(frozen=True)
class ScoredPolicy:
    """One evaluation of the run."""

    label: str
    data: str
    """Data set and split."""
    command: str
    scores: dict[str, Any]
    """What scores.json holds."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from."""

    title: str
    base: str
    adapter: str
    precision: str
    training: Sequence[tuple[str, str]]
    """Each stage with a sentence on its data, command, commit and time."""
    evaluations: Sequence[ScoredPolicy]
    prompt: str
    shift: Shift | None
    max_new_tokens: int


def training_behind(adapter: Path) -> list[tuple[str, str]]:
    """The finished stages of the run that led to `<run>/<stage>/adapter`; empty where none is recorded."""
    stage = adapter.parent.name
    if stage not in CHAIN:
        return []
    found: list[tuple[str, str]] = []
    for name in CHAIN[: CHAIN.index(stage) + 1]:
        folder = adapter.parent.parent / name
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
            facts = [
                f"data set {config['dataset']['name']}, seed {config['seed']}",
                f"`{manifest['command']}`",
                f"commit {manifest['git']}",
                f"{manifest['seconds']:.0f} s",
                *(f"{key} {value}" for key, value in manifest["inputs"].items() if key in ("data", "base")),
            ]
        except (OSError, ValueError, LookupError, TypeError, YAMLError, OmegaConfBaseException):
            continue
        found.append((name, "; ".join(facts)))
    return found


def model_card(facts: CardFacts) -> str:
    """Markdown with the Hub's header."""
    parts = [_header(facts), _use(facts), _training(facts), _scores(facts), _merge(facts), _limits(facts)]
    return "\n\n".join(parts) + "\n"


def _header(facts: CardFacts) -> str:
    return f"""---
library_name: transformers
pipeline_tag: video-text-to-text
tags: [temporal-video-grounding, reinforcement-learning, qwen2_5_vl]
---

# {facts.title}

Given a video and a sentence, this model says when in the video the sentence happens: reasoning with time stamps, then
an answer in seconds. It is {facts.base} with the LoRA adapter {facts.adapter} merged in, made by tartvg, an independent
implementation of TAR-TVG (arXiv 2508.07683). Weights are {facts.precision}; files and names are those of the base, and
so is the licence."""


def _use(facts: CardFacts) -> str:
    return f"""## Use it

```
python answer.py clip.mp4 "a person opens the door"
```

`answer.py` needs torch, transformers and PyAV. `generation_config.json` asks for greedy decoding and at most
{facts.max_new_tokens} new tokens. One user turn holds this text, then the video, without a system prompt. `{{query}}`
is the sentence on one line, without its full stop:

```
{facts.prompt}
```

Three things have to be as in training: the prompt, the frames (`grounding.json`), and the positions, where text after
the video continues from the video's last moment. `model.generate` of transformers 5.23 without `position_ids` continues
from the video's width instead and gives other answers; `answer.py` hands the positions over.

vLLM (not run here) reads the folder as any Qwen2.5-VL: `vllm serve THIS_FOLDER`, then a chat request with the text and
the video in this order and `"temperature": 0`. It samples and resizes frames itself: set its frame rate to `fps` of
`grounding.json`, and compare a few answers with `answer.py` before relying on it."""


def _training(facts: CardFacts) -> str:
    if not facts.training:
        return "## Training\n\nThe adapter came without a record of how it was trained."
    lines = "\n".join(f"- **{name}**: {said}" for name, said in facts.training)
    return f"## Training\n\nOne line per stage. `data` and `base` are hashes of what it read.\n\n{lines}"


def _scores(facts: CardFacts) -> str:
    if not facts.evaluations:
        return "## Scores\n\nNot evaluated. `python run.py stage=evaluate`, then `stage=export` again, fills this in."
    cards = [(e, scorecard_from_json(e.scores)) for e in facts.evaluations]
    thresholds = [t for t in (0.3, 0.5, 0.7) if all(t in card.recall for _, card in cards)]
    titles = ["policy", "data", "queries", "mIoU", *(f"R1@{t}" for t in thresholds), "format"]
    rows = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    for found, card in cards:
        estimates = [card.miou, *(card.recall[t] for t in thresholds), card.format_rate]
        rows.append([found.label, found.data, str(card.num_queries), *map(_percent, estimates)])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    commands = "\n".join(f"- {found.label}: `{found.command}`" for found, _ in cards)
    return (
        "## Scores\n\nIn per cent, with 95 % bootstrap intervals over the queries, before the merge. Every annotated "
        "query counts; format is measured on sampled outputs where there are some, the rest on greedy answers.\n\n"
        f"{table}\n\n{commands}"
    )


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _merge(facts: CardFacts) -> str:
    rounded = "" if facts.precision == "fp32" else f" and rounded once to {facts.precision}"
    text = f"## The merge\n\nBase and adapter were added in fp32{rounded}. "
    if facts.shift is None:
        return text + "What that changed was not measured (`export.num_queries=0`)."
    return text + f"On greedy answers, {in_words(facts.shift)}."


def in_words(shift: Shift) -> str:
    """How far a merge moved the answers, for the card and the terminal."""
    return (
        f"{shift.num_equal} of {shift.num_queries} are the same to the letter, and a token's log-probability moved "
        f"by {shift.mean:.1e} nats on average and {shift.largest:.1e} at most ({shift.num_tokens} tokens)"
    )


def _limits(facts: CardFacts) -> str:
    return """## Limits

- One moment per sentence: what happens several times gets one answer, and what never happens gets one too.
- Time stamps are no proof that the model looked: the reasoning may name times that the answer does not follow from.
- It was scored on the data above and on nothing else; grounding may not carry over to other kinds or lengths of video.
- What the base does wrong, and what its licence forbids, holds for this model too."""
