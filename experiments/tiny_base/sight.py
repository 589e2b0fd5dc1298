"""Phases 2 and 3 of the tiny base: tell when a sentence is true, then answer with a pretrained model's habits.

The difficult part for a small decoder is not the language but to turn an attended second into digits. So its middle
layers are taught directly, by heads that are thrown away afterwards, what every video token should know: its own
second, whether the query is true in it, and whether the event starts or ends in it.

Legend: B lessons, S sequence length, T grid steps (seconds), H hidden size, K features of a video token (more than
one with DeepStack).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy

from experiments.tiny_base.lessons import FPS, Answer, Footage, crop
from experiments.tiny_base.tower import TOKENS_PER_GRID
from tartvg.config import PolicyConfig
from tartvg.policy.families.family import family_of
from tartvg.policy.features import VideoFeatures
from tartvg.policy.inputs import PromptInputs
from tartvg.policy.patches import TEMPORAL_PATCH
from tartvg.types import Span

MAX_SECONDS = 48
ACTIVE_LAYER, BORDER_LAYER = 2, 3
"""Layers whose output is taught: matching first, borders on top of it, and two layers left to write with."""


@dataclass(frozen=True)
class Lesson:
    """One video part, one question, one answer."""

    features: Tensor
    """(T, K, 4, H)"""
    window: Span
    """From the beginning of the part."""
    prompt: str
    answer: Answer
    offset: float = 0.0
    """Seconds that the part begins with, by its stamps; the answer's times are those of the stamps."""


@dataclass(frozen=True)
class LessonBatch:
    """B lessons, padded at the end to S tokens."""

    features: Tensor
    """(K, video tokens, H)"""
    ids: Tensor
    positions: Tensor
    labels: Tensor
    """Token ids where the answer is, -100 elsewhere."""
    is_video: Tensor
    second: Tensor
    """Second of every video token, -100 elsewhere."""
    start: Tensor
    """0 no start here, 1 on the full second, 2 on the half; -100 elsewhere."""
    end: Tensor
    active: Tensor
    """(B, S, 2): whether the query is true in the first and second frame."""


class SightHeads(torch.nn.Module):
    """Linear heads on the middle layers; they exist while the base is made, and not in it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.second = torch.nn.Linear(hidden, MAX_SECONDS)
        self.start = torch.nn.Linear(hidden, 3)
        self.end = torch.nn.Linear(hidden, 3)
        self.active = torch.nn.Linear(hidden, 2)


AnswerOf = Callable[[Span, float, np.random.Generator], Answer]
"""Window, seconds of the video, random stream -> what the lesson answers."""


def make_lesson(
    footage: Footage, features: Tensor, longest: float, prompt_of: Callable[[str], str], answer_of: AnswerOf,
    rng: np.random.Generator, latest: int = 0,
) -> Lesson:  # fmt: skip
    """A random event of a video, in a random part of it, which begins at a whole second up to `latest`."""
    query, window = footage.events[rng.integers(len(footage.events))]
    part = crop(footage, window, longest, rng)
    shifted = Span(window.start - part.start / FPS, window.end - part.start / FPS)
    seconds = (part.stop - part.start) / FPS
    if part.start % TEMPORAL_PATCH:  # features are stored for even starts; move by half a second where there is room
        part = slice(part.start - 1, part.stop - 1)
        shifted = Span(shifted.start + 1 / FPS, shifted.end + 1 / FPS)
    chosen = features[part.start // TEMPORAL_PATCH : part.stop // TEMPORAL_PATCH]
    offset = float(rng.integers(0, max(1, min(latest, MAX_SECONDS - len(chosen)) + 1))) if latest else 0.0
    told = Span(shifted.start + offset, shifted.end + offset)
    return Lesson(chosen, shifted, prompt_of(query), answer_of(told, seconds + offset, rng), offset)


def answer_tokens(tokenizer: Any, answer: Answer) -> tuple[list[int], list[int]]:
    """Ids of an answer with the end token, and its labels: -100 on what is given.

    Encoded as one text, as the model writes it; `given` must end where a word begins.
    """
    ids = tokenizer.encode(answer.given + answer.taught, add_special_tokens=False)
    num_given = len(tokenizer.encode(answer.given, add_special_tokens=False)) if answer.given else 0
    assert tokenizer.decode(ids[:num_given]) == answer.given, f"{answer.given!r} ends inside a token"
    ids.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return ids, [-100] * num_given + ids[num_given:]


def _inputs(lesson: Lesson, tokenizer: Any, config: Any) -> PromptInputs:
    """Ids and positions of a lesson's prompt, as the policy has them: frames half a second apart, two to a step."""
    side, steps = round(TOKENS_PER_GRID**0.5) * 2, len(lesson.features)
    stamps = tuple(lesson.offset + step + 0.5 / FPS for step in range(steps))
    video = VideoFeatures(torch.empty(0), (steps, side, side), 1.0, float(steps), stamps=stamps)
    family, settings = family_of(config.model_type), PolicyConfig(name="tiny", path="")
    return family.encode_prompt(tokenizer, lesson.prompt, video, config, settings)


