"""The loss against the equations, written out token by token."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tartvg.config import Aggregation, GrpoConfig, ImportanceLevel, KlEstimator, SamplingConfig
from tartvg.grpo import LossInputs, LossSettings, grpo_loss

TOKEN_COUNTS = [5, 3, 0, 6, 1]
NAMES = {"loss/total", "loss/policy", "loss/kl", "loss/clip_fraction", "loss/ratio_mean", "loss/ratio_max"}


FIELDS = ("logps_GT", "old_logps_GT", "ref_logps_GT", "advantages_GT", "mask_GT")


def make_inputs(seed: int = 0, spread: float = 0.4, per_token: bool = False) -> LossInputs:
    """Five rows in float64; one is empty, one has a hole in its mask, both signs of advantage are clipped.

    With `per_token` advantages and the weight of the KL penalty differ from token to token.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(TOKEN_COUNTS), max(TOKEN_COUNTS))
    logps, old, ref = (torch.randn(shape, generator=generator, dtype=torch.float64) * spread - 2 for _ in range(3))
    mask = torch.arange(shape[1])[None] < torch.tensor(TOKEN_COUNTS)[:, None]
    mask[3, 2] = False
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.6], dtype=torch.float64)[:, None]
    kl_coef = None
    if per_token:
        kl_coef = torch.rand(shape, generator=generator, dtype=torch.float64)
        advantages = advantages + torch.randn(shape, generator=generator, dtype=torch.float64)
    return LossInputs(logps.requires_grad_(), old, ref, advantages, mask, kl_coef)


def literal_loss(inputs: LossInputs, settings: LossSettings, normaliser: float | None = None) -> Tensor:
    """-1/G sum_i 1/|o_i| sum_t [min(rho A, clip(rho) A) - alpha KL] and its variants, one token at a time."""
    num_rows, num_columns = inputs.mask_GT.shape
    rows: list[list[Tensor]] = []
    for i in range(num_rows):
        positions = [t for t in range(num_columns) if inputs.mask_GT[i, t]]
        log_ratios = [inputs.logps_GT[i, t] - inputs.old_logps_GT[i, t] for t in positions]
        losses = []
        for t, log_ratio in zip(positions, log_ratios, strict=True):
            if settings.importance_level is ImportanceLevel.sequence:
                log_ratio = sum(log_ratios, start=torch.tensor(0.0, dtype=torch.float64)) / len(log_ratios)
            rho = torch.exp(log_ratio)
            low, high = (rho.new_tensor(bound) for bound in (1 - settings.clip_low, 1 + settings.clip_high))
            clipped = min(max(rho, low), high)
            advantage = inputs.advantages_GT[i].expand(num_columns)[t]
            objective = min(rho * advantage, clipped * advantage)
            kl_coef = settings.kl_coef if inputs.kl_coef_GT is None else inputs.kl_coef_GT[i, t]
            if kl_coef:
                assert inputs.ref_logps_GT is not None
                delta = inputs.ref_logps_GT[i, t] - inputs.logps_GT[i, t]
                kl = {
                    KlEstimator.k1: -delta,
                    KlEstimator.k2: 0.5 * delta * delta,
                    KlEstimator.k3: torch.exp(delta) - delta - 1,
                }[settings.kl_estimator]
                objective = objective - kl_coef * kl
            losses.append(-objective)
        rows.append(losses)
    zero = inputs.logps_GT.sum() * 0
    if settings.loss_aggregation is Aggregation.sequence_mean:
        return sum((sum(row, start=zero) / len(row) for row in rows if row), start=zero) / (normaliser or num_rows)
    total = sum((sum(row, start=zero) for row in rows), start=zero)
    if settings.loss_aggregation is Aggregation.token_mean:
        return total / (normaliser or sum(len(row) for row in rows))
    return total / (normaliser or num_rows * settings.max_new_tokens)


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("importance", ImportanceLevel)
@pytest.mark.parametrize("kl", KlEstimator)
def test_loss_and_gradient_equal_the_equations(aggregation: Aggregation, importance: ImportanceLevel, kl: KlEstimator):
    for seed, kl_coef, (low, high), normaliser, per_token in product(
        range(2), [0.0, 0.04, 1.0], [(0.2, 0.28), (3e-4, 4e-4)], [None, 37.0], [False, True]
    ):
        settings = LossSettings(low, high, kl_coef, kl, aggregation, importance, max_new_tokens=11)
        inputs = make_inputs(seed, per_token=per_token)
        expected = literal_loss(inputs, settings, normaliser)
        (expected_gradient,) = torch.autograd.grad(expected, inputs.logps_GT)
        output = grpo_loss(inputs, settings, normaliser)
        (gradient,) = torch.autograd.grad(output.loss, inputs.logps_GT)
        torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
        assert (gradient[~inputs.mask_GT] == 0).all()


