"""The three ways to a group's log-probabilities: naive, shared prefix, memory-saving. One set of numbers."""

import dataclasses

import pytest
import torch

from tartvg.config import FramesConfig, KlEstimator, LoraConfig, PolicyConfig, SamplingConfig, SettingError
from tartvg.data.planted import encode
from tartvg.data.scene import RULES, make_scene
from tartvg.grpo import LossInputs, LossSettings, grpo_loss
from tartvg.policy.loading import save_adapter
from tartvg.policy.policy import Policy, token_batch
from tartvg.policy.prefix_attention import is_exact
from tartvg.types import GroundingSample, Prompt, Span

WAYS = {
    "naive": dict(shared_prefix=False),
    "shared": dict(),
    "memory-saving": dict(activation_checkpointing=True),
}


@pytest.fixture(scope="module")
def settings(untrained_base):
    frames = FramesConfig(min_frames=4, max_frames=96, min_pixels=3136, max_pixels=3136)
    return PolicyConfig(name="t", path=str(untrained_base), frames=frames, lora=LoraConfig(rank=4), logit_chunk=7)


@pytest.fixture(scope="module")
def adapter(settings, tmp_path_factory):
    """A trained adapter's stand-in: the reference of the policies below."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = Policy(settings, seed=1)
    move(policy, 0.05)
    save_adapter(policy.model, folder, "base")
    return folder


def move(policy, by):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts of unequal length on videos of unequal length."""
    folder, made = tmp_path_factory.mktemp("videos"), []
    for seed, text in ((1, "find it"), (2, "when is the red circle here, and until when?"), (3, "where")):
        scene = make_scene(seed, RULES["planted"])
        encode(folder / f"{seed}.mp4", scene)
        sample = GroundingSample(str(seed), folder / f"{seed}.mp4", text, (Span(1, 2),), scene.duration, "train")
        made.append(Prompt(sample, text))
    return made


@pytest.fixture(scope="module")
def rollouts(settings, adapter, prompts):
    """Completions of lengths 2, 5, 8 and 11 that a slightly different policy drew."""
    policy = Policy(settings, adapter)
    groups = policy.sample([policy.prepare(p) for p in prompts], 4, SamplingConfig(max_new_tokens=11), [7, 8, 9])
    return [
        [
            dataclasses.replace(c, token_ids=c.token_ids[: 3 * i + 2], logps=c.logps[: 3 * i + 2])
            for i, c in enumerate(group)
        ]
        for group in groups
    ]


def step(settings, adapter, prompts, rollouts, way):
    """Log-probabilities, reference and gradient of a whole GRPO step with a KL penalty."""
    policy = Policy(dataclasses.replace(settings, **WAYS[way]), adapter)
    move(policy, 0.02)
    policy.train()
    found = []
    for prompt, group in zip(prompts, rollouts, strict=True):
        item, batch = policy.prepare(prompt), token_batch(group, policy.device)
        with policy.as_reference():
            reference = policy.logps(item, batch, 0.9)
        logps = policy.logps(item, batch, 0.9)
        advantages = torch.tensor([1.0, -0.5, -1.5, 1.0])[:, None]
        inputs = LossInputs(logps, batch.logps, reference, advantages, batch.mask)
        grpo_loss(inputs, LossSettings(kl_coef=0.5, kl_estimator=KlEstimator.k3)).loss.backward()
        found += [logps.detach().flatten(), reference.flatten()]
    grads = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])
    return torch.cat(found), grads


def test_all_ways_agree_on_unequal_lengths_with_lora_and_a_reference_adapter(settings, adapter, prompts, rollouts):
    values = {way: step(settings, adapter, prompts, rollouts, way) for way in WAYS}
    logps, grads = values["naive"]
    assert grads.norm() > 0 and len({len(c.token_ids) for g in rollouts for c in g}) == 4
    for way in ("shared", "memory-saving"):
        assert (values[way][0] - logps).abs().max() <= 1e-5, way
        assert (values[way][1] - grads).norm() <= 1e-5 * grads.norm(), way


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 2])
def test_completions_of_one_and_two_tokens(settings, adapter, prompts, rollouts, way, length):
    cut = [[dataclasses.replace(c, token_ids=c.token_ids[:length], logps=c.logps[:length]) for c in rollouts[0]]]
    ours, grads = step(settings, adapter, prompts[:1], cut, way)
    naive, expected = step(settings, adapter, prompts[:1], cut, "naive")
    assert (ours - naive).abs().max() <= 1e-5
    assert (grads - expected).norm() <= 1e-5 * expected.norm()


def test_completions_do_not_see_one_another(settings, prompts, rollouts):
    policy = Policy(dataclasses.replace(settings, activation_checkpointing=True), seed=1)
    move(policy, 0.05)
    item = policy.prepare(prompts[0])
    together = policy.logps(item, token_batch(rollouts[0], policy.device))
    for row, completion in enumerate(rollouts[0]):
        alone = policy.logps(item, token_batch([completion], policy.device))[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-6)


def test_the_first_update_of_a_process_may_be_a_memory_saving_one(settings, prompts, rollouts):
    """Nothing that is asked once per process may be asked inside a layer that runs again in the backward pass."""
    is_exact.cache_clear()
    policy = Policy(dataclasses.replace(settings, activation_checkpointing=True), seed=1)
    policy.logps(policy.prepare(prompts[0]), token_batch(rollouts[0], policy.device)).sum().backward()


def test_the_attention_implementation_is_restored(settings, prompts, rollouts):
    policy = Policy(dataclasses.replace(settings, activation_checkpointing=True), seed=1)
    policy.logps(policy.prepare(prompts[0]), token_batch(rollouts[0], policy.device)).sum().backward()
    assert policy.language_model.config._attn_implementation == "sdpa"


def test_backward_keeps_only_the_layers_inputs(settings, prompts, rollouts):
    """Bytes that autograd holds between forward and backward: a handful of rows instead of every activation."""
    kept = {}
    for way in ("shared", "memory-saving"):
        policy = Policy(dataclasses.replace(settings, **WAYS[way]), seed=1)
        item, batch = policy.prepare(prompts[1]), token_batch(rollouts[1], policy.device)
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        held = {}

        def note(tensor, held=held, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = policy.logps(item, batch).sum()
        kept[way] = sum(held.values())
        loss.backward()
    assert kept["memory-saving"] < kept["shared"] / 8


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(SettingError, match=r"policy\.activation_checkpointing"):
        PolicyConfig(name="t", path="p", shared_prefix=False, activation_checkpointing=True)
    with pytest.raises(SettingError, match=r"policy\.attention"):
        PolicyConfig(name="t", path="p", attention="eager")
