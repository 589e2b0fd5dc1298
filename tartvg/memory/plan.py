"""Does a plan fit? The memory of each GPU, before the start: what is kept, what each phase adds, and what to change.

What a process needs comes from `tartvg.memory.footprint`, measured on the policy's own code. This file divides it over
the processes as each strategy does. Three numbers are assumptions that no CPU can check, and are shown as such:
`RUNTIME_BYTES` for the context of a GPU and the workspaces of its libraries, with `NCCL_BYTES` for its channels to
other GPUs, and `FRAGMENTATION` for the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tartvg.config import Config, SettingError, Strategy, TrainerConfig
from tartvg.memory.footprint import TEXT_TOKENS, Footprint, Load, model_config, most_tokens, trace
from tartvg.policy.families.family import family_of

GIB = 2**30
USUAL_GIB = 80e9 / GIB
"""Of a GPU that is sold with 80 GB; its memory in GiB."""
RUNTIME_BYTES = int(1.5 * GIB)
NCCL_BYTES = GIB
FRAGMENTATION = 0.05
PHASES = ("vision", "sample", "update")


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU (or of the one process on a CPU)."""

    trainer: TrainerConfig
    kept: dict[str, int]
    """What is there all the time, by kind."""
    added: dict[str, int]
    """What each phase adds to it."""
    overhead: int
    spared: int = 0
    """How much less the update needs when it takes one completion at a time."""

    @property
    def peak(self) -> int:
        """The largest phase with everything that is kept."""
        return sum(self.kept.values()) + max(self.added.values()) + self.overhead

    @property
    def least(self) -> int:
        """The largest phase when groups that do not fit are computed in parts: slower, and the same numbers.

        Under ZeRO-3 an update cannot be tried again, so nothing is spared there.
        """
        if self.trainer.strategy.zero_stage == 3:
            return self.peak
        added = {**self.added, "update": self.added["update"] - self.spared}
        return sum(self.kept.values()) + max(added.values()) + self.overhead


