"""The decoding loop against a plain one: the same tokens, whatever is sampled together and however rarely we look."""

from contextlib import contextmanager
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.policies import prepared, with_moved_adapter
from torch._subclasses.fake_tensor import FakeTensorMode

from tartvg.config import PolicyConfig, SamplingConfig
from tartvg.memory.footprint import ShapePolicy, model_config
from tartvg.policy import decoding
from tartvg.policy.decode_layers import DecodePass
from tartvg.policy.decoding import Decoding, Pace, Rows
from tartvg.policy.kv_cache import DecodeCache, PrefixCache
from tartvg.policy.loading import save_adapter
from tartvg.policy.policy import Policy
from tartvg.policy.sampling import draw, greedy, restrict

TEXTS = ("a", "the red one", "when is the blue square there", "a " * 60)
PACES = (decoding.PACES["cpu"], decoding.PACES["cuda"], Pace(look_every=3, bucket=8, least_over=0.0),
         Pace(look_every=16, bucket=16, least_over=0.5))  # fmt: skip


@pytest.fixture(scope="module")
def policy(untrained_base):
    """With an adapter that is not the identity."""
    return with_moved_adapter(Policy(PolicyConfig(name="t", path=str(untrained_base))))


@pytest.fixture(scope="module")
def items(policy):
    return prepared(policy, *TEXTS)


@contextmanager
def ending(policy, raised):
    """Inside the block the end token's logit is raised."""

    def raise_it(_, __, logits):
        logits[..., policy.end_id] += raised

    handle = policy.core.lm_head.register_forward_hook(raise_it)
    try:
        yield
    finally:
        handle.remove()


class CopyingCache:
    """G copies of a prompt's keys and values, to which tokens are appended."""

    def __init__(self, prefix, group):
        self.keys = [k.expand(group, -1, -1, -1) for k in prefix.keys]
        self.values = [v.expand(group, -1, -1, -1) for v in prefix.values]

    def update(self, keys, values, layer, *_, **__):
        self.keys[layer] = torch.cat([self.keys[layer], keys], dim=2)
        self.values[layer] = torch.cat([self.values[layer], values], dim=2)
        return self.keys[layer], self.values[layer]


