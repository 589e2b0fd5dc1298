"""Plans, traces and one step of each kind of training, on an untrained tiny base."""

import dataclasses
import json

import pytest
import torch
from helpers.training import CPU, GRPO, OFF, make_grpo

from tartvg.config import (
    AnchorsConfig,
    GrpoConfig,
    LrDecay,
    PolicyConfig,
    Precision,
    RewardConfig,
    SftConfig,
)
from tartvg.policy.policy import Policy
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset, step_indices
from tartvg.training.checkpoint import latest_checkpoint
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.training.step import StageRun, learning_rate_share
from tartvg.training.trainer import make_trainer
from tartvg.types import RolloutGroup, Trace


def test_every_epoch_uses_every_prompt_once():
    seen = [i for step in range(5) for i in step_indices(7, step, 4, 10)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:])
    assert seen[:10] != seen[10:]
    assert step_indices(7, 3, 4, 10) == step_indices(7, 3, 4, 10) != step_indices(8, 3, 4, 10)


def test_steps_continue_where_they_stopped(prompts):
    whole = StepDataset(prompts, 2, 0, 0, 6)
    rest = StepDataset(prompts, 2, 0, 4, 6)
    assert len(whole) == 6 and len(rest) == 2
    assert rest[0].step == 4 and rest[0].prompts == whole[4].prompts
    loaded = list(whole)
    assert [batch.step for batch in loaded] == list(range(6))


@pytest.mark.parametrize(("num_iterations", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_a_head_in_bf16_keeps_float32_where_a_batch_is_updated_again(untrained_base, tmp_path, num_iterations, dtype):
    policy = Policy(PolicyConfig(name="t", path=str(untrained_base), precision=Precision.bf16))
    settings = dataclasses.replace(GRPO, num_iterations=num_iterations)
    make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()), settings)
    hidden = torch.zeros(1, policy.language_model.config.hidden_size, dtype=torch.bfloat16)
    assert policy.core.lm_head(hidden).dtype == dtype


def recorded_losses(module):
    """Every LossInputs of a training, in order."""
    from tartvg.training import grpo_module

    seen = []

    def noting(inputs, *rest, loss=grpo_module.grpo_loss):
        seen.append(inputs)
        return loss(inputs, *rest)

    return seen, noting


def test_the_first_update_has_a_ratio_of_one_and_later_ones_compare_with_it(policy, prompts, tmp_path, monkeypatch):
    """Also where sampling rounds otherwise than training: what was recorded there is disturbed here."""
    settings = dataclasses.replace(GRPO, max_steps=1, num_iterations=3)
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()), settings)
    module.advantages = lambda group: torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])
    sample = policy.sample

    def disturbed(*args):
        return [
            [dataclasses.replace(c, logps=tuple(v - 0.25 for v in c.logps)) for c in group] for group in sample(*args)
        ]

    policy.sample = disturbed
    seen, noting = recorded_losses(module)
    monkeypatch.setattr("tartvg.training.grpo_module.grpo_loss", noting)
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 1))
    assert len(seen) == 6
    for first, *later in (seen[0::2], seen[1::2]):
        assert torch.equal(first.logps_GT.detach(), first.old_logps_GT)
        for inputs in later:
            assert torch.equal(inputs.old_logps_GT, first.old_logps_GT)
            assert not torch.equal(inputs.logps_GT.detach(), inputs.old_logps_GT)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["rollout/logp_gap"] == pytest.approx(0.25, abs=1e-5)


def test_groups_without_difference_are_dropped_and_counted(policy, prompts, tmp_path, monkeypatch):
    settings = dataclasses.replace(GRPO, max_steps=2, drop_zero_variance=True, kl_coef=0.5)
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()), settings)
    score = GrpoModule.score

    def scored(prompt, completions, step):
        """The untrained base earns nothing anywhere; in the first step one group's rewards are told apart."""
        group = score(module, prompt, completions, step)
        if step or prompt is not prompts[0]:
            return group
        rollouts = [
            dataclasses.replace(r, reward=dataclasses.replace(r.reward, total=float(i)))
            for i, r in enumerate(group.rollouts)
        ]
        return dataclasses.replace(group, rollouts=tuple(rollouts))

    module.score = scored
    seen, noting = recorded_losses(module)
    monkeypatch.setattr("tartvg.training.grpo_module.grpo_loss", noting)
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 2))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert len(seen) == 1 and first["group/zero_variance_rate"] == 0.5 and "optim/skipped" not in first
    assert second["group/zero_variance_rate"] == 1.0 and second["optim/skipped"] == 1.0
    assert not (tmp_path / "faults.jsonl").exists(), "no fault: nothing went wrong"
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 4


