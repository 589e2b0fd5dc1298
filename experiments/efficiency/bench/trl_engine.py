"""TRL's GRPO on the same weights and rollouts: its own forward passes and loss, without its sampling.

TRL takes images, not videos. A video of one grid step is an image to the model: the same patches, the same positions,
only another placeholder token, and that one is replaced by the features. So both sides compute the same function, and
`agreement` proves it before anything is timed. The calls below are private to TRL 1.16.0, which is why the optional
dependency `tartvg[bench]` pins it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.efficiency.bench.ways import LOSS, SHARED, Group, gradient, learn, reference
from tartvg.policy.policy import Policy

VERSION = "1.16.0"


def make_trainer(policy: Policy, group: int, completion: int, folder: Path) -> Any:
    """A GRPOTrainer around the policy's model, with our loss: textbook GRPO with k3 and the plain gradient of it."""
    import trl
    from datasets import Dataset

    if trl.__version__ != VERSION:
        raise RuntimeError(f"these private calls are TRL {VERSION}'s, found {trl.__version__}")
    settings = trl.GRPOConfig(
        output_dir=str(folder), use_cpu=policy.device.type == "cpu", bf16=False, gradient_checkpointing=False,
        report_to=[], beta=0.0, loss_type="grpo", epsilon=LOSS.clip_low, epsilon_high=LOSS.clip_high,
        use_bias_correction_kl=False, num_generations=group, per_device_train_batch_size=group,
        max_completion_length=completion, temperature=1.0, seed=0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * group),
        processing_class=policy.tokenizer,
    )
    trainer.beta = LOSS.kl_coef  # set afterwards: TRL would copy the adapter, and the base is our reference
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_inputs(policy: Policy, group: Group) -> dict[str, Any]:
    """The dict that TRL's loss takes, with the video as an image."""
    rows, completion = group.tokens.ids.shape
    if group.clip.grid_thw[0] != 1:
        raise ValueError(f"TRL takes images: one grid step, got {group.clip.grid_thw[0]}")
    inputs, device = group.item.inputs, policy.device
    ids = torch.where(inputs.is_video, policy.core.config.image_token_id, inputs.ids).to(device)
    prompt_ids = ids[None].repeat(rows, 1)
    kinds = torch.cat([inputs.is_video.long(), torch.zeros(completion, dtype=torch.long)]).to(device)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": group.tokens.ids,
        "completion_mask": group.tokens.mask.long(),
        "advantages": group.advantages,
        "old_per_token_logps": group.tokens.logps,
        "num_items_in_batch": group.tokens.mask.sum(),
        "pixel_values": group.clip.patches.to(device).repeat(rows, 1),
        "image_grid_thw": torch.tensor([group.clip.grid_thw] * rows, device=device),
        "num_images": [1] * rows,
        "mm_token_type_ids": kinds[None].repeat(rows, 1),
    }


def trl_logps(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities of the completions as TRL computes them: (G, C)."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    passed = {name: inputs[name] for name in names}
    logps: Tensor = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, inputs["completion_ids"].shape[1], **passed
    )[0]
    return logps


def trl_reference(policy: Policy, trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """The same under the reference."""
    with policy.as_reference():
        return trl_logps(trainer, inputs)


def trl_learn(policy: Policy, trainer: Any, inputs: dict[str, Any], reference_GT: Tensor) -> Tensor:
    """TRL's loss and its backward pass; gradients are left in place. Returns the loss."""
    policy.zero_grad()
    loss: Tensor = trainer._compute_loss(trainer.model, {**inputs, "ref_per_token_logps": reference_GT})
    loss.backward()
    return loss.detach()


def trl_update(policy: Policy, trainer: Any, inputs: dict[str, Any]) -> None:
    """What one group costs in TRL's update: reference and policy, forward and backward."""
    trl_learn(policy, trainer, inputs, trl_reference(policy, trainer, inputs))


@dataclass(frozen=True)
class Agreement:
    """How far two engines are apart on one group."""

    logps: float
    """Largest difference of a token's log-probability."""
    gradient: float
    """Norm of the gradients' difference over the gradient's norm."""
    parameters: float
    """The same for what one AdamW step changes."""

    def check(self, limit: float = 1e-5) -> None:
        """Raise unless log-probabilities and gradients agree to `limit`, and the changed parameters to 100 times it.

        AdamW's first step is the sign of the gradient: it magnifies the rounding of entries near zero.
        """
        if not (self.logps <= limit and self.gradient <= limit and self.parameters <= 100 * limit):
            raise RuntimeError(f"the engines do not compute the same: {self}")


def agreement(policy: Policy, trainer: Any, group: Group) -> Agreement:
    """Compare one whole step of both engines. The policy's weights are the same afterwards."""
    inputs = trl_inputs(policy, group)
    ours = learn(policy, group, SHARED, reference(policy, group, SHARED))
    our_gradient, our_change = gradient(policy), _step(policy)
    with torch.no_grad():
        theirs = trl_logps(trainer, inputs)
    trl_update(policy, trainer, inputs)
    their_gradient, their_change = gradient(policy), _step(policy)
    return Agreement(
        float((ours - theirs).abs().max()),
        float((our_gradient - their_gradient).norm() / their_gradient.norm()),
        float((our_change - their_change).norm() / their_change.norm()),
    )


def _step(policy: Policy, lr: float = 1e-3) -> Tensor:
    """What one step of AdamW adds to the trainable weights; they are put back."""
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    before = copy.deepcopy([p.detach() for p in weights])
    torch.optim.AdamW(weights, lr=lr, weight_decay=0.0).step()
    change = torch.cat([(p.detach() - b).flatten() for p, b in zip(weights, before, strict=True)])
    for parameter, old in zip(weights, before, strict=True):
        parameter.data.copy_(old)
    return change