@torch.no_grad()
def plain_group(policy, item, group, limits, seed):
    """One prompt alone, by the library's attention over copies, lists, and one draw after another from its stream."""
    prefix, last = policy._prefill(item)
    cache, hidden = CopyingCache(prefix, group), last.expand(group, -1, -1)
    stream = torch.Generator().manual_seed(seed)
    said = [([], []) for _ in range(group)]
    for step in range(limits.max_new_tokens):
        logits = policy._logits(hidden[:, 0]) / (limits.temperature or 1.0)
        if limits.temperature == 0:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = draw(restrict(logits, limits), torch.rand(group, generator=stream, dtype=torch.float64))
        picked = logits.log_softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
        for (ids, logps), token, logp in zip(said, chosen.tolist(), picked.tolist(), strict=True):
            if not ids or ids[-1] not in policy.end_ids:
                ids.append(token)
                logps.append(logp)
        if all(ids[-1] in policy.end_ids for ids, _ in said):
            break
        hidden = policy.language_model(
            inputs_embeds=policy.language_model.embed_tokens(chosen)[:, None],
            position_ids=torch.full((3, group, 1), item.inputs.next_position + step),
            attention_mask={"full_attention": None}, past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
    return said


def check_mix(policy, items, monkeypatch, seed):
    """Returns how many tokens were compared."""
    rng = np.random.default_rng(seed)
    chosen = [items[i] for i in rng.integers(0, len(items), rng.integers(1, 5))]
    limits = SamplingConfig(
        temperature=float(rng.choice([0.0, 0.7, 1.0, 1.5])), top_p=float(rng.choice([1.0, 0.8])),
        top_k=int(rng.choice([0, 5])), max_new_tokens=int(rng.choice([1, 2, 7, 16, 17, 40])),
    )  # fmt: skip
    group, num_greedy = int(rng.integers(1, 5)), int(rng.integers(0, 3))
    seeds = [int(s) for s in rng.integers(0, 10**6, len(chosen))]
    raised = float(rng.choice([-100.0, 2.0, 3.5, 4.5, 100.0]))
    monkeypatch.setitem(decoding.PACES, "cpu", PACES[rng.integers(len(PACES))])
    with ending(policy, raised):
        groups = policy.sample(chosen, group, limits, seeds, num_greedy)
        expected = [
            [*plain_group(policy, item, num_greedy, greedy(limits), 0), *plain_group(policy, item, group, limits, s)]
            if num_greedy
            else plain_group(policy, item, group, limits, s)
            for item, s in zip(chosen, seeds, strict=True)
        ]
    for found, (ids, logps) in zip(chain(*groups), chain(*expected), strict=True):
        assert list(found.token_ids) == ids, f"mix {seed}"
        assert found.is_finished == (ids[-1] in policy.end_ids)
        assert found.text == policy.tokenizer.decode(ids, skip_special_tokens=True)
        assert np.abs(np.array(found.logps) - np.array(logps)).max() <= 2e-5, f"mix {seed}"
    return sum(len(c.token_ids) for group in groups for c in group)


@pytest.mark.parametrize("seed", range(4))
def test_a_mix_of_prompts_ends_and_limits_gives_the_tokens_of_a_plain_loop(policy, items, monkeypatch, seed):
    assert check_mix(policy, items, monkeypatch, seed)


@pytest.mark.slow
def test_200_mixes_give_the_tokens_of_a_plain_loop(policy, items, monkeypatch):
    assert sum(check_mix(policy, items, monkeypatch, seed) for seed in range(200)) > 8000


@pytest.mark.parametrize("pace", PACES)
def test_greedy_and_drawn_answers_together_are_those_apart(policy, items, monkeypatch, pace):
    limits, seeds = SamplingConfig(max_new_tokens=20, top_k=9), [4, 5, 6, 7]
    monkeypatch.setitem(decoding.PACES, "cpu", pace)
    calls = []
    hook = policy.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with ending(policy, 3.5):
        together = policy.sample(items, 3, limits, seeds, num_greedy=1)
        hook.remove()
        drawn, best = policy.sample(items, 3, limits, seeds), policy.sample(items, 1, greedy(limits), [0] * 4)
    for found, one, others in zip(together, best, drawn, strict=True):
        assert [c.token_ids for c in found] == [c.token_ids for c in [*one, *others]]
        assert np.allclose(found[0].logps, one[0].logps, atol=1e-5)
    assert sum(n > 1 for n in calls) == len(items)  # each prompt is prefilled once


def test_the_adapters_are_those_that_are_active(policy, items, tmp_path):
    """The one that is trained, the frozen one of a reference, none, and two of them together."""
    save_adapter(policy.model, tmp_path, "base")
    continued = Policy(policy.settings, adapter=tmp_path)
    for name, parameter in continued.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += 0.05
    limits, found = SamplingConfig(temperature=0.0, max_new_tokens=12), {}

    def check(name, model):
        (group,) = model.sample(items[:1], 1, limits, [0])
        ((ids, logps),) = plain_group(model, items[0], 1, limits, 0)
        assert list(group[0].token_ids) == ids and np.allclose(group[0].logps, logps, atol=2e-5), name
        found[name] = np.array(logps)

    check("trained", continued)
    with continued.as_reference():
        check("reference", continued)
    with continued.model.disable_adapter():
        check("none", continued)
    continued.model.base_model.set_adapter(["default", "reference"])
    check("both", continued)
    check("of the start", policy)
    assert np.allclose(found["reference"], found["of the start"], atol=1e-5)
    assert len({logps.tobytes() for name, logps in found.items() if name != "of the start"}) == 4


def begun(policy, items, group, places, tokens=40):
    """A decoding of which one token is drawn."""
    filled = [policy._prefill(item) for item in items]
    cache = DecodeCache([prefix for prefix, _ in filled], group, tokens, places)
    rows = len(items) * group
    start = torch.tensor([item.inputs.next_position for item in items]).repeat_interleave(group)
    written = Rows.begin(start, torch.ones(rows, 1), torch.rand(rows, tokens, dtype=torch.float64))
    decoder = DecodePass(policy.language_model)
    made = Decoding(decoder, policy._logits, cache, written, SamplingConfig(), torch.tensor([0]), False, True)
    made.draw(torch.cat([last[:, 0] for _, last in filled]).repeat_interleave(group, dim=0))
    return made


@torch.no_grad()
def test_a_step_moves_no_tensor_and_the_length_is_one_of_them(policy, items):
    """What a captured graph relies on: it repeats the same work on the same addresses."""
    made = begun(policy, items, 2, places=16)

    def addresses():
        return [x.data_ptr() for x in (*made.rows.state(), *made.cache.new_keys, *made.cache.new_values)]

    before = addresses()
    for _ in range(15):
        made.step()
    assert addresses() == before and int(made.rows.length) == 16
    written = made.cache.new_keys[-1].abs().sum(dim=(0, 1, 3))
    assert (written[:15] > 0).all() and written[15] == 0


def test_the_host_reads_nothing_inside_a_step(untrained_base):
    """On tensors without content every read of a number raises."""
    settings = PolicyConfig(name="t", path=str(untrained_base))
    shape = ShapePolicy(settings, model_config(settings))
    config = shape.language_model.config
    size = (1, config.num_key_value_heads, 24, config.hidden_size // config.num_attention_heads)
    with FakeTensorMode(), torch.no_grad():
        shape.become_fake()
        prefix = PrefixCache()
        for layer in range(config.num_hidden_layers):
            prefix.update(torch.zeros(size), torch.zeros(size), layer)
        written = Rows.begin(torch.ones(4, dtype=torch.long), torch.ones(4, 1), torch.zeros(4, 8, dtype=torch.float64))
        cache, limits = DecodeCache([prefix, prefix], 2, 8, 8), SamplingConfig(top_k=3, top_p=0.9)
        decoder = DecodePass(shape.language_model)
        made = Decoding(decoder, shape._logits, cache, written, limits, torch.tensor([1]), True, True)
        made.step()
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense|data-dependent"):
            made.rows.length.item()


def test_nothing_in_memory_reaches_a_row_through_a_place_that_is_not_written(policy, items):
    """Zeros there, not whatever was in memory: a weight of 0 times NaN is NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # then torch.empty is full of NaN
    try:
        (group,) = policy.sample(items[:1], 3, SamplingConfig(max_new_tokens=9), [0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(np.isfinite(c.logps).all() for c in group)