def test_traces_of_a_query_stay_together(prompts):
    by_id = {p.sample.sample_id: p for p in prompts}
    traces = [Trace(key, f"{key} {i}", 7.0, ()) for i in range(5) for key in by_id]
    data = TraceDataset(traces, by_id, SftConfig(epochs=2, batch_size=6), seed=0)
    batches = [data[i] for i in range(len(data))]
    texts = [t.text for b in batches for _, group in b.groups for t in group]
    assert sorted(texts[: len(traces)]) == sorted(t.text for t in traces) == sorted(texts[len(traces) :])
    assert all(len(b.groups) <= 3 for b in batches)
    with pytest.raises(ValueError, match="no traces"):
        TraceDataset([], by_id, SftConfig(), seed=0)


def test_the_learning_rate_warms_up_and_falls_linearly():
    warm = GrpoConfig(warmup_steps=1, lr_decay=LrDecay.linear)
    assert [learning_rate_share(warm, step, 4) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    assert [learning_rate_share(GrpoConfig(), step, 4) for step in range(4)] == [1.0] * 4


@pytest.mark.slow
def test_grpo_learns_what_is_rewarded(policy, prompts, tmp_path):
    """The real module under a real trainer; only the reward is a toy: how often one token is said."""
    settings = dataclasses.replace(GRPO, max_steps=15, group_size=16, kl_coef=0.0, lr=5e-2)
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()), settings)
    wanted = policy.tokenizer.convert_tokens_to_ids("1")

    def share(completion):
        return completion.token_ids.count(wanted) / len(completion.token_ids)

    def score(prompt, completions, step):
        group = GrpoModule.score(module, prompt, completions, step)
        scored = tuple(
            dataclasses.replace(r, reward=dataclasses.replace(r.reward, total=share(r.completion)))
            for r in group.rollouts
        )
        return RolloutGroup(group.prompt, scored, group.step)

    def measured():
        groups = policy.sample([policy.prepare(prompts[0])], 64, settings.sampling, [0])
        return sum(map(share, groups[0])) / 64

    assert measured() < 0.006
    module.score = score
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 15))
    assert measured() > 0.009


def test_the_first_step_has_ratio_one_and_no_kl(policy, prompts, tmp_path):
    import json

    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()))
    assert policy.training and module.policy.model.training
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss/kl"] == 0.0
    assert rows[0]["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    found = latest_checkpoint(tmp_path / "checkpoints")
    assert found.step == 2 and all("lora" in name for name in found.weights)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(policy, prompts, tmp_path, capsys):
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()))
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 2))
    (tmp_path / "checkpoints/step_000002/optimizer.pt").write_bytes(b"damaged")
    assert latest_checkpoint(tmp_path / "checkpoints").step == 1
    assert "is damaged (optimizer.pt: 7 bytes instead of" in capsys.readouterr().out


@pytest.mark.slow
def test_sft_raises_the_likelihood_of_its_traces(policy, prompts, tmp_path):
    by_id = {p.sample.sample_id: p for p in prompts}
    text = "<think>It is <timestamp>1.00 to 2.00</timestamp>.</think><answer>1.00 to 2.00</answer>"
    traces = [Trace(key, text, 7.0, ()) for key in by_id]
    settings = SftConfig(epochs=8, batch_size=4, lr=2e-2)
    tracker = Tracker(tmp_path, OFF, "r", "sft", {}, 0)
    with tracker:
        data = TraceDataset(traces, by_id, settings, 0)
        module = SftModule(policy, settings, StageRun("sft", tmp_path, 0, data.stop), tracker)
        tokens = module.tokens(traces[:1])
        prepared = policy.prepare(prompts[0])
        before = policy.logps(prepared, tokens).mean().item()
        make_trainer(CPU, tmp_path).fit(
            module, torch.utils.data.DataLoader(data, batch_size=1, collate_fn=lambda b: b[0])
        )
    assert policy.logps(prepared, tokens).mean().item() > before + 0.5
    assert tokens.ids[0, -1] == policy.end_id


def test_a_video_that_cannot_be_read_costs_its_sample_only(policy, prompts, tmp_path, capsys):
    sample = dataclasses.replace(prompts[0].sample, sample_id="gone", video=tmp_path / "gone.mp4")
    broken = dataclasses.replace(prompts[0], sample=sample)
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()))
    data = StepDataset([broken, prompts[1]], 2, 0, 0, 1)
    make_trainer(CPU, tmp_path).fit(module, data)
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 1
    assert "without gone" in capsys.readouterr().out


def test_a_traceback_leads_from_learn_to_the_loss_in_four_calls(policy, prompts, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()))
    monkeypatch.setattr("tartvg.training.grpo_module.grpo_loss", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 1))
    names = [frame.name for frame in caught.traceback]
    assert names[names.index("learn") :] == ["learn", "__call__", "gradients", "loss", "broken"]
