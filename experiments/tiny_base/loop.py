"""The loop of the tiny base's phases: a schedule, a progress line, and checkpoints to continue from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tartvg.policy.sampling import stream_seed

SAVE_EVERY = 100
StepLosses = Callable[[int, np.random.Generator], tuple[Tensor, dict[str, float]]]
"""Step number and random stream -> the loss, and the numbers to print."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 50 steps, then a cosine down to 5 %."""
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / 50) * decay


def run_phase(
    name: str,
    modules: Sequence[torch.nn.Module],
    frozen: Callable[[str], bool],
    steps: int,
    peak: float,
    seed: int,
    folder: Path,
    step_losses: StepLosses,
    horizon: float = 1.0,
) -> None:
    """Train `modules` for `steps` steps; the state after each `SAVE_EVERY` is kept in `folder/<name>.pt`.

    The learning rate decays over `horizon * steps` steps.

    Every step draws from a stream made of (seed, phase, step), so a continued phase sees the same lessons.
    """
    named = [(n, p) for module in modules for n, p in module.named_parameters()]
    parameters = [p for n, p in named if not frozen(n)]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
    path = folder / f"{name}.pt"
    first = _load(path, modules, optimizer) if path.exists() else 0
    begun, recent = time.monotonic(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, round(horizon * steps), peak)
        loss, metrics = step_losses(step, np.random.default_rng(stream_seed(seed, name, step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(metrics)
        if (step + 1) % 50 == 0:
            means = "  ".join(f"{k} {np.mean([m[k] for m in recent]):.3f}" for k in metrics)
            left = (time.monotonic() - begun) / (step + 1 - first) * (steps - step - 1)
            print(f"{name} {step + 1}/{steps}  {means}  {left / 60:.0f} min left", flush=True)
            recent = []
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(path, modules, optimizer, step + 1)


def _save(path: Path, modules: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer, step: int) -> None:
    state: dict[str, Any] = {
        "modules": [m.state_dict() for m in modules], "optimizer": optimizer.state_dict(), "step": step,
    }  # fmt: skip
    side = path.with_suffix(".part")
    torch.save(state, side)
    side.replace(path)


def _load(path: Path, modules: Sequence[torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    state = torch.load(path, weights_only=True)
    for module, weights in zip(modules, state["modules"], strict=True):
        module.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
