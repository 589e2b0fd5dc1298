"""Which groups keep their activations: `policy.activation_checkpointing=auto`."""

import os
from dataclasses import replace

import pytest
import torch
from forking import call_ranks
from helpers.bases import tiny_of
from helpers.settings import composed

from tartvg.config import Strategy, TrainerConfig
from tartvg.memory.footprint import Load, update_bytes
from tartvg.memory.plan import load_of
from tartvg.memory.whole import WholeUpdates, whole_updates
from tartvg.policy.policy import TokenBatch
from tartvg.stages.memory import fits_whole, refuse_what_cannot_fit
from tartvg.training import distributed


def test_bytes_by_hand():
    found = WholeUpdates(150.0, (100.0, 300.0), (10.0, 50.0), (40.0, 80.0, 120.0, 200.0))
    assert [found.bytes(*size) for size in ((100, 10), (100, 50), (300, 10), (300, 50))] == [40, 80, 120, 200]
    assert found.bytes(200, 30) == 110 == (40 + 80 + 120 + 200) / 4
    assert found.bytes(7, 3) == 40, "never less than what was traced"
    assert found.bytes(300, 90) == 280, "but more"
    assert found(200, 30) and found(300, 25) and not found(300, 26)
    assert "take 0.0 GiB" in str(found) and "groups that need more run their layers twice" in str(found)
    assert "no group runs" in str(replace(found, budget=200.0))


def auto(config, **trainer):
    policy = replace(config.policy, activation_checkpointing="auto")
    return replace(config, policy=policy, trainer=replace(config.trainer, **trainer))


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    """A base that is wide enough for activations to count."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_of("wide", folder)
    return composed(*small, "stage=grpo1", f"policy.path={folder}", "policy.logit_chunk=64", "grpo.group_size=4")


@pytest.mark.slow
def test_groups_between_the_corners_are_estimated_well(config):
    most = load_of(config)
    found = whole_updates(auto(config), 2**40)
    settings = replace(config.policy, activation_checkpointing=False)
    for length, new in ((most.prompt_tokens // 2, most.new_tokens // 2), (most.prompt_tokens, most.new_tokens // 3)):
        traced = update_bytes(settings, Load(length, 1, most.group_size, new))
        estimated = found.bytes(length, most.group_size * new)
        print(f"{length} + {most.group_size} x {new}: traced {traced}, estimated {estimated:.0f}")
        assert estimated == pytest.approx(traced, rel=0.1)


@pytest.mark.slow
def test_a_limit_divides_large_groups_from_small_ones(config, capsys):
    """The budget is set between the two sizes; a policy that gets the rule takes both ways."""
    roomy = whole_updates(auto(config), 2**40)
    most = load_of(config)
    largest, smallest = roomy.corners[3], roomy.corners[0]
    limit = 2**40 - roomy.budget + (largest + smallest) / 2  # on a CPU all but the budget is kept
    rule = fits_whole(auto(config, memory_gib=limit / 2**30))
    said = capsys.readouterr().out
    assert "policy.activation_checkpointing=auto" in said and "run their layers twice" in said
    assert not rule(most.prompt_tokens, most.group_size * most.new_tokens) and rule(16, 8)


def test_where_nothing_limits_memory_no_group_is_run_twice_and_under_zero3_every_group(config):
    assert fits_whole(auto(config))(10**9, 10**9)
    assert fits_whole(auto(config, strategy=Strategy.zero3)) is None
    assert fits_whole(config) is None, "not asked for"


def test_the_policy_follows_the_rule(policy, prompts, monkeypatch):
    """Both ways give the same numbers; which one is taken depends on the group's size alone."""
    packed = []
    monkeypatch.setattr("tartvg.policy.policy.packed_states", noted(packed))
    item = policy.prepare(prompts[0])
    ids = torch.arange(8).view(2, 4) + 100
    small = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(2, 4))
    large = TokenBatch(*(t.repeat(2, 1) for t in (small.ids, small.mask, small.logps)))
    expected = policy.logps(item, large)
    policy.settings = replace(policy.settings, activation_checkpointing="auto")
    assert policy.is_checkpointed(1, 1), "without a rule nothing is known to fit"
    policy.fits_whole = lambda num_prompt, num_completion: num_prompt == item.inputs.length and num_completion <= 8
    policy.logps(item, small)
    assert packed == []
    found = policy.logps(item, large)
    with policy.as_reference():
        policy.logps(item, large)
    assert packed == [4, 4] and torch.allclose(found, expected, atol=1e-5)


def noted(seen):
    from tartvg.policy.packed import packed_states

    def noting(language_model, prompt, deepstack, positions, rows, *rest):
        seen.append(len(rows))
        return packed_states(language_model, prompt, deepstack, positions, rows, *rest)

    return noting


def trace_on_two_ranks(config, folder):
    """Both ranks ask; whoever traces leaves a file."""
    import tartvg.memory.footprint as footprint
    import tartvg.memory.plan as plan
    import tartvg.memory.whole as whole

    def tracing(function):
        def traced(*arguments):
            (folder / f"traced_by_{os.environ['RANK']}").touch()
            return function(*arguments)

        return traced

    plan.trace = tracing(footprint.trace)
    whole.update_bytes = tracing(footprint.update_bytes)
    distributed.init(TrainerConfig(devices=2, strategy=Strategy.ddp))
    distributed.on_rank_zero(lambda: refuse_what_cannot_fit(config))
    rule = fits_whole(config)
    (folder / f"rule_of_{os.environ['RANK']}").write_text(str(vars(rule)))
    distributed.destroy()


@pytest.mark.slow
def test_only_rank_zero_traces_and_all_have_the_same_rule(config, tmp_path):
    two = auto(config, memory_gib=64.0, devices=2, strategy=Strategy.ddp)
    assert call_ranks(2, trace_on_two_ranks, two, tmp_path, output=tmp_path / "said").wait(300) == 0, (
        tmp_path / "said"
    ).read_text()
    assert [path.name for path in sorted(tmp_path.glob("traced_by_*"))] == ["traced_by_0"]
    rules = {(tmp_path / f"rule_of_{rank}").read_text() for rank in range(2)}
    assert len(rules) == 1 and "budget" in rules.pop()
