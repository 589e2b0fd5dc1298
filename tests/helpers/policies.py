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
