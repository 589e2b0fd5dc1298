"""pretrain: makes the tiny base, a stand-in for a pretrained model's behaviour. The result ships in the package.

    python run.py stage=pretrain        rebuilds it from nothing; see conf/stage/pretrain.yaml

Four phases: the vision tower learns colours and shapes; the decoder learns to tell when a sentence is true; all of that
is hidden under the habits of an untuned model, wrong formats and coarse times most of the time; and among these habits
it learns to look back at what it wrote, so that an answer can equal the last anchor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from tartvg.config import Config, FramesConfig, PlantedConfig, PromptStyle
from tartvg.data.lessons import habit, load_footage
from tartvg.data.scene import COLOURS, PHRASES, SHAPES
from tartvg.policy.tiny import build_tiny
from tartvg.policy.windows import WINDOW_ATTENTION
from tartvg.prompts import build_prompt
from tartvg.stages.common import set_up
from tartvg.training.tiny_loop import StepLosses, run_phase
from tartvg.training.tiny_sight import Lesson, Sight, collate, make_lesson, repetition_loss, total
from tartvg.training.tiny_tower import TowerLoss, grids_of, tower_accuracy, tower_features, tower_step
from tartvg.types import GroundingSample, Span

FRAMES = FramesConfig(fps=2.0, min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
QUICK_PROMPT = 'When does "{query}" happen in the video?'
HORIZON = 1.25
"""The perception phase stops before its schedule ends; the habit phase goes on with a learning rate of its own."""
PROMPT_MIX = ((2, PromptStyle.tar, 0.5), (1, PromptStyle.tar, 0.15), (3, PromptStyle.tar, 0.15))
"""Anchors asked for and style; the rest are the TimeZero prompt."""


def prompt_text(config: Config, query: str, target: int, style: PromptStyle) -> str:
    """The prompt of the stages for a query."""
    anchors = replace(config.anchors, target=target, max=max(target, config.anchors.max), prompt=style)
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


def corpus(config: Config) -> list[str]:
    """Texts for the tokenizer: all prompts and habits, and every word of the scenes."""
    rng = np.random.default_rng(0)
    texts = []
    for phrases in PHRASES.values():
        for phrase in phrases:
            for i, colour in enumerate(COLOURS):
                query = phrase.format(c=colour, s=SHAPES[i % len(SHAPES)], d=list(COLOURS)[(i + 1) % len(COLOURS)])
                texts += [quick_prompt(query), mixed_prompt(config, rng)(query)]
                texts += [
                    habit(Span(float(rng.integers(0, 20)), float(rng.integers(20, 40))), 40.0, rng) for _ in range(4)
                ]
    return texts


def run_pretrain(config: Config) -> None:
    """Write the tiny base to `pretrain.output` in Hugging Face format. Interrupted, it continues."""
    set_up(config)
    settings = config.pretrain
    output = Path(settings.output)
    phases = output / "phases"
    phases.mkdir(parents=True, exist_ok=True)
    planted = PlantedConfig(num_train=settings.num_videos, num_val=60, num_test=1, queries_per_video=8, seed=7)
    train, held_out = (load_footage(Path(config.dataset.root), planted, s, FRAMES) for s in ("train", "val"))
    model, tokenizer = build_tiny(corpus(config), config.seed)
    model.model.visual.config._attn_implementation = WINDOW_ATTENTION
    tower_loss, sight = TowerLoss(model, tokenizer), Sight(model)

    frames, seen = grids_of(train)

    def tower(_: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = tower_step(model, tower_loss, frames, seen, rng)
        return loss, {"loss": float(loss.detach())}

    run_phase("tower", [model, tower_loss], _is_decoder, settings.tower_steps, settings.lr, config.seed, phases, tower)
    print(f"tower: {tower_accuracy(model, tower_loss, *grids_of(held_out)):.1%} of held-out seconds read without fault")
    with torch.no_grad():
        features = [tower_features(model, f.frames) for f in train]

    def lessons(step: int, rng: np.random.Generator, is_habit: bool, count: int) -> list[Lesson]:
        progress = step / (HORIZON * settings.perception_steps)
        longest = 20.0 if is_habit else 8.0 + 32.0 * min(1.0, max(0.0, progress - 0.2) / 0.5)
        made = []
        for _ in range(count):
            chosen = int(rng.integers(len(train)))
            ask = mixed_prompt(config, rng) if is_habit else quick_prompt
            reach = 40.0 if is_habit and rng.random() < 0.2 else longest
            made.append(make_lesson(train[chosen], features[chosen], reach, ask, is_habit, rng))
        return made

    def sight_step(is_habit: bool, count: int, repetitions: int = 0) -> StepLosses:
        def step_losses(step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
            losses = sight.losses(collate(lessons(step, rng, is_habit, count), tokenizer, 2.0))
            if repetitions:
                losses["repeat"] = repetition_loss(model, tokenizer, repetitions, rng)
            return total(losses), {name: float(value.detach()) for name, value in losses.items()}

        return step_losses

    both, batch = [model, sight.heads], settings.batch_size
    run_phase("perception", both, _is_tower, settings.perception_steps, settings.lr, config.seed, phases,
              sight_step(False, batch), HORIZON)  # fmt: skip
    run_phase("habit", both, _is_tower, settings.habit_steps, settings.habit_lr, config.seed, phases,
              sight_step(True, batch))  # fmt: skip
    run_phase("repeat", both, _is_tower, settings.repeat_steps, settings.habit_lr, config.seed, phases,
              sight_step(True, batch // 2, 2 * batch))  # fmt: skip
    _save(config, model, tokenizer, output)


def _is_decoder(name: str) -> bool:
    return "language_model.layers" in name or "language_model.norm" in name


def _is_tower(name: str) -> bool:
    return "visual." in name


def _save(config: Config, model: Any, tokenizer: Any, output: Path) -> None:
    model = model.to(torch.bfloat16)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=ids[1], do_sample=True, temperature=1.0)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    made = {"command": "python run.py stage=pretrain", "seed": config.seed}
    (output / "made_by.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"tiny base: {output}")