def one_token(log_ratio: float, advantage: float, **changes: object) -> LossInputs:
    inputs = LossInputs(
        logps_GT=torch.tensor([[log_ratio - 1.0]], dtype=torch.float64, requires_grad=True),
        old_logps_GT=torch.tensor([[-1.0]], dtype=torch.float64),
        ref_logps_GT=None,
        advantages_GT=torch.tensor([[advantage]], dtype=torch.float64),
        mask_GT=torch.ones(1, 1),
    )
    return replace(inputs, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),
        (0.5, 2.0, -1.0, False),
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (1.5, 0.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("importance", ImportanceLevel)
def test_clipping_of_one_token(
    ratio: float, advantage: float, loss: float, is_clipped: bool, importance: ImportanceLevel
):
    inputs = one_token(math.log(ratio), advantage)
    output = grpo_loss(inputs, LossSettings(kl_coef=0, importance_level=importance))
    (gradient,) = torch.autograd.grad(output.loss, inputs.logps_GT)
    assert output.loss.item() == pytest.approx(loss)
    assert output.metrics["loss/clip_fraction"] == is_clipped
    assert gradient.item() == pytest.approx(0.0 if is_clipped else -advantage * ratio)


def test_clip_higher_reaches_further_up_only():
    settings = LossSettings(kl_coef=0, clip_low=0.2, clip_high=0.28)
    assert grpo_loss(one_token(math.log(1.5), 1.0), settings).loss.item() == pytest.approx(-1.28)
    assert grpo_loss(one_token(math.log(0.5), -1.0), settings).loss.item() == pytest.approx(0.8)


def test_on_policy_loss_is_minus_the_advantage_and_its_gradient_is_policy_gradient():
    inputs = make_inputs()
    inputs = replace(inputs, old_logps_GT=inputs.logps_GT.detach(), ref_logps_GT=inputs.logps_GT.detach())
    output = grpo_loss(inputs, LossSettings())
    lengths = inputs.mask_GT.sum(1)
    assert output.loss.item() == pytest.approx(-(inputs.advantages_GT[:, 0] * (lengths > 0)).sum().item() / 5)
    assert output.metrics["loss/kl"] == 0 and output.metrics["loss/clip_fraction"] == 0
    assert output.metrics["loss/ratio_mean"] == 1 and output.metrics["loss/ratio_max"] == 1
    (gradient,) = torch.autograd.grad(output.loss, inputs.logps_GT)
    weights = -inputs.advantages_GT[:, 0] / 5 / lengths.clamp(min=1)
    torch.testing.assert_close(gradient, weights[:, None] * inputs.mask_GT)


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        (KlEstimator.k1, -0.5, 1.0),
        (KlEstimator.k2, 0.125, -0.5),
        (KlEstimator.k3, math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
    ],
)
def test_kl_of_one_token(kl: KlEstimator, value: float, slope: float):
    inputs = one_token(0.0, 0.0, ref_logps_GT=torch.tensor([[-0.5]], dtype=torch.float64))
    output = grpo_loss(inputs, LossSettings(kl_coef=3.0, kl_estimator=kl))
    (gradient,) = torch.autograd.grad(output.loss, inputs.logps_GT)
    assert output.metrics["loss/kl"].item() == pytest.approx(value)
    assert output.loss.item() == pytest.approx(3 * value)
    assert gradient.item() == pytest.approx(3 * slope)


def test_k3_pulls_back_however_far_the_policy_went():
    """Beyond the clamp of the exponential the linear term goes on: its gradient is 1 where exp(delta) vanishes."""
    logps = torch.tensor([[-1.0]], requires_grad=True)
    inputs = LossInputs(logps, logps.detach(), torch.tensor([[-26.0]]), torch.zeros(1, 1), torch.ones(1, 1))
    out = grpo_loss(inputs, LossSettings(kl_coef=1.0))
    assert float(out.loss.detach()) == pytest.approx(24.0)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert float(gradient) == pytest.approx(1.0)


def test_k3_is_accurate_for_tiny_gaps_in_single_precision():
    inputs = one_token(0.0, 0.0)
    inputs = replace(
        inputs,
        logps_GT=torch.zeros(1, 1, requires_grad=True),
        old_logps_GT=torch.zeros(1, 1),
        ref_logps_GT=torch.full((1, 1), 1e-3),
    )
    assert grpo_loss(inputs, LossSettings()).metrics["loss/kl"].item() == pytest.approx(5.0e-7, rel=0.01)


