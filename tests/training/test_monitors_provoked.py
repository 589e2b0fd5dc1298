"""Every monitor against its failure, provoked in a real training of the embedded base; and a healthy training.

Only the reward of some is a toy: it pays for the very thing that the monitor should report.
"""

import dataclasses
import itertools
import json

import pytest
from helpers.training import CPU, OFF

from tartvg.config import (
    AnchorsConfig,
    FramesConfig,
    GrpoConfig,
    MonitorsConfig,
    PlantedConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    TrainerConfig,
)
from tartvg.data.planted import load_planted
from tartvg.policy.policy import Policy
from tartvg.prompts import build_prompt
from tartvg.rewards import Rubric
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer
from tartvg.types import Trace

pytestmark = pytest.mark.campaign
GRPO = GrpoConfig(group_size=8, prompts_per_step=1, lr=5e-4, sampling=SamplingConfig(max_new_tokens=96))


class Judge(Rubric):
    """The rubric with another total: a reward that pays for the wrong thing. All terms stay what they are."""

    def __init__(self, pays, **reward):
        super().__init__(RewardConfig(**reward), AnchorsConfig())
        object.__setattr__(self, "pays", pays)

    def score(self, response, sample):
        reward = super().score(response, sample)
        return dataclasses.replace(reward, total=float(self.pays(reward)))


@pytest.fixture(scope="module")
def prompts(planted_root):
    samples = load_planted(planted_root, PlantedConfig(4, 1, 1, 2), "train", "planted")
    return [build_prompt(s, AnchorsConfig()) for s in samples]


@pytest.fixture
def policy():
    frames = FramesConfig(min_frames=4, max_frames=64, min_pixels=3136, max_pixels=3136, total_pixels=401408)
    return Policy(PolicyConfig(name="tiny", path="embedded:tiny", frames=frames), seed=0)


@pytest.fixture
def train(policy, prompts, tmp_path):
    """Train some steps of GRPO with the default monitors; returns the names of the alarms and the lines of metrics."""

    def run(steps, rubric=None, monitors=MonitorsConfig(), target=2, **settings):  # noqa: B008 - never changed
        grpo = dataclasses.replace(GRPO, max_steps=steps, **settings)
        rubric = rubric or Rubric(RewardConfig(), AnchorsConfig())
        stage = StageRun(
            "grpo1", tmp_path, 0, steps, TrainerConfig(checkpoint_every=steps), monitors, num_anchors=target
        )
        with Tracker(tmp_path, OFF, "r", "grpo1", {}, 0) as tracker:
            module = GrpoModule(policy, rubric, grpo, AnchorsConfig(), stage, tracker)
            data = StepDataset(prompts, grpo.prompts_per_step, 0, 0, steps)
            make_trainer(CPU, tmp_path).fit(module, data)
        path = tmp_path / "alarms.jsonl"
        alarms = [json.loads(line)["monitor"] for line in path.read_text().splitlines()] if path.exists() else []
        return alarms, [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    return run


def test_truncation_a_length_that_no_answer_fits_in(train):
    alarms, lines = train(5, sampling=SamplingConfig(max_new_tokens=4))
    assert "truncation" in alarms and lines[-1]["rollout/truncated_rate"] > 0.9


def test_zero_variance_a_reward_without_a_difference(train):
    alarms, _ = train(5, rubric=Judge(lambda reward: 1), sampling=SamplingConfig(max_new_tokens=16))
    assert "zero_variance" in alarms and "entropy_collapse" not in alarms


def test_entropy_collapse_nothing_but_the_likeliest_token(train):
    alarms, lines = train(5, group_size=2, sampling=SamplingConfig(temperature=1e-4, max_new_tokens=16))
    assert "entropy_collapse" in alarms, [line["rollout/entropy"] for line in lines]


def test_kl_blowup_no_penalty_and_large_steps(train):
    rule = MonitorsConfig(kl_every=4)
    alarms, lines = train(5, monitors=rule, lr=5e-2, kl_coef=0.0, sampling=SamplingConfig(max_new_tokens=24))
    assert [i for i, line in enumerate(lines) if "rollout/kl" in line] == [0, 4]
    assert abs(lines[0]["rollout/kl"]) < 1e-6
    assert "kl_blowup" in alarms


def test_non_finite_a_learning_rate_beyond_all_numbers(train, policy):
    coin = itertools.cycle([0, 1])  # a difference in every group
    limits = SamplingConfig(max_new_tokens=8)
    alarms, lines = train(3, rubric=Judge(lambda reward: next(coin)), lr=1e30, sampling=limits, group_size=2)
    assert "non_finite" in alarms, lines
    assert lines[1]["optim/grad_norm"] is None


@pytest.fixture
def learn_by_heart(policy, prompts, tmp_path):
    """Fine-tune the policy on one text for every video; nothing in that is sick by itself."""

    def learn(text):
        traces = [Trace(p.sample.sample_id, text, 7.0, ()) for p in prompts[:4]]
        settings = SftConfig(epochs=25, batch_size=4, lr=5e-3)
        with Tracker(tmp_path / "sft", OFF, "r", "sft", {}, 0) as tracker:
            data = TraceDataset(traces, {p.sample.sample_id: p for p in prompts}, settings, 0)
            module = SftModule(policy, settings, StageRun("sft", tmp_path / "sft", 0, data.stop), tracker)
            make_trainer(CPU, tmp_path).fit(module, data)
        assert not (tmp_path / "sft" / "alarms.jsonl").exists()

    return learn


def test_video_blindness_one_answer_learnt_by_heart(train, learn_by_heart):
    learn_by_heart("<think>It is <timestamp>1.00 to 4.00</timestamp>.</think><answer>1.00 to 4.00</answer>")
    alarms, lines = train(1, group_size=2)
    assert "video_blindness" in alarms, lines
    assert lines[0]["anchors/shuffled_agreement"] > 0.9


def test_stagnant_refinement_an_anchor_that_is_said_twice(train, learn_by_heart):
    anchor = "<timestamp>1.00 to 4.00</timestamp>"
    learn_by_heart(f"<think>It is {anchor}. So it is {anchor}.</think><answer>1.00 to 4.00</answer>")
    alarms, lines = train(5, group_size=4, lr=1e-6)
    assert "stagnant_refinement" in alarms, lines
    assert lines[0]["anchors/pairs_mean"] > 0.5


def test_reward_hacking_a_reward_that_counts_anchors(train):
    """K is 1 here, and the base says about one anchor; then every anchor is paid for."""
    rubric = Judge(lambda reward: len(reward.anchor_ious))
    alarms, lines = train(20, rubric=rubric, target=1, lr=1e-3, prompts_per_step=4)
    assert "reward_hacking" in alarms, [line["anchors/count_mean"] for line in lines]


def test_format_collapse_a_reward_for_breaking_it(train):
    """Without the demands on anchors, most of the base's outputs have the format: there is something to lose."""
    rubric = Judge(lambda reward: -reward.terms["format"], needs_anchors=False, answer_is_last_anchor=False)
    alarms, lines = train(20, rubric=rubric, lr=2e-3)
    assert "format_collapse" in alarms, [line["reward/format_mean"] for line in lines]


def test_a_healthy_training_raises_none(train):
    alarms, lines = train(20, prompts_per_step=4)
    assert alarms == [] and len(lines) == 20
    assert {"rollout/kl", "anchors/shuffled_agreement", "rollout/entropy"} <= lines[10].keys()
