"""Which groups can keep their activations, for `policy.activation_checkpointing: auto`.

The memory of an update without recomputation is traced for four sizes of a group, at the corners of what the settings
allow, and interpolated between them. It depends on the number of tokens only, never on what happens to be free: the
reference pass and the update of a group must take the same way, or their KL would not be zero at the start.

Legend: L prompt tokens, N completion tokens of a group, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tartvg.config import Config
from tartvg.memory.footprint import update_bytes
from tartvg.memory.plan import FRAGMENTATION, GIB, estimate, load_of, runtime_of


@dataclass(frozen=True)
class WholeUpdates:
    """Bytes of an update that keeps all activations, by the size of its group."""

    budget: float
    """What there is beside weights, optimiser and runtime."""
    lengths: tuple[float, float]
    """L of the shortest and of the longest prompt that were traced."""
    tokens: tuple[float, float]
    """N of the smallest and of the largest group."""
    corners: tuple[float, float, float, float]
    """Bytes at (short, few), (short, many), (long, few) and (long, many)."""

    def bytes(self, num_prompt: int, num_completion: int) -> float:
        """Interpolate; a smaller group counts as the smallest, a larger one is extrapolated."""
        x, y = _share(num_prompt, self.lengths), _share(num_completion, self.tokens)
        short = self.corners[0] * (1 - y) + self.corners[1] * y
        long = self.corners[2] * (1 - y) + self.corners[3] * y
        return short * (1 - x) + long * x

    def __call__(self, num_prompt: int, num_completion: int) -> bool:
        """Return whether the group fits."""
        return self.bytes(num_prompt, num_completion) <= self.budget

    def __str__(self) -> str:
        need, has = self.bytes(int(self.lengths[1]), int(self.tokens[1])) / GIB, self.budget / GIB
        which = "no group runs its layers twice" if need <= has else "groups that need more run their layers twice"
        return (
            f"policy.activation_checkpointing=auto: activations of the largest group take {need:.1f} GiB of the "
            f"{has:.1f} GiB there are for them: {which}"
        )


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return max(0.0, value - low) / max(1.0, high - low)


def whole_updates(config: Config, limit_bytes: int) -> WholeUpdates:
    """Trace the four corners under these settings on a device of so many bytes. Seconds for a released model."""
    settings, most = replace(config.policy, activation_checkpointing=False), load_of(config)
    kept = sum(estimate(config).kept.values())
    fragmentation = FRAGMENTATION if config.trainer.accelerator == "gpu" else 0.0
    budget = (limit_bytes - runtime_of(config.trainer)) / (1 + fragmentation) - kept
    # The head's logits grow with the tokens up to a chunk and are constant beyond: the smallest group fills one.
    few = min(most.new_tokens, -(-settings.logit_chunk // most.group_size))
    short = max(1, most.prompt_tokens // 8)
    sizes = [(length, new) for length in (short, most.prompt_tokens) for new in (few, most.new_tokens)]
    loads = [replace(most, prompt_tokens=length, new_tokens=new, rows_per_pass=None) for length, new in sizes]
    corners = tuple(float(update_bytes(settings, load)) for load in loads)
    assert len(corners) == 4
    tokens = (float(few * most.group_size), float(most.new_tokens * most.group_size))
    return WholeUpdates(budget, (float(short), float(most.prompt_tokens)), tokens, corners)
