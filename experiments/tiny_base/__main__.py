"""Make a tiny base, a stand-in for a pretrained model's behaviour. The results ship in the package.

    python -m experiments.tiny_base [tiny|tiny3] [--output runs/tiny_base] [--seed 0] [--threads 1]

The paper starts from Qwen2.5-VL; the tiny base brings along what such a model does; tiny3 is a Qwen3-VL. Interrupted,
the command continues.

tower       The vision tower learns colours and shapes, aligned with the words for them.
perception  The decoder learns when a sentence is true. Its middle layers are taught directly what each video token
            should know (its second, whether the sentence holds, whether the event starts or ends), by heads that are
            thrown away.
habit       That sight is hidden under an untuned model's manners: the format of the paper in about a quarter of the
            outputs, times rounded outwards to 5 seconds most of the time, and exact ones now and then.
repeat      Among these habits come answers to which only the last anchor is a guide: it learns to repeat itself.

lessons.py has the mixture. None of the videos is in the data sets of the stages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from experiments.tiny_base.lessons import (
    Answer,
    Footage,
    echo,
    exact,
    habit,
    habitual,
    late_habitual,
    load_footage,
    repetition,
)
from experiments.tiny_base.loop import StepLosses, run_phase
from experiments.tiny_base.model import build_tiny, tiny3_config, tiny_config
from experiments.tiny_base.sight import AnswerOf, Lesson, Sight, collate, make_lesson, text_loss, total
from experiments.tiny_base.tower import TowerLoss, grids_of, tower_accuracy, tower_features, tower_step
from tartvg.config import Config, FramesConfig, PlantedConfig, PromptStyle, TrainerConfig
from tartvg.data.scene import COLOURS, PHRASES, SHAPES
from tartvg.policy.families.family import family_of
from tartvg.policy.torch_setup import set_up_torch
from tartvg.policy.window_attention import WINDOW_ATTENTION
from tartvg.prompts import build_prompt
from tartvg.types import GroundingSample, Span

QUICK_PROMPT = 'When does "{query}" happen in the video?'
HORIZON = 1.25
"""The perception phase stops before its schedule ends; the habit phase goes on with a learning rate of its own."""
NUM_VIDEOS = 1000
"""Planted videos, drawn with their own seed; none of them is in the data set of the stages."""
LR, HABIT_LR = 2e-3, 1e-3
"""Of seeing (tower, perception), and of the habits on top of it (habit, repeat)."""
PROMPT_MIX = ((2, PromptStyle.tar, 0.5), (1, PromptStyle.tar, 0.15), (3, PromptStyle.tar, 0.15))
"""Anchors asked for and style; the rest are the TimeZero prompt."""


@dataclass(frozen=True)
class Recipe:
    """What differs between the bases."""

    config_of: Callable[[Any], Any]
    """Tokenizer -> the model's config."""
    perception: int
    """Steps of the phase."""
    habit: int
    repeat: int
    batch_size: int
    tower: int = 1000
    longest: float = 40.0
    """Seconds of video that a lesson may have; stamps make a video three times as many tokens."""
    latest: int = 0
    """Whole seconds at which a lesson's video may begin, where times are text: else counting steps would do."""


RECIPES = {
    "tiny": Recipe(tiny_config, perception=2400, habit=900, repeat=400, batch_size=32),
    "tiny3": Recipe(tiny3_config, perception=4000, habit=900, repeat=400, batch_size=20, longest=24.0, latest=20),
}


def prompt_text(config: Config, query: str, target: int, style: PromptStyle) -> str:
    """The prompt of the stages for a query."""
    anchors = replace(config.anchors, count=target, max_count=max(target, config.anchors.max_count), prompt=style)
    return build_prompt(GroundingSample("", Path(), query, (), 0.0, "train"), anchors).text


