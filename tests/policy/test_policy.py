"""Shared prefix against the naive oracle, sampling against the loss, positions against their definition."""

import dataclasses

import pytest
import torch
from helpers.policies import with_moved_adapter

from experiments.tiny_base import model as tiny
from tartvg.config import FramesConfig, LoraConfig, PolicyConfig, SamplingConfig
from tartvg.data.planted import encode
from tartvg.data.scene import RULES, make_scene
from tartvg.policy.policy import Policy, token_batch
from tartvg.types import GroundingSample, Prompt, Span

CORPUS = ["<think> <timestamp>1.00 to 2.00</timestamp> </think><answer>1.00 to 2.00</answer> find the red circle"] * 3


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """An untrained tiny model in Hugging Face format."""
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny.build_tiny(CORPUS, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(base_folder):
    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    return PolicyConfig(name="t", path=str(base_folder), frames=frames, lora=LoraConfig(rank=4), logit_chunk=7)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Three prompts of unequal length on three videos."""
    folder = tmp_path_factory.mktemp("videos")
    made = []
    for seed, text in ((1, "find it"), (2, "when is the red circle here, and until when?"), (3, "where")):
        scene = make_scene(seed, RULES["planted"])
        video = folder / f"{seed}.mp4"
        encode(video, scene)
        sample = GroundingSample(str(seed), video, text, (Span(1, 2),), scene.duration, "train")
        made.append(Prompt(sample, text))
    return made


@pytest.fixture
def policy(settings):
    """A policy whose adapter is not the identity."""
    return with_moved_adapter(Policy(settings, seed=1))


def completions(policy, prompts, group_size=4, tokens=12, seed=0):
    prepared = [policy.prepare(p) for p in prompts]
    sampling = SamplingConfig(max_new_tokens=tokens)
    return prepared, policy.sample(prepared, group_size, sampling, [seed + i for i in range(len(prepared))])


def unequal(group):
    """The same completions cut to different lengths."""
    return [
        dataclasses.replace(c, token_ids=c.token_ids[: 3 * i + 2], logps=c.logps[: 3 * i + 2])
        for i, c in enumerate(group)
    ]


def test_recorded_logps_equal_the_recomputed_ones(policy, prompts):
    prepared, groups = completions(policy, prompts)
    for item, group in zip(prepared, groups, strict=True):
        batch = token_batch(group, policy.device)
        again = policy.logps(item, batch)
        assert (again - batch.logps)[batch.mask].abs().max() <= 1e-5


def test_shared_prefix_equals_naive_in_logps_and_gradients(policy, prompts):
    prepared, groups = completions(policy, prompts)
    weights = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    results = {}
    for shared in (True, False):
        policy.settings = dataclasses.replace(policy.settings, shared_prefix=shared)
        policy.zero_grad()
        values = []
        for item, group in zip(prepared, groups, strict=True):
            batch = token_batch(unequal(group), policy.device)
            logps = policy.logps(item, batch)
            (logps * weights[:, : logps.shape[1]]).sum().backward()
            values.append(logps.detach().flatten())
        grads = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])
        results[shared] = torch.cat(values), grads
    assert results[False][1].norm() > 0
    assert (results[True][0] - results[False][0]).abs().max() <= 1e-5
    assert (results[True][1] - results[False][1]).norm() / results[False][1].norm() <= 1e-5


def test_a_fresh_policy_is_exactly_its_reference(settings, prompts):
    policy = Policy(settings, seed=3)
    prepared, groups = completions(policy, prompts[:1])
    batch = token_batch(groups[0], policy.device)
    with policy.as_reference():
        reference = policy.logps(prepared[0], batch)
    assert torch.equal(policy.logps(prepared[0], batch).detach(), reference)


def test_the_reference_of_a_continued_adapter_is_that_adapter(policy, settings, prompts, tmp_path):
    from tartvg.policy.loading import save_adapter

    save_adapter(policy.model, tmp_path, "base")
    continued = Policy(settings, adapter=tmp_path)
    prepared, groups = completions(policy, prompts[:1])
    batch = token_batch(groups[0], policy.device)
    expected = policy.logps(prepared[0], batch).detach()
    for name, parameter in continued.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += 0.1
    item = continued.prepare(prompts[0])
    with continued.as_reference():
        reference = continued.logps(item, batch)
    assert torch.allclose(reference, expected, atol=1e-6)
    assert (continued.logps(item, batch) - expected).abs().max() > 1e-3
    assert any(p.requires_grad for p in continued.model.parameters())


def test_the_reference_knows_no_dropout(settings, prompts, tmp_path):
    from tartvg.config import LoraConfig
    from tartvg.policy.loading import save_adapter

    settings = dataclasses.replace(settings, lora=LoraConfig(rank=4, dropout=0.5))
    first = Policy(settings, seed=1)
    for name, parameter in first.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    save_adapter(first.model, tmp_path, "base")
    policy = Policy(settings, adapter=tmp_path).train()
    prepared, groups = completions(policy, prompts[:1])
    batch = token_batch(groups[0], policy.device)
    passes = []
    for _ in range(2):
        with policy.as_reference():
            passes.append(policy.logps(prepared[0], batch))
    assert torch.equal(*passes) and policy.training
    assert not torch.equal(policy.logps(prepared[0], batch).detach(), passes[0]), "the policy itself has dropout"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "no safetensors"])
def test_an_adapter_that_does_not_fit_is_refused(policy, settings, tmp_path, damage):
    """PEFT would leave what is missing as it was born."""
    from safetensors.torch import load_file, save_file

    from tartvg.policy.loading import save_adapter

    save_adapter(policy.model, tmp_path, "base")
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    if damage == "missing":
        del weights[name]
    if damage == "unexpected":
        weights[name.replace("layers.0", "layers.99")] = weights[name].clone()
    save_file(weights, file)
    if damage == "no safetensors":
        file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as e:
        Policy(settings, adapter=tmp_path)
    assert damage == "no safetensors" or damage in str(e.value)


def test_a_checkpoint_of_another_adapter_is_refused(policy):
    from tartvg.training.checkpoint import adapter_weights, restore_adapter

    weights = adapter_weights(policy.model)
    restore_adapter(policy.model, weights)
    first = sorted(weights)[0]
    others = {
        "missing": {k: v for k, v in weights.items() if k != first},
        "unexpected": {**weights, "x": weights[first]},
    }
    for kind, other in others.items():
        with pytest.raises(ValueError, match=f"the checkpoint: {kind} weights"):
            restore_adapter(policy.model, other)


def test_a_group_does_not_depend_on_its_neighbours(policy, prompts):
    _, together = completions(policy, prompts)
    prepared = policy.prepare(prompts[1])
    alone = policy.sample([prepared], 4, SamplingConfig(max_new_tokens=12), [1])
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[1]]


def test_vision_tokens_are_never_sampled(policy, prompts):
    prepared = [policy.prepare(p) for p in prompts]
    groups = policy.sample(prepared, 32, SamplingConfig(max_new_tokens=40, temperature=5.0), [0, 1, 2])
    seen = {t for group in groups for c in group for t in c.token_ids}
    assert len(seen) > 100
    assert not seen & set(policy.banned)
    assert len(policy.banned) == 5


def test_the_tower_runs_once_per_video(policy, prompts):
    calls = []
    policy.core.model.visual.register_forward_hook(lambda *_: calls.append(1))
    prepared, groups = completions(policy, prompts)
    for item, group in zip(prepared, groups, strict=True):
        batch = token_batch(group, policy.device)
        policy.logps(item, batch)
        with policy.as_reference():
            policy.logps(item, batch)
    completions(policy, prompts)
    assert len(calls) == len(prompts)


def test_a_missing_weight_is_an_error(base_folder, settings, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(base_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight")))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys"):
        Policy(dataclasses.replace(settings, path=str(broken)))
