"""Our loss against TRL's own on the same rollouts, for each variant that both have. Needs the extra `bench`."""

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="pip install 'tartvg[bench]'")

from experiments.efficiency.bench.questions import Bench
from experiments.efficiency.bench.shapes import Shape
from experiments.efficiency.bench.trl_engine import (
    agreement,
    make_trainer,
    trl_inputs,
    trl_learn,
    trl_logps,
    trl_reference,
)
from experiments.efficiency.bench.ways import gradient
from tartvg.config import Aggregation, ImportanceLevel
from tartvg.grpo import LossInputs, LossSettings, grpo_loss

pytestmark = pytest.mark.campaign
TOY = Shape(hidden=64, layers=2, intermediate=96, heads=4, kv_heads=2)
P, C, G = 80, 9, 4
AGGREGATIONS = {
    Aggregation.sequence_mean: "grpo",
    Aggregation.token_mean: "bnpo",
    Aggregation.constant: "dr_grpo",
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("trl"), shape=TOY)
    policy = bench.policy()
    return bench, policy, make_trainer(policy, G, C, bench.folder / "trl")


def unequal(group):
    """Completions of 9, 7, 5 and 3 tokens, and log-probabilities that leave the clipping range on both sides."""
    lengths = torch.tensor([9, 7, 5, 3])
    mask = torch.arange(C)[None] < lengths[:, None]
    noise = 0.3 * torch.randn(G, C, generator=torch.Generator().manual_seed(3))
    noise += torch.tensor([[0.5], [0.0], [0.0], [-0.5]])  # whole rows leave it too, for ratios per sequence
    tokens = dataclasses.replace(group.tokens, mask=mask, logps=(group.tokens.logps + noise) * mask)
    return dataclasses.replace(group, tokens=tokens)


def test_the_whole_step_agrees(engines):
    bench, policy, trainer = engines
    found = agreement(policy, trainer, bench.group(policy, P, C, G))
    assert found.logps <= 1e-5 and found.gradient <= 1e-5
    found.check()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", ImportanceLevel)
@pytest.mark.parametrize(("clip_high", "kl_coef"), [(0.2, 0.04), (0.28, 0.0)])
def test_variants_agree(engines, aggregation, importance, clip_high, kl_coef):
    bench, policy, trainer = engines
    group = unequal(bench.group(policy, P, C, G))
    settings = LossSettings(
        0.2, clip_high, kl_coef, loss_aggregation=aggregation, importance_level=importance, max_new_tokens=C
    )
    trainer.loss_type, trainer.importance_sampling_level = AGGREGATIONS[aggregation], importance.value
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = 0.2, clip_high, kl_coef

    inputs = trl_inputs(policy, group)
    theirs = trl_learn(policy, trainer, inputs, trl_reference(policy, trainer, inputs))
    their_gradient = gradient(policy)
    with torch.no_grad():
        their_logps = trl_logps(trainer, inputs)

    policy.zero_grad()
    with policy.as_reference():
        reference = policy.logps(group.item, group.tokens)
    logps = policy.logps(group.item, group.tokens)
    mask = group.tokens.mask
    output = grpo_loss(LossInputs(logps, group.tokens.logps, reference, group.advantages[:, None], mask), settings)
    output.loss.backward()
    assert (logps - their_logps)[mask].abs().max() <= 1e-5
    assert float(output.loss.detach()) == pytest.approx(float(theirs), rel=1e-5, abs=1e-6)
    assert (gradient(policy) - their_gradient).norm() <= 1e-5 * their_gradient.norm()
    assert output.metrics["loss/clip_fraction"] > 0