def mixed_prompt(config: Config, rng: np.random.Generator) -> Callable[[str], str]:
    """One of the prompts that the base may be asked with."""
    draw = rng.random()
    for target, style, share in PROMPT_MIX:
        if draw < share:
            return lambda query: prompt_text(config, query, target, style)
        draw -= share
    return lambda query: prompt_text(config, query, 2, PromptStyle.timezero)


def quick_prompt(query: str) -> str:
    """The first sentence of the prompt alone: the perception phase is about seeing, not reading."""
    return QUICK_PROMPT.format(query=query)


def corpus(config: Config, recipe: Recipe) -> list[str]:
    """Texts for the tokenizer: all prompts and habits, and every word of the scenes."""
    rng = np.random.default_rng(0)
    texts = ["<12.3 seconds>"] * 50 if recipe.latest else []
    for phrases in PHRASES.values():
        for phrase in phrases:
            for i, colour in enumerate(COLOURS):
                query = phrase.format(c=colour, s=SHAPES[i % len(SHAPES)], d=list(COLOURS)[(i + 1) % len(COLOURS)])
                texts += [quick_prompt(query), mixed_prompt(config, rng)(query)]
                texts += [
                    habit(Span(float(rng.integers(0, 20)), float(rng.integers(20, 40))), 40.0, rng) for _ in range(4)
                ]
    return texts


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base", description="Make the tiny base.")
    parser.add_argument("base", nargs="?", choices=RECIPES, default="tiny")
    parser.add_argument("--output", type=Path, help="folder in Hugging Face format; runs/BASE_base unless set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    given = parser.parse_args()
    config = Config(seed=given.seed, trainer=TrainerConfig(num_threads=given.threads))
    pretrain(config, given.base, given.output or Path(f"runs/{given.base}_base"))


def pretrain(config: Config, base: str, output: Path) -> None:
    """Write a tiny base to `output` in Hugging Face format. Interrupted, it continues."""
    recipe = RECIPES[base]
    set_up_torch(config.trainer)
    phases = output / "phases"
    phases.mkdir(parents=True, exist_ok=True)
    planted = PlantedConfig(num_train=NUM_VIDEOS, num_val=60, num_test=1, queries_per_video=8, seed=7)
    model, tokenizer = build_tiny(corpus(config, recipe), config.seed, recipe.config_of)
    model.model.visual.config._attn_implementation = WINDOW_ATTENTION
    side = family_of(model.config.model_type).patch_form.side
    pixels = (2 * side) ** 2
    frames = FramesConfig(fps=2.0, min_frames=4, max_frames=96, min_pixels=pixels, max_pixels=pixels)
    train, held_out = (load_footage(Path(config.dataset.root), planted, s, frames, side) for s in ("train", "val"))
    _tower_phase(config, recipe.tower, model, tokenizer, (train, held_out), phases)
    school = School(config, recipe, model, tokenizer, train)

    def phase(name: str, steps: int, peak: float, losses: StepLosses, horizon: float = 1.0) -> None:
        run_phase(name, [model, school.sight.heads], _is_tower, steps, peak, config.seed, phases, losses, horizon)

    phase("perception", recipe.perception, LR, school.perception(recipe.batch_size), HORIZON)
    phase("habit", recipe.habit, HABIT_LR, school.habit(recipe.batch_size))
    phase("repeat", recipe.repeat, HABIT_LR, school.repeat(recipe.batch_size // 2))
    _save(config, base, model, tokenizer, output)


def _tower_phase(
    config: Config, steps: int, model: Any, tokenizer: Any, footage: tuple[list[Footage], list[Footage]], phases: Path
) -> None:
    loss_of = TowerLoss(model, tokenizer)
    frames, seen = grids_of(footage[0])

    def step(_: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = tower_step(model, loss_of, frames, seen, rng)
        return loss, {"loss": float(loss.detach())}

    run_phase("tower", [model, loss_of], _is_decoder, steps, LR, config.seed, phases, step)
    accuracy = tower_accuracy(model, loss_of, *grids_of(footage[1]))
    print(f"tower: {accuracy:.1%} of held-out seconds read without fault")


class School:
    """A model whose tower is finished, with the footage that it learns from: the lessons of the later phases."""

    def __init__(
        self, config: Config, recipe: Recipe, model: Any, tokenizer: Any, footage: Sequence[Footage]
    ) -> None:  # fmt: skip
        self.config = config
        self.recipe = recipe
        self.model = model
        self.tokenizer = tokenizer
        self.footage = footage
        self.sight = Sight(model)
        with torch.no_grad():
            self.features = [tower_features(model, f.frames) for f in footage]

    def perception(self, count: int) -> StepLosses:
        """When is it true? Exact answers to a short question, about ever longer videos."""
        steps = HORIZON * self.recipe.perception

        def losses(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            longest = 8.0 + (self.recipe.longest - 8.0) * min(1.0, max(0.0, step / steps - 0.2) / 0.5)
            return self._judge([self._lesson(longest, quick_prompt, exact, rng) for _ in range(count)])

        return losses

    def habit(self, count: int) -> StepLosses:
        """Careless answers to the prompts of the stages."""

        def losses(_: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            return self._judge(self._prompted(count, habitual, rng))

        return losses

    def repeat(self, count: int) -> StepLosses:
        """The same habits, and answers of which only the last anchor is a guide: some with a video, many without."""

        def losses(_: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            texts = [self._text(rng) for _ in range(4 * count)]
            habits, echoes = self._prompted(count, late_habitual, rng), self._prompted(count // 2, echo, rng)
            return self._judge(habits, echoes, texts)

        return losses

    def _prompted(self, count: int, answer_of: AnswerOf, rng: np.random.Generator) -> list[Lesson]:
        longest = (self.recipe.longest if rng.random() < 0.2 else 20.0 for _ in range(count))
        return [self._lesson(x, mixed_prompt(self.config, rng), answer_of, rng) for x in longest]

    def _lesson(
        self, longest: float, ask: Callable[[str], str], answer_of: AnswerOf, rng: np.random.Generator
    ) -> Lesson:
        chosen = int(rng.integers(len(self.footage)))
        footage, features = self.footage[chosen], self.features[chosen]
        return make_lesson(footage, features, longest, ask, answer_of, rng, self.recipe.latest)

    def _text(self, rng: np.random.Generator) -> tuple[str, Answer]:
        """Asked with words of its own, or with those of the stages: the skill must not depend on the question."""
        question, answer = repetition(rng)
        if rng.random() < 0.25:
            query, _ = self.footage[int(rng.integers(len(self.footage)))].events[0]
            question = mixed_prompt(self.config, rng)(query)
        return question, answer

    def _judge(
        self, lessons: Sequence[Lesson], echoes: Sequence[Lesson] = (), texts: Sequence[tuple[str, Answer]] = ()
    ) -> tuple[Tensor, dict[str, float]]:
        losses = self.sight.losses(collate(lessons, self.tokenizer, self.model.config))
        if echoes:
            losses["echo"] = self.sight.losses(collate(echoes, self.tokenizer, self.model.config))["answer"]
        if texts:
            losses["text"] = text_loss(self.model, self.tokenizer, texts)
        return total(losses), {name: float(value.detach()) for name, value in losses.items()}


def _is_decoder(name: str) -> bool:
    return "language_model.layers" in name or "language_model.norm" in name


def _is_tower(name: str) -> bool:
    return "visual." in name


def _save(config: Config, base: str, model: Any, tokenizer: Any, output: Path) -> None:
    model = model.to(torch.bfloat16)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=ids[1], do_sample=True, temperature=1.0)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    made = {"command": f"python -m experiments.tiny_base {base}", "seed": config.seed}
    (output / "made_by.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"{base} base: {output}")


if __name__ == "__main__":
    main()