def collate(lessons: Sequence[Lesson], tokenizer: Any, config: Any) -> LessonBatch:
    """Pad lessons into one batch, with the labels of every video token."""
    rows = []
    for lesson in lessons:
        inputs = _inputs(lesson, tokenizer, config)
        written, graded = answer_tokens(tokenizer, lesson.answer)
        rows.append((inputs, torch.tensor(written), torch.tensor(graded)))
    shape = (len(rows), max(p.length + len(t) for p, t, _ in rows))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    second, start, end = torch.full(shape, -100), torch.full(shape, -100), torch.full(shape, -100)
    positions, active = torch.zeros(3, *shape, dtype=torch.long), torch.zeros(*shape, 2)
    is_video = torch.zeros(shape, dtype=torch.bool)
    for row, (lesson, (inputs, target, label)) in enumerate(zip(lessons, rows, strict=True)):
        n, m = inputs.length, len(target)
        ids[row, :n], ids[row, n : n + m] = inputs.ids, target
        labels[row, n : n + m] = label
        positions[:, row, :n] = inputs.positions
        positions[:, row, n : n + m] = inputs.next_position + torch.arange(m)
        is_video[row, :n] = inputs.is_video
        time = torch.arange(len(lesson.features)).repeat_interleave(TOKENS_PER_GRID)
        second[row, :n][inputs.is_video] = time + int(lesson.offset)
        for table, border in ((start, lesson.window.start), (end, lesson.window.end)):
            kind = 1 + int(border % 1 >= 0.5)
            table[row, :n][inputs.is_video] = torch.where(time == int(border), kind, 0)
        frames = torch.stack([time, time + 1 / FPS], dim=1)
        is_true = (frames >= lesson.window.start) & (frames < lesson.window.end)
        active[row, :n][inputs.is_video] = is_true.float()
    features = torch.cat([lesson.features.transpose(0, 1).flatten(1, 2) for lesson in lessons], dim=1)
    return LessonBatch(features, ids, positions, labels, is_video, second, start, end, active)


class Sight:
    """The decoder with its heads, and the loss of a batch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.model.language_model
        self.heads = SightHeads(model.config.text_config.hidden_size)
        self._states: dict[int, Tensor] = {}
        for layer in (ACTIVE_LAYER, BORDER_LAYER):
            self.decoder.layers[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            self._states[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    def losses(self, batch: LessonBatch) -> dict[str, Tensor]:
        """Answer, second, start, end and active: each a mean over its own tokens."""
        embedded = self.decoder.embed_tokens(batch.ids)
        embedded = embedded.masked_scatter(batch.is_video[..., None], batch.features[0])
        added: dict[str, Any] = {}  # the library's own way to DeepStack
        if len(batch.features) > 1:
            added = {"visual_pos_masks": batch.is_video, "deepstack_visual_embeds": list(batch.features[1:])}
        out = self.decoder(inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, **added)
        is_answer = batch.labels[:, 1:] != -100
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][is_answer])
        is_video = batch.is_video
        border, early = self._states[BORDER_LAYER][is_video], self._states[ACTIVE_LAYER][is_video]
        rare = torch.tensor([1.0, 5.0, 5.0])
        return {
            "answer": cross_entropy(logits, batch.labels[:, 1:][is_answer]),
            "second": cross_entropy(self.heads.second(border), batch.second[is_video]),
            "start": cross_entropy(self.heads.start(border), batch.start[is_video], rare),
            "end": cross_entropy(self.heads.end(border), batch.end[is_video], rare),
            "active": bce(self.heads.active(early), batch.active[is_video]),
        }


def text_loss(model: Any, tokenizer: Any, texts: Sequence[tuple[str, Answer]]) -> Tensor:
    """Next-token loss on questions and answers without a video: short and cheap."""
    rows, labels = [], []
    for question, answer in texts:
        message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before = tokenizer.encode(text, add_special_tokens=False)
        after, label = answer_tokens(tokenizer, answer)
        rows.append(torch.tensor(before + after))
        labels.append(torch.tensor([-100] * len(before) + label))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    decoder = model.model.language_model
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    out = decoder(inputs_embeds=decoder.embed_tokens(ids), position_ids=positions, use_cache=False)
    is_taught = wanted[:, 1:] != -100
    logits = model.lm_head(out.last_hidden_state[:, :-1][is_taught])
    return cross_entropy(logits, wanted[:, 1:][is_taught])


WEIGHTS = {"answer": 1.0, "second": 1.0, "start": 2.0, "end": 2.0, "active": 3.0, "echo": 4.0, "text": 4.0}


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum that is minimised."""
    return torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