@pytest.mark.parametrize("aggregation", Aggregation)
def test_groups_with_a_shared_normaliser_add_up(aggregation: Aggregation):
    settings = LossSettings(loss_aggregation=aggregation, max_new_tokens=9)
    parts = [make_inputs(seed) for seed in (1, 2, 3)]
    whole = LossInputs(*(torch.cat([getattr(part, name) for part in parts]).detach() for name in FIELDS))
    normaliser = {
        Aggregation.sequence_mean: 15.0,
        Aggregation.token_mean: float(whole.mask_GT.sum()),
        Aggregation.constant: 15.0 * 9,
    }[aggregation]
    summed = sum(grpo_loss(part, settings, normaliser).loss.item() for part in parts)
    assert summed == pytest.approx(grpo_loss(whole, settings).loss.item())


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("importance", ImportanceLevel)
def test_nothing_counts_gives_zero_with_a_gradient(aggregation: Aggregation, importance: ImportanceLevel):
    inputs = replace(make_inputs(), mask_GT=torch.zeros(5, 6))
    output = grpo_loss(inputs, LossSettings(loss_aggregation=aggregation, importance_level=importance))
    output.loss.backward()
    assert output.loss.item() == 0
    assert inputs.logps_GT.grad is not None and (inputs.logps_GT.grad == 0).all()
    assert all(value == 0 for value in output.metrics.values())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("importance", ImportanceLevel)
def test_padding_never_matters(garbage: float, importance: ImportanceLevel):
    inputs, settings = make_inputs(), LossSettings(importance_level=importance)
    clean = grpo_loss(inputs, settings)
    (clean_gradient,) = torch.autograd.grad(clean.loss, inputs.logps_GT)
    padding = ~inputs.mask_GT
    dirty_inputs = replace(
        inputs,
        logps_GT=inputs.logps_GT.detach().masked_fill(padding, garbage).requires_grad_(),
        old_logps_GT=inputs.old_logps_GT.masked_fill(padding, garbage),
        ref_logps_GT=inputs.ref_logps_GT.masked_fill(padding, garbage),  # type: ignore[union-attr]
        mask_GT=inputs.mask_GT.float(),
    )
    dirty = grpo_loss(dirty_inputs, settings)
    (gradient,) = torch.autograd.grad(dirty.loss, dirty_inputs.logps_GT)
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(gradient, clean_gradient)
    assert dirty.metrics == clean.metrics


@pytest.mark.parametrize("kl", KlEstimator)
@pytest.mark.parametrize("importance", ImportanceLevel)
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_gaps_stay_finite(kl: KlEstimator, importance: ImportanceLevel, gap: float):
    logps = torch.full((2, 3), -1.0, requires_grad=True)
    far = torch.full((2, 3), -1.0 + gap)
    inputs = LossInputs(logps, far, far, torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3))
    output = grpo_loss(inputs, LossSettings(kl_estimator=kl, importance_level=importance))
    output.loss.backward()
    assert torch.isfinite(output.loss) and logps.grad is not None and torch.isfinite(logps.grad).all()


def test_half_precision_is_computed_in_single():
    inputs = make_inputs()
    half = LossInputs(*(getattr(inputs, n).detach().bfloat16() for n in FIELDS))
    single = LossInputs(*(getattr(half, n).float() for n in FIELDS))
    output = grpo_loss(half, LossSettings())
    assert output.loss.dtype is torch.float32
    assert torch.equal(output.loss, grpo_loss(single, LossSettings()).loss)


def test_metrics():
    output = grpo_loss(make_inputs(), LossSettings(kl_coef=0.5))
    assert set(output.metrics) == NAMES
    assert not any(value.requires_grad for value in output.metrics.values())
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert metrics["loss/total"] == output.loss.item()
    assert metrics["loss/total"] == pytest.approx(metrics["loss/policy"] + 0.5 * metrics["loss/kl"])
    assert 0 < metrics["loss/clip_fraction"] < 1
    assert metrics["loss/ratio_max"] > metrics["loss/ratio_mean"] > 0


def test_a_kl_penalty_needs_a_reference():
    with pytest.raises(ValueError, match="kl_coef"):
        grpo_loss(one_token(0.0, 1.0), LossSettings(kl_coef=0.04))


def test_settings_come_from_the_config():
    config = GrpoConfig(
        clip_high=0.28, kl_coef=0.0, kl_estimator=KlEstimator.k2, sampling=SamplingConfig(max_new_tokens=7)
    )
    expected = LossSettings(clip_high=0.28, kl_coef=0.0, kl_estimator=KlEstimator.k2, max_new_tokens=7)
    assert LossSettings.from_config(config) == expected
    assert LossSettings.from_config(GrpoConfig()) == LossSettings()
