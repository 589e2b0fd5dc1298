"""Phase 1 of the tiny base: the vision tower learns colours and shapes, aligned with the words for them.

Legend: N grid steps, H hidden size of the language model, K features of a video token (more than one with DeepStack).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from experiments.tiny_base.lessons import KINDS, Footage
from tartvg.data.scene import COLOURS, SHAPES
from tartvg.policy.families.family import family_of
from tartvg.policy.patches import MERGE, TEMPORAL_PATCH, patchify

TOKENS_PER_GRID = 4
"""Two by two merged patches: 56 x 56 or 64 x 64 pixels."""


def tower_features(model: Any, frames: np.ndarray) -> Tensor:
    """Features of frames (F, side, side, 3): float32 (F / 2, K, 4, H)."""
    family = family_of(model.config.model_type)
    patches, grid = patchify(frames, family.patch_form)
    assert grid[1] * grid[2] == TOKENS_PER_GRID * MERGE**2, f"{frames.shape} is not {2 * family.patch_form.side} wide"
    features = family.encode_video(model.model, patches, torch.tensor([grid]))
    return torch.stack([x.view(grid[0], TOKENS_PER_GRID, -1) for x in features], dim=1)


class TowerLoss(torch.nn.Module):
    """What is on the picture: by a linear head of its own, and by similarity with the embeddings of the words."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        hidden = model.config.text_config.hidden_size
        count = family_of(model.config.model_type).num_features(model.config)
        kinds = TEMPORAL_PATCH * len(KINDS)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(TOKENS_PER_GRID * hidden, kinds) for _ in range(count))
        self.scale = torch.nn.Parameter(torch.tensor(5.0))
        self.offset = torch.nn.Parameter(torch.tensor(-2.0))
        self.words = [single_token(tokenizer, f" {w}") for w in (*COLOURS, *SHAPES)]

    def forward(self, model: Any, features: Tensor, seen: Tensor) -> Tensor:
        """features (N, K, 4, H); seen (N, 2, 18). Returns the loss, each feature on its own."""
        levels = [self._of_level(model, x, head, seen) for x, head in zip(features.unbind(1), self.heads, strict=True)]
        return torch.stack(levels).mean()

    def _of_level(self, model: Any, features: Tensor, head: torch.nn.Module, seen: Tensor) -> Tensor:
        exact = bce(head(features.flatten(1)), seen.flatten(1))
        embeddings = model.get_input_embeddings().weight[self.words]
        cosine = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(embeddings, dim=-1).T
        words = (cosine * self.scale + self.offset).amax(dim=1)
        table = seen.amax(dim=1).view(-1, len(COLOURS), len(SHAPES))
        named = torch.cat([table.amax(dim=2), table.amax(dim=1)], dim=1)
        return exact + 0.5 * bce(words, named)


def single_token(tokenizer: Any, word: str) -> int:
    """The token of a word. Raises ValueError if the tokenizer splits it."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; the corpus of the tokenizer should hold it")
    return int(ids[0])


def grids_of(footage: Sequence[Footage]) -> tuple[np.ndarray, np.ndarray]:
    """All grid steps of the footage: uint8 (N, 2, side, side, 3) and float32 (N, 2, 18)."""
    frames = np.concatenate([f.frames.reshape(-1, TEMPORAL_PATCH, *f.frames.shape[1:]) for f in footage])
    seen = np.concatenate([f.seen.reshape(-1, TEMPORAL_PATCH, len(KINDS)) for f in footage])
    return frames, seen


def tower_step(model: Any, loss: TowerLoss, frames: np.ndarray, seen: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The loss on 256 random grid steps, mirrored half the time."""
    chosen = rng.integers(len(frames), size=256)
    picked = frames[chosen]
    if rng.random() < 0.5:
        picked = picked[:, :, :, ::-1]
    features = tower_features(model, np.ascontiguousarray(picked.reshape(-1, *frames.shape[2:])))
    return loss(model, features, torch.from_numpy(seen[chosen]))


@torch.no_grad()
def tower_accuracy(model: Any, loss: TowerLoss, frames: np.ndarray, seen: np.ndarray) -> float:
    """Share of grid steps whose 36 labels are all right."""
    features = tower_features(model, frames.reshape(-1, *frames.shape[2:]))
    guess = loss.heads[0](features[:, 0].flatten(1)) > 0
    return float((guess == (torch.from_numpy(seen).flatten(1) > 0.5)).all(dim=1).float().mean())