def load_of(config: Config) -> Load:
    """The largest step that these settings allow."""
    processes = config.trainer.devices * config.trainer.num_nodes
    family = family_of(model_config(config.policy).model_type)
    video_tokens, stamp_tokens = most_tokens(config.policy.frames, family)
    return Load(
        prompt_tokens=video_tokens + stamp_tokens + TEXT_TOKENS,
        text_tokens=stamp_tokens + TEXT_TOKENS,
        num_prompts=-(-config.grpo.prompts_per_step // processes),
        group_size=config.grpo.group_size,
        new_tokens=config.grpo.sampling.max_new_tokens,
        has_reference=True,
        at_once=config.grpo.sampling_batch_size,
        rows_per_pass=config.grpo.rows_per_pass,
    )


def plan_of(footprint: Footprint, trainer: TrainerConfig, feature_cache_gib: float) -> Plan:
    """The footprint under a strategy.

    ZeRO-2 splits gradients and optimiser state; ZeRO-3 the weights too, but gathers them for everything without
    gradient, and two blocks at a time (one in use, one prefetched) in the update.
    """
    processes = trainer.devices * trainer.num_nodes
    is_zero, are_weights_split = trainer.strategy.zero_stage > 0, trainer.strategy.zero_stage == 3
    split = processes if is_zero else 1
    on_device = 0 if trainer.strategy.is_offloaded else 1
    cached = int(feature_cache_gib * GIB)  # in main memory, which is a CPU's own
    kept = {
        "weights": footprint.weights // processes * on_device if are_weights_split else footprint.weights,
        "adapter": footprint.adapter + footprint.reference,
        "gradients": footprint.adapter // split,
        "summed": 0 if are_weights_split else footprint.adapter,  # of this rank, before the exchange
        "optimizer": (2 + is_zero) * footprint.adapter // split * on_device,
        "buckets": footprint.adapter * (0 if trainer.strategy is Strategy.single else 2 if is_zero else 1),
        "features": footprint.features if trainer.accelerator == "gpu" else max(footprint.features, cached),
    }
    gathered = footprint.weights - kept["weights"] if are_weights_split else 0
    added = {
        "vision": footprint.vision + gathered,
        "sample": footprint.sample + gathered,
        "update": footprint.update + (2 * footprint.largest_block if are_weights_split else 0),
    }
    overhead = runtime_of(trainer)
    if trainer.accelerator == "gpu":
        overhead += int(FRAGMENTATION * (sum(kept.values()) + max(added.values())))
    return Plan(trainer, kept, added, overhead, footprint.update - footprint.update_one)


def runtime_of(trainer: TrainerConfig) -> int:
    """Bytes that a GPU's libraries take beside all tensors."""
    if trainer.accelerator != "gpu":
        return 0
    return RUNTIME_BYTES + (NCCL_BYTES if trainer.devices * trainer.num_nodes > 1 else 0)


def estimate(config: Config) -> Plan:
    """The plan of these settings."""
    return plan_of(trace(config.policy, load_of(config)), config.trainer, config.policy.feature_cache_gib)


def describe(plan: Plan) -> str:
    """The plan as lines of text, in GiB."""
    trainer = plan.trainer
    where = "GPU" if trainer.accelerator == "gpu" else "process"
    count = trainer.devices * trainer.num_nodes
    lines = [f"memory of each {where} ({trainer.strategy.value}, {count} in all), estimated for the largest step:"]
    lines += [f"  {name:<10}{size / GIB:9.3f} GiB" for name, size in plan.kept.items() if size]
    lines += [f"  + {name:<8}{size / GIB:9.3f} GiB while it runs" for name, size in plan.added.items()]
    if plan.overhead:
        lines.append(f"  + overhead{plan.overhead / GIB:9.3f} GiB assumed: context, workspaces, NCCL, fragmentation")
    lines.append(f"  peak      {plan.peak / GIB:9.3f} GiB")
    if plan.least < plan.peak:
        lines.append(f"  or        {plan.least / GIB:9.3f} GiB with large groups computed in parts, which is slower")
    return "\n".join(lines)


def check(config: Config, limit_bytes: int) -> Plan:
    """The plan, where it fits. Raises SettingError with the changes that would make it fit, each tried."""
    plan = estimate(config)
    if plan.least <= limit_bytes:
        return plan
    helps = [label for label, changed in changes(config) if estimate(changed).least <= limit_bytes]
    advice = "; ".join(helps) or "none of the usual single changes suffices, combine them"
    raise SettingError(
        f"{describe(plan)}\nThat is more than the {limit_bytes / GIB:.1f} GiB there are (trainer.memory_gib). "
        f"Would fit, each alone: {advice}"
    )


def changes(config: Config) -> Iterator[tuple[str, Config]]:
    """(what to type, the settings with that change): single changes, the least painful first."""
    grpo, frames = config.grpo, config.policy.frames
    if grpo.sampling_batch_size != 1:
        yield "grpo.sampling_batch_size=1", replace(config, grpo=replace(grpo, sampling_batch_size=1))
    rows = config.grpo.rows_per_pass or grpo.group_size
    while rows > 1:
        rows //= 2
        yield f"grpo.rows_per_pass={rows}", replace(config, grpo=replace(grpo, rows_per_pass=rows))
    for factor in (2, 4):
        prompts = max(1, grpo.prompts_per_step // factor)
        yield f"grpo.prompts_per_step={prompts}", replace(config, grpo=replace(grpo, prompts_per_step=prompts))
        group = max(2, grpo.group_size // factor)
        yield f"grpo.group_size={group}", replace(config, grpo=replace(grpo, group_size=group))
        tokens = max(1, grpo.sampling.max_new_tokens // factor)
        shorter = replace(grpo, sampling=replace(grpo.sampling, max_new_tokens=tokens))
        yield f"grpo.sampling.max_new_tokens={tokens}", replace(config, grpo=shorter)
        most = max(2, frames.max_frames // factor)
        pixels = max(frames.min_pixels, frames.total_pixels // factor)
        fewer = replace(frames, max_frames=most, min_frames=min(frames.min_frames, most), total_pixels=pixels)
        label = f"policy.frames.max_frames={most} policy.frames.total_pixels={pixels}"
        yield label, replace(config, policy=replace(config.policy, frames=fewer))
    if config.trainer.devices * config.trainer.num_nodes > 1:
        for strategy in Strategy:
            if strategy not in (Strategy.single, config.trainer.strategy):
                yield (
                    f"trainer={strategy.value}",
                    replace(config, trainer=replace(config.trainer, strategy=strategy)),
                )


def table(config: Config, limit_gib: float = USUAL_GIB) -> str:
    """The policy of `config` on 4, 8 and 16 GPUs under every strategy that trains on several; GiB per GPU."""
    strategies = [s for s in Strategy if s is not Strategy.single]
    lines = [
        f"{config.policy.name}: GiB per GPU at the peak (of {limit_gib:.3g}), prompts of "
        f"{load_of(config).prompt_tokens} tokens, {config.grpo.group_size} completions of "
        f"{config.grpo.sampling.max_new_tokens}, {config.grpo.prompts_per_step} prompts a step",
        f"  {'GPUs':<6}" + "".join(f"{s.value:>16}" for s in strategies),
    ]
    for count in (4, 8, 16):
        trainer = replace(config.trainer, accelerator="gpu", devices=count, strategy=Strategy.ddp)
        footprint = trace(config.policy, load_of(replace(config, trainer=trainer)))
        cells = []
        for strategy in strategies:
            plan = plan_of(footprint, replace(trainer, strategy=strategy), config.policy.feature_cache_gib)
            fits = plan.peak <= limit_gib * GIB
            cells.append(f"{plan.peak / GIB:.1f}{' ok' if fits else ' NO'}")
        lines.append(f"  {count:<6}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)
