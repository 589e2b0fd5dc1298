"""The output head in 16 bits: logits whose sums are kept in float32."""

import pytest
import torch
from helpers.policies import prepared

from tartvg.config import PolicyConfig, Precision, SamplingConfig
from tartvg.policy.head import CHUNK, compute_in_float32, token_bias
from tartvg.policy.policy import Policy, token_batch


@pytest.fixture
def head():
    """More rows than are float32 at a time; logits of up to about 16."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, CHUNK + 100, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(head.weight, std=0.5)
    return head


def test_logits_are_those_of_exact_arithmetic(head):
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    exact = hidden.double() @ head.weight.double().t()
    rounded = (head(hidden).double() - exact).abs().max()
    compute_in_float32(head)
    found = head(hidden)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert (found.double() - exact).abs().max() <= 1e-5 < 0.01 < rounded


def test_the_gradient_is_the_heads_own(head):
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, CHUNK + 100)
    (expected,) = torch.autograd.grad((head(hidden).float() * weight).sum(), hidden)
    compute_in_float32(head)
    (found,) = torch.autograd.grad((head(hidden) * weight).sum(), hidden)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_a_head_in_float32_stays_as_it_is():
    head = torch.nn.Linear(4, 8)
    forward = head.forward
    compute_in_float32(head)
    assert head.forward == forward


def test_a_policy_samples_and_recomputes_with_it(untrained_base):
    policy = Policy(PolicyConfig(name="t", path=str(untrained_base), precision=Precision.bf16))
    (item,) = prepared(policy, "the red one")
    hidden = 4 * torch.randn(3, policy.language_model.config.hidden_size, dtype=torch.bfloat16)
    exact = hidden.double() @ policy.core.lm_head.weight.double().t() + policy.token_bias
    is_said = exact.isfinite()
    assert (policy._logits(hidden) - exact)[is_said].abs().max() > 1e-4
    policy.compute_logits_in_float32()
    assert (policy._logits(hidden) - exact)[is_said].abs().max() <= 1e-5
    (group,) = policy.sample([item], 3, SamplingConfig(max_new_tokens=5), [0])
    batch = token_batch(group, policy.device)
    again = policy.logps(item, batch)
    assert torch.allclose(again.detach(), batch.logps, atol=0.05)
    again.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_the_bias_forbids_tokens_and_rows_without_a_word():
    assert token_bias([1, 3], 5, 7, torch.device("cpu")).tolist() == [
        0,
        -torch.inf,
        0,
        -torch.inf,
        0,
        *[-torch.inf] * 2,
    ]
