"""The untrained tiny policy and questions for it; also for processes that a test starts."""


def planted_prompts(root):
    from tartvg.config import AnchorsConfig, PlantedConfig
    from tartvg.data.planted import load_planted
    from tartvg.prompts import build_prompt

    samples = load_planted(root, PlantedConfig(2, 1, 1, 2), "train", "planted")
    return [build_prompt(s, AnchorsConfig()) for s in samples]


def tiny_policy(base):
    from tartvg.config import FramesConfig, PolicyConfig
    from tartvg.policy.policy import Policy

    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    return Policy(PolicyConfig(name="t", path=str(base), frames=frames), seed=0)


def with_moved_adapter(policy, by=0.05, seed=5):
    """The policy with an adapter that is not the identity."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data = by * torch.randn(weight.shape, generator=generator)
    return policy


def prepared(policy, *texts):
    """Prompts of different lengths, each on its own four random frames."""
    from pathlib import Path

    import numpy as np

    from tartvg.data.video import Clip
    from tartvg.types import GroundingSample, Prompt, Span

    made = []
    for seed, text in enumerate(texts):
        frames = np.random.default_rng(seed).integers(0, 256, (4, 28, 28, 3)).astype(np.uint8)
        sample = GroundingSample(str(seed), Path("absent.mp4"), text, (Span(0, 1),), 2.0, "train")
        made.append(policy.prepare(Prompt(sample, text), Clip(frames, (0.0, 0.5, 1.0, 1.5), 2.0)))
    return made
