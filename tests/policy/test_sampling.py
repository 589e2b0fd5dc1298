"""Drawing tokens: distributions against their definition, tokens that may never appear, and when sampling stops."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.policies import prepared
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tartvg.config import PolicyConfig, SamplingConfig
from tartvg.policy.policy import Policy
from tartvg.policy.sampling import draw, restrict, uniforms

INF = float("inf")
LOGITS = st.lists(st.one_of(st.floats(-8, 8, width=32), st.just(-INF)), min_size=2, max_size=12)


def definition(logits, temperature, top_k, top_p, slack=1e-5):
    """The distribution word by word, in Python's floats; None where two borders are closer than `slack`."""
    scaled = [x / temperature for x in logits]
    if top_k:
        scaled = [x if sum(y > x for y in scaled) < top_k else -INF for x in scaled]
    peak = max(scaled)
    weights = [math.exp(x - peak) for x in scaled]
    total = sum(weights)
    probabilities = [w / total for w in weights]
    kept, mass = set(), 0.0
    for token in sorted(range(len(logits)), key=lambda t: (-probabilities[t], t)):
        if abs(mass - top_p) < slack and top_p < 1:
            return None
        if mass >= top_p:
            break
        kept.add(token)
        mass += probabilities[token]
    return [p / mass if t in kept else 0.0 for t, p in enumerate(probabilities)]


@settings(max_examples=300, deadline=None)
@given(LOGITS, st.floats(0.2, 3), st.integers(0, 14), st.one_of(st.just(1.0), st.floats(0.05, 0.99)))
def test_restrict_follows_the_definition(logits, temperature, top_k, top_p):
    assume(max(logits) > -INF)
    # numbers that only the rounding of a division tells apart are ties for one side and not for the other
    finite = sorted(x for x in logits if x > -INF)
    assume(all(b == a or b - a > 1e-4 for a, b in pairwise(finite)))
    expected = definition(logits, temperature, top_k, top_p)
    assume(expected is not None)
    ours = restrict(torch.tensor([logits]) / temperature, SamplingConfig(top_k=top_k, top_p=top_p))[0]
    assert torch.allclose(ours, torch.tensor(expected), atol=1e-5)
    assert float(ours.sum()) == pytest.approx(1, abs=1e-5)


def test_restrict_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    def kept(temperature=1.0, **limits):
        return [round(p, 4) for p in restrict(logits / temperature, SamplingConfig(**limits))[0].tolist()]

    assert kept() == [0.5, 0.25, 0.125, 0.125]
    assert kept(temperature=0.5) == [round(p / 0.34375, 4) for p in (0.25, 0.0625, 0.015625, 0.015625)]
    assert kept(top_p=0.4) == [1, 0, 0, 0]
    assert kept(top_p=0.7) == [0.6667, 0.3333, 0, 0]
    assert kept(top_k=2) == [0.6667, 0.3333, 0, 0]
    assert kept(top_k=3) == [0.5, 0.25, 0.125, 0.125]  # a tie at the border
    assert kept(top_k=1, top_p=0.1) == [1, 0, 0, 0]
    assert kept(top_k=9) == kept()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 20, 1.0), (1.3, 50, 0.9), (1, 0, 0.8)]
)
def test_restrict_equals_the_librarys_processors(temperature, top_k, top_p):
    logits = 3 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    theirs = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = restrict(logits / temperature, SamplingConfig(top_k=top_k, top_p=top_p))
    assert torch.allclose(ours, theirs.softmax(dim=-1), atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.6), (1.5, 12, 0.9)],
)
def test_frequencies_of_1e5_draws(temperature, top_k, top_p):
    count = 100_000
    logits = 2 * np.random.default_rng(1).standard_normal(40)
    limits = SamplingConfig(top_k=top_k, top_p=top_p)
    expected = definition(logits.tolist(), temperature, top_k, top_p)
    probabilities = restrict(torch.tensor(logits, dtype=torch.float32)[None] / temperature, limits)
    tokens = draw(probabilities.expand(count, -1), uniforms([5], count, 1).flatten())
    observed = np.bincount(tokens.numpy(), minlength=40)
    assert all(observed[t] == 0 for t in range(40) if expected[t] == 0)
    order = [t for t in np.argsort(expected)[::-1] if expected[t] > 0]
    large = [t for t in order if expected[t] * count >= 10]
    rest = [t for t in order if expected[t] * count < 10]
    seen = [observed[t] for t in large] + ([observed[rest].sum()] if rest else [])
    wanted = [count * expected[t] for t in large] + ([count * sum(expected[t] for t in rest)] if rest else [])
    assert len(wanted) > 1
    assert chisquare(seen, np.array(wanted) * sum(seen) / sum(wanted)).pvalue > 1e-3


