import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tartvg.config import AdvantageScale
from tartvg.grpo import group_advantages

REWARDS = torch.tensor([2.0, 3.0, 2.5, 3.5])


@pytest.mark.parametrize(
    ("scale", "expected"), [(AdvantageScale.population_std, 0.447), (AdvantageScale.sample_std, 0.387)]
)
def test_worked_example(scale: AdvantageScale, expected: float):
    assert group_advantages(REWARDS, scale, 1e-4)[1].item() == pytest.approx(expected, abs=5e-4)


def test_no_scale_only_centres():
    assert group_advantages(REWARDS, AdvantageScale.none, 1e-4).tolist() == [-0.75, 0.25, -0.25, 0.75]


@pytest.mark.parametrize("scale", AdvantageScale)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e8])
def test_equal_rewards_teach_exactly_nothing(scale: AdvantageScale, eps: float, value: float):
    # seven times 0.1 has a mean that rounds away from 0.1
    assert group_advantages(torch.full((7,), value), scale, eps).tolist() == [0.0] * 7
    assert group_advantages(torch.tensor([value]), scale, eps).tolist() == [0.0]


@given(st.lists(st.floats(-40, 40), min_size=2, max_size=16), st.sampled_from([1e-4, 1e-2]))
def test_equals_numpy(rewards: list[float], eps: float):
    values = np.array(rewards)
    for scale, ddof in [(AdvantageScale.sample_std, 1), (AdvantageScale.population_std, 0)]:
        expected = (values - values.mean()) / (values.std(ddof=ddof) + eps)
        actual = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale, eps)
        assert np.allclose(actual, expected, atol=1e-9)
        assert abs(actual.sum().item()) < 1e-9


def test_groups_in_rows_are_independent():
    rewards = torch.tensor([[2.0, 3.0, 2.5, 3.5], [1.0, 1.0, 1.0, 1.0], [0.0, 8.0, -4.0, 1.0]])
    together = group_advantages(rewards, AdvantageScale.sample_std, 1e-4)
    assert torch.equal(together, torch.stack([group_advantages(r, AdvantageScale.sample_std, 1e-4) for r in rewards]))


def test_shift_changes_nothing_and_scale_hardly():
    base = group_advantages(REWARDS.double(), AdvantageScale.sample_std, 1e-4)
    assert torch.allclose(group_advantages(REWARDS.double() + 16, AdvantageScale.sample_std, 1e-4), base)
    assert torch.allclose(group_advantages(REWARDS.double() * 8, AdvantageScale.sample_std, 1e-4), base, atol=1e-3)


def test_integer_rewards_are_fine_and_infinite_ones_are_not():
    assert group_advantages(torch.tensor([1, 3]), AdvantageScale.none).tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, float("nan")]), AdvantageScale.none)
