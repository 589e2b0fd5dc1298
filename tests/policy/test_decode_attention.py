"""Attention of a decoded token: the numbers of one softmax over prompt and completion, and no rounded scores."""

import dataclasses

import pytest
import torch

from tartvg.config import PolicyConfig, Precision, SamplingConfig
from tartvg.policy import decode_attention
from tartvg.policy.decode_attention import part_of, plain_part, shared_prefix_attention
from tartvg.policy.features import VideoFeatures
from tartvg.policy.kv_cache import DecodeCache, PrefixCache
from tartvg.policy.policy import Policy, PreparedPrompt, token_batch

CPU = torch.device("cpu")


@dataclasses.dataclass
class Case:
    """P prompts of given lengths, G rows each, t own tokens; H query heads read K keys of width D."""

    prompts: list
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    group: int

    def to(self, dtype):
        moved = [tuple(x.to(dtype) for x in prompt) for prompt in self.prompts]
        return Case(moved, *(x.to(dtype) for x in (self.query, self.keys, self.values)), self.group)

    def ours(self, places=None):
        prefixes = []
        for key, value in self.prompts:
            prefix = PrefixCache()
            prefix.update(key, value, 0)
            prefixes.append(prefix)
        cache = DecodeCache(prefixes, self.group, self.keys.shape[2], self.keys.shape[2])
        keys, values = self.keys, self.values
        if places is not None:  # behind the last token there is room for more, masked
            own = keys.shape[2]
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, places - own), value=7.0) for x in (keys, values))
            cache.own_bias = torch.zeros(1, 1, 1, places, dtype=keys.dtype)
            cache.own_bias[..., own:] = -torch.inf
        out = shared_prefix_attention(self.query[:, :, 0], keys, values, cache, 0, self.query.shape[3] ** -0.5)
        return out.view((*self.query.shape[:2], -1))

    def copied(self):
        """One softmax for each row over copies of its prompt's keys and its own."""
        found, repeats = [], self.query.shape[1] // self.keys.shape[1]
        for row in range(len(self.query)):
            key, value = self.prompts[row // self.group]
            keys = torch.cat([key[0], self.keys[row]], dim=1).repeat_interleave(repeats, dim=0)
            values = torch.cat([value[0], self.values[row]], dim=1).repeat_interleave(repeats, dim=0)
            scores = self.query[row] @ keys.transpose(1, 2) * self.query.shape[3] ** -0.5
            found.append((scores.softmax(dim=-1) @ values)[:, 0])
        return torch.stack(found)


def case(lengths, group, heads, kv_heads, width, own, *, query_std=1.0, key_bias=0.0, key_std=1.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows, bias = len(lengths) * group, normal(1, kv_heads, 1, width) * key_bias
    prompts = [(bias + key_std * normal(1, kv_heads, n, width), normal(1, kv_heads, n, width)) for n in lengths]
    keys = bias + key_std * normal(rows, kv_heads, own, width)
    return Case(prompts, query_std * normal(rows, heads, 1, width), keys, normal(rows, kv_heads, own, width), group)


SHAPES = {
    "ragged, the 7B's heads": ((300, 211, 64), 4, 28, 4, 128, 17),
    "one prompt, first token": ((40,), 8, 4, 2, 32, 1),
    "one key per query": ((9, 9), 3, 4, 4, 16, 5),
    # blocks of keys that are padding from end to end
    "a short prompt beside a long one": ((5, 1900), 1, 16, 2, 128, 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_in_fp32_it_is_attention_over_copies(name):
    made = case(*SHAPES[name])
    assert (made.ours() - made.copied()).abs().max() <= 2e-6


@pytest.mark.parametrize("name", SHAPES)
def test_places_behind_the_last_token_change_nothing(name):
    made = case(*SHAPES[name])
    assert (made.ours(places=64) - made.ours()).abs().max() <= 5e-7


@pytest.mark.parametrize("lengths", [(1500,), (1500, 900)])
def test_scores_of_a_released_models_size_are_not_rounded(lengths):
    """Queries of std 3.5 and keys of std 27, mostly biases, as Qwen2.5-7B has them: in bf16, within 0.4 %."""
    made = case(lengths, 2, 28, 4, 128, 32, query_std=3.5, key_bias=27.0, key_std=4.0).to(torch.bfloat16)
    assert made.keys.float().std() > 20
    exact = made.to(torch.float64).copied()
    assert (made.ours().double() - exact).norm() <= 0.004 * exact.norm()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("fault", ["off", "missing"])
def test_without_a_kernel_the_numbers_are_the_same_and_the_reason_is_said_once(monkeypatch, capsys, name, fault):
    expected, kernel = case(*SHAPES[name]).ours(), decode_attention.KERNELS["cpu"]

    def off(*args):
        out, logs = kernel(*args)
        return out, logs + 1e-3

    def missing(*args):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setitem(decode_attention.KERNELS, "cpu", {"off": off, "missing": missing}[fault])
    part_of.cache_clear()
    found = [case(*SHAPES[name]).ours() for _ in range(2)]
    part_of.cache_clear()
    assert torch.equal(*found) and (found[0] - expected).abs().max() <= 2e-6
    said = capsys.readouterr().out
    assert said.count("attention on cpu in float32: ") == 1
    assert {"off": "off by 1.0e-03", "missing": "RuntimeError: no kernel for this shape"}[fault] in said


def test_the_kernel_is_used_at_the_shapes_of_our_policies(capsys):
    for dtype in (torch.float32, torch.bfloat16):
        for width, queries in ((32, 2), (64, 2), (128, 7), (128, 8)):
            assert part_of(CPU, dtype, width, queries) is not plain_part
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_the_sampler_in_bf16_is_the_policy_that_trains():
    """Recorded against recomputed log-probabilities with key biases of a released model's size, in nats."""
    policy = Policy(PolicyConfig(name="t", path="embedded:tiny", precision=Precision.bf16))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in policy.language_model.layers:
            bias = layer.self_attn.k_proj.base_layer.bias
            bias += (27 * torch.randn(bias.shape, generator=generator)).to(bias.dtype)
    policy.eval()
    torch.manual_seed(1)
    features = VideoFeatures(0.5 * torch.randn(160, policy.language_model.config.hidden_size), (40, 4, 4), 1.0, 40.0)
    text = 'When does "a red square enters" happen in the video?'
    inputs = policy.encode_prompt(text, features)
    item = PreparedPrompt(None, inputs, features)
    tokens = token_batch(policy.sample([item], 16, SamplingConfig(max_new_tokens=48), [0])[0], policy.device)
    with torch.no_grad():
        gap = (tokens.logps - policy.logps(item, tokens))[tokens.mask].abs()
    print(f"recorded against recomputed: mean {gap.mean():.4f}, max {gap.max():.3f} nats over {gap.numel()} tokens")
    assert gap.numel() > 100 and gap.mean() < 0.02 and gap.max() < 0.5
