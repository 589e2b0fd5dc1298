"""Attention to a prompt that is stored once: the numbers of attention over copies, and no copies."""

import dataclasses

import pytest
import torch

from tartvg.config import SamplingConfig
from tartvg.policy import prefix_attention
from tartvg.policy.policy import token_batch
from tartvg.policy.prefix_attention import can_join, copied_attention, is_exact, joined_attention

CPU = torch.device("cpu")


def tensors(group, heads, kv_heads, before, own, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(group + before)
    shapes = [(group, heads, own, width), *[(1, kv_heads, before, width)] * 2, *[(group, kv_heads, own, width)] * 2]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    return leaves, torch.randn(shapes[0], generator=generator, dtype=torch.float64).to(dtype)


def values_and_gradients(attend, leaves, weight, scale=0.3):
    out = attend(*leaves, scale)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize(
    "shape",
    [
        (8, 8, 2, 128, 16, 32),
        (2, 4, 4, 1, 1, 16),  # one token each
        (1, 6, 1, 7, 33, 8),  # a group of one, every head reading the same key
        (3, 28, 4, 65, 5, 128),  # the 7B's heads
    ],
)
def test_joined_attention_is_attention_over_copies_in_values_and_gradients(shape):
    """Both round, and how far depends on the processor's kernels: the same sums in fp32 are the measure."""
    leaves, weight = tensors(*shape)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = values_and_gradients(copied_attention, exact, weight.double())
    copied = values_and_gradients(copied_attention, leaves, weight)
    for found, same, true in zip(values_and_gradients(joined_attention, leaves, weight), copied, expected, strict=True):
        assert (found - true).norm() <= 2 * (same - true).norm() + 1e-6 * true.norm()


def test_a_query_that_only_sees_its_own_token_gets_its_value():
    """Scores so far apart that either part's weight vanishes: no overflow on the way."""
    leaves, _ = tensors(2, 2, 1, 4, 1, 8)
    query, prompt_key, prompt_value, key, value = (x.detach() for x in leaves)
    query, prompt_key, key = torch.ones_like(query), torch.full_like(prompt_key, -100.0), torch.full_like(key, 100.0)
    own = joined_attention(query, prompt_key, prompt_value, key, value, 1.0)
    assert torch.equal(own, value.expand_as(own))
    prompt = joined_attention(query, -prompt_key, prompt_value, -key, value, 1.0)
    assert torch.allclose(prompt, prompt_value.mean(dim=2, keepdim=True).expand_as(prompt), atol=1e-6)


@pytest.mark.parametrize(("width", "repeats"), [(64, 2), (128, 7), (128, 8), (32, 1)])
def test_kernels_agree_at_the_widths_and_head_ratios_of_our_policies(width, repeats):
    assert is_exact(CPU, torch.float32, width, repeats) and is_exact(CPU, torch.bfloat16, width, repeats)


@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_kernels_are_used_where_they_agree_only_and_the_reason_is_said_once(monkeypatch, capsys, fault):
    forward, backward = prefix_attention.KERNELS["cpu"]

    def wrong(*args):
        of_query, of_key, of_value = backward(*args)
        return of_query, of_key * 1.001, of_value

    def missing(*args):
        raise AttributeError("no such kernel\nand more about it")

    reason = {"wrong": "it is off by 1", "missing": "AttributeError: no such kernel\n"}[fault]
    monkeypatch.setitem(prefix_attention.KERNELS, "cpu", (forward, wrong) if fault == "wrong" else (missing, backward))
    is_exact.cache_clear()
    assert not any(is_exact(CPU, torch.float32, 64, 2) for _ in range(3))
    is_exact.cache_clear()
    said = capsys.readouterr().out
    assert said.count("attention on cpu in float32: completions attend to copies of their prompt") == 1
    assert reason in said and len(said.splitlines()) == 1


def test_a_device_without_kernels_is_named(capsys):
    assert not is_exact(torch.device("meta"), torch.float32, 64, 2)
    assert "attention on meta" in capsys.readouterr().out


def test_the_question_is_about_the_policys_own_heads(policy, monkeypatch):
    asked = []
    monkeypatch.setattr(prefix_attention, "is_exact", lambda *args: asked.append(args))
    attention, heads = policy.language_model.layers[0].self_attn, policy.language_model.config.num_attention_heads
    can_join(policy.language_model, torch.zeros(1))
    assert asked == [(CPU, torch.float32, attention.head_dim, attention.num_key_value_groups)]
    assert heads > attention.num_key_value_groups


@pytest.mark.parametrize("is_saving", [False, True])
def test_without_the_kernels_the_numbers_are_the_same(policy, prompts, monkeypatch, is_saving):
    """The way over copies, for devices where no kernel can be trusted."""
    policy.settings = dataclasses.replace(policy.settings, activation_checkpointing=is_saving)
    item = policy.prepare(prompts[0])
    batch = token_batch(policy.sample([item], 3, SamplingConfig(max_new_tokens=9), [1])[0], policy.device)
    found = []
    for is_joined in (True, False):
        monkeypatch.setattr(prefix_attention, "is_exact", lambda *_, is_joined=is_joined: is_joined)
        logps = policy.logps(item, batch)
        policy.zero_grad()
        logps.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        found.append((logps.detach(), grads))
    (logps, grads), (expected, expected_grads) = found
    assert (logps - expected).abs().max() <= 1e-5
    assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()


def test_nothing_is_kept_that_grows_with_group_times_prompt(policy, prompts, monkeypatch):
    """Bytes between forward and backward: a longer prompt costs the same with 8 completions as with 1."""
    item = policy.prepare(prompts[0])
    completion = policy.sample([item], 2, SamplingConfig(max_new_tokens=5), [1])[0][0]

    def kept(rows):
        held = {}

        def note(tensor):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = token_batch([completion] * rows, policy.device)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = policy.logps(item, batch).sum()
        del loss
        return sum(held.values())

    joined = kept(8) - kept(1)
    monkeypatch.setattr(prefix_attention, "is_exact", lambda *_: False)
    copied = kept(8) - kept(1)
    share = item.inputs.length / len(completion.token_ids)
    assert share > 20 and joined < copied / 4