def test_a_draw_inverts_the_cumulative_distribution():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.expand(7, -1), numbers).tolist() == [1, 1, 3, 3, 3, 4, 4]
    # a sum that float32 rounds below or above 1 never lets a draw step over the last possible token
    wide = torch.full((1, 150_000), 1 / 150_000)
    wide[:, 149_000:] = 0
    assert int(draw(wide, torch.tensor([1 - 2**-53], dtype=torch.float64))) == 148_999


def test_a_rows_token_depends_on_its_own_number_only():
    probabilities = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    numbers = uniforms([1, 2], 3, 1).flatten()
    together = draw(probabilities, numbers)
    alone = [int(draw(probabilities[i : i + 1], numbers[i : i + 1])) for i in range(6)]
    assert together.tolist() == alone
    assert torch.equal(uniforms([2], 3, 1).flatten(), numbers[3:])


def test_the_numbers_of_a_prompt_are_one_stream_token_after_token():
    stream = torch.Generator().manual_seed(2)
    one_by_one = [torch.rand(3, generator=stream, dtype=torch.float64) for _ in range(7)]
    assert torch.equal(uniforms([1, 2], 3, 7)[1], torch.stack(one_by_one, dim=1))
    assert torch.equal(uniforms([2], 3, 20)[:, :, :7], uniforms([2], 3, 7))


# --- with a model


@pytest.fixture
def policy(untrained_base):
    return Policy(PolicyConfig(name="t", path=str(untrained_base)))


def said(groups) -> Counter:
    return Counter(t for group in groups for c in group for t in c.token_ids)


@pytest.mark.slow
def test_forbidden_tokens_never_appear_in_1e5_tokens_of_an_untrained_model(policy):
    # many short rows: the cost of a token grows with its row
    seen = said(policy.sample(prepared(policy, "a", "the red one"), 6500, SamplingConfig(max_new_tokens=8), [0, 1]))
    assert seen.total() >= 100_000
    assert len(policy.banned) == 5 and not seen.keys() & set(policy.banned)
    assert len(seen) == len(policy.tokenizer) - 5  # everything else does appear


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_forbidden_tokens_never_appear_even_if_the_head_wants_nothing_else(policy, temperature):
    def wanting(_, __, logits):
        logits[..., policy.banned] += 50
        return logits

    policy.core.lm_head.register_forward_hook(wanting)
    limits = SamplingConfig(max_new_tokens=20, temperature=temperature, top_p=0.9, top_k=3)
    groups = policy.sample(prepared(policy, "a"), 8, limits, [0])
    assert said(groups).total() > 0 and not said(groups).keys() & set(policy.banned)
    assert all(math.isfinite(p) for c in groups[0] for p in c.logps)


def test_without_the_ban_an_untrained_model_does_say_them(policy):
    banned = set(policy.banned)
    policy.ban([])
    seen = said(policy.sample(prepared(policy, "a"), 100, SamplingConfig(max_new_tokens=20), [0]))
    assert seen.keys() & banned


def counted(policy, ends: float, texts, limits, group_size=3):
    """Sample with the end token raised by `ends`; also the rows of every call of the decoder."""
    calls = []
    end = policy.end_id

    def raised(_, __, logits):
        logits[..., end] += ends
        return logits

    policy.core.lm_head.register_forward_hook(raised)
    policy.language_model.norm.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    return policy.sample(prepared(policy, *texts), group_size, limits, list(range(len(texts)))), calls


def test_sampling_stops_when_all_rows_have_ended_and_drops_finished_prompts(policy):
    texts = ("a", "the red one", "when is the blue square there")
    groups, calls = counted(policy, 4.5, texts, SamplingConfig(max_new_tokens=500))
    lengths = [max(len(c.token_ids) for c in group) for group in groups]
    assert all(c.token_ids[-1] == policy.end_id and c.token_ids.count(policy.end_id) == 1 for g in groups for c in g)
    assert len(set(lengths)) > 1 and max(lengths) < 100
    # one pass per prompt, then one per token after the first; a prompt takes part until its last row has ended
    assert calls[:3] == [1, 1, 1]
    assert calls[3:] == [3 * sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_sampling_that_ends_at_once_never_decodes(policy):
    groups, calls = counted(policy, 100.0, ("a", "the red one"), SamplingConfig(max_new_tokens=500))
    assert [c.token_ids for g in groups for c in g] == [(policy.end_id,)] * 6
    assert calls == [1, 1]


def test_sampling_without_an_end_stops_at_the_limit(policy):
    groups, calls = counted(policy, -INF, ("a", "the red one"), SamplingConfig(max_new_tokens=7))
    assert {len(c.token_ids) for g in groups for c in g} == {7}
    assert calls == [1, 1] + [6] * 6
