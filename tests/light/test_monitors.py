"""The monitors as pure functions: each bound from both sides, memory, and what an interruption leaves behind."""

import json
import math

import pytest

from tartvg.config import FaithfulnessConfig, MonitorName, MonitorsConfig, SettingError, TrackingConfig, TrackingMode
from tartvg.monitors import MONITORS, Watch
from tartvg.tracking import Tracker

WINDOW = 2
HEALTHY = {
    "reward/format_mean": 0.6,
    "anchors/count_mean": 2.1,
    "anchors/refinement_rate": 0.45,
    "anchors/pairs_mean": 1.0,
    "anchors/shuffled_agreement": 0.4,
    "group/zero_variance_rate": 0.1,
    "rollout/truncated_rate": 0.02,
    "rollout/entropy": 0.5,
    "rollout/kl": 0.03,
    "optim/grad_norm": 0.7,
    "loss/total": -0.01,
}


def lines(*changes):
    return [{**HEALTHY, **change} for change in changes]


def fired(rows, target=2):
    found = {name: monitor(rows, WINDOW, target) for name, monitor in MONITORS.items()}
    return {name.value: finding for name, finding in found.items() if finding is not None}


def test_every_monitor_has_a_function_and_all_are_watched():
    assert list(MONITORS) == list(MonitorName) == MonitorsConfig().watch


def test_a_healthy_training_and_an_empty_one_raise_nothing():
    assert fired([]) == {}
    assert fired(lines({}, {}, {}, {})) == {}
    assert fired([{}, {}, {}]) == {}, "sft logs no anchors"


@pytest.mark.parametrize(
    "name,before,metric,value,bound",
    [
        ("reward_hacking", [{}], "anchors/count_mean", 2.6, 2.5),
        ("stagnant_refinement", [{}], "anchors/refinement_rate", 0.19, 0.2),
        ("zero_variance", [{}], "group/zero_variance_rate", 0.76, 0.75),
        ("truncation", [{}], "rollout/truncated_rate", 0.51, 0.5),
        ("entropy_collapse", [{}], "rollout/entropy", 0.04, 0.05),
        ("format_collapse", [{}], "reward/format_mean", 0.29, 0.3),
    ],
)
def test_a_mean_over_the_window_beyond_its_bound(name, before, metric, value, bound):
    beyond = {metric: value}
    two_before = [*before, *before]
    assert fired(lines(*two_before, {metric: bound}, {metric: bound})) == {}
    assert fired(lines(*two_before, beyond)) == {}, "one step is not a window"
    (finding,) = (found := fired(lines(*two_before, beyond, beyond))).values()
    assert list(found) == [name]
    assert (finding.metric, finding.value, finding.bound) == (metric, pytest.approx(value), pytest.approx(bound))


@pytest.mark.parametrize(
    "name,metric,value",
    [
        ("kl_blowup", "rollout/kl", 0.51),
        ("video_blindness", "anchors/shuffled_agreement", 0.91),
        ("non_finite", "optim/grad_norm", math.nan),
        ("non_finite", "optim/grad_norm", math.inf),
        ("non_finite", "loss/total", None),
    ],
)
def test_some_are_judged_at_once(name, metric, value):
    assert list(fired(lines({}, {metric: value}))) == [name]


def test_metrics_that_are_not_measured_at_every_step_keep_their_last_value():
    rows = lines({"rollout/kl": 0.9}, {})
    del rows[1]["rollout/kl"]
    assert list(fired(rows)) == ["kl_blowup"]


def test_the_bound_on_anchors_follows_their_count():
    many = lines({"anchors/count_mean": 3.0}, {"anchors/count_mean": 3.0})
    assert list(fired(many)) == ["reward_hacking"]
    assert fired(many, target=3) == {}


def test_format_collapse_needs_something_to_lose():
    """Halving 0.18 is noise; halving 0.22 is not. The best is a mean over the window, not one lucky step."""

    def course(*rates):
        return fired(lines(*({"reward/format_mean": rate} for rate in rates)))

    assert course(0.18, 0.18, 0.02, 0.02) == {}
    assert list(course(0.22, 0.22, 0.02, 0.02)) == ["format_collapse"]
    assert course(0.0, 0.9, 0.1, 0.5) == {}, "half of the best mean is 0.25, half of the best step 0.45"


def test_refinement_counts_pairs_and_needs_some():
    few = {"anchors/refinement_rate": 0.0, "anchors/pairs_mean": 0.05}
    assert fired(lines(few, few)) == {}
    # 1 of 10 pairs, then 9 of 90: the mean of the two rates is 0.5, but 10 of 100 pairs refined
    rows = lines(
        {"anchors/refinement_rate": 0.9, "anchors/pairs_mean": 0.1},
        {"anchors/refinement_rate": 0.1, "anchors/pairs_mean": 0.9},
    )
    assert fired(rows)["stagnant_refinement"].value == pytest.approx(0.18)


def test_sandbagging_is_a_first_anchor_that_gets_no_better_while_the_best_pulls_away():
    def course(*pairs, target=2):
        found = lines(*({"anchors/held_back_mean": a, "anchors/first_iou_mean": b} for a, b in pairs))
        return fired(found, target=target)

    before = [(0.10, 0.60)] * WINDOW
    held = course(*before, *[(0.17, 0.58)] * WINDOW)
    assert list(held) == ["sandbagging"] and held["sandbagging"].bound == pytest.approx(0.16)
    assert course(*before, *[(0.15, 0.58)] * WINDOW) == {}, "it hardly pulls away"
    assert course(*before, *[(0.17, 0.62)] * WINDOW) == {}, "the first improves too, only less"
    assert course(*before, (0.20, 0.5)) == {}, "one step is not a window"
    assert course(*[(0.2, 0.5)] * WINDOW, *before) == {}, "it holds back less than it did"
    assert course((0.0, 0.0), *[(0.2, 0.5)] * WINDOW) == {}, "at first nothing had two anchors"
    alone = course(*before, *[(0.17, 0.58)] * WINDOW, target=1)
    assert "sandbagging" not in alone, "with one anchor there is nothing to hold back"


def test_entropy_has_a_floor_of_its_own():
    low = {"rollout/entropy": 0.019}
    assert list(fired(lines(low, low))) == ["entropy_collapse"]


def test_an_alarm_rings_once_and_again_after_it_was_over():
    watch = Watch(MonitorsConfig(), 2, window=1)
    rates = [0.0, 0.9, 0.9, 0.1, 0.8]
    rung = [
        len(watch.see(line, step)) for step, line in enumerate(lines(*({"rollout/truncated_rate": r} for r in rates)))
    ]
    assert rung == [0, 1, 0, 0, 1]


def test_only_what_is_watched_rings_and_only_what_is_told_to_stop_stops():
    rule = MonitorsConfig(watch=[MonitorName.truncation, MonitorName.kl_blowup], stop=[MonitorName.kl_blowup])
    watch = Watch(rule, 2, window=1)
    bad = {"rollout/truncated_rate": 1.0, "rollout/kl": 2.0, "optim/grad_norm": math.nan}
    alarms = watch.see(lines(bad)[0], 7)
    assert [a.monitor for a in alarms] == ["truncation", "kl_blowup"]
    assert [a.monitor for a in watch.stops(alarms)] == ["kl_blowup"]
    assert alarms[1].text.startswith("step 7: ") and "rollout/kl is 2, the bound is 0.5" in alarms[1].text


def test_settings_out_of_range_are_refused_by_name():
    with pytest.raises(SettingError, match=r"monitors\.kl_every must be >= 0, got -1"):
        MonitorsConfig(kl_every=-1)
    with pytest.raises(SettingError, match=r"monitors\.stop"):
        MonitorsConfig(watch=[], stop=[MonitorName.non_finite])
    with pytest.raises(SettingError, match=r"faithfulness\.num_queries"):
        FaithfulnessConfig(num_queries=0)


def test_alarms_are_shown_in_a_table(tmp_path):
    from tartvg.report.alarms import alarms_table

    assert alarms_table(tmp_path) is None
    train(tmp_path / "grpo1", range(9))
    table = alarms_table(tmp_path)
    assert [[cell.text for cell in row[:4]] for row in table.rows] == [
        ["grpo1", "truncation", "4", "1"],
        ["grpo1", "non_finite", "6", "not finite"],
    ]


def course(step):
    """Truncation from step 3 on, non-finite gradients at step 6."""
    return {**HEALTHY, "rollout/truncated_rate": float(step >= 3), "optim/grad_norm": math.inf if step == 6 else 0.5}


def train(folder, steps, resume_step=0):
    """What StepModule does with a tracker and a watch."""
    watch = Watch(MonitorsConfig(), 2, WINDOW)
    with Tracker(folder, TrackingConfig(mode=TrackingMode.off), "r", "grpo1", {}, 0, resume_step) as tracker:
        watch.replay(tracker.history())
        for step in steps:
            tracker.log(course(step), step)
            tracker.alarms(watch.see(course(step), step))


def test_an_interrupted_run_ends_with_the_alarms_of_one_that_was_not(tmp_path, capsys):
    train(tmp_path / "whole", range(9))
    whole = (tmp_path / "whole/alarms.jsonl").read_bytes()
    assert [(a["monitor"], a["step"]) for a in map(json.loads, whole.splitlines())] == [
        ("truncation", 4),
        ("non_finite", 6),
    ]
    assert "warning: grpo1, monitor truncation: step 4: most completions are cut off" in capsys.readouterr().err
    for cut in (2, 4, 5, 7):
        train(tmp_path / f"cut{cut}", range(8))
        train(tmp_path / f"cut{cut}", range(cut, 9), resume_step=cut)
        assert (tmp_path / f"cut{cut}/alarms.jsonl").read_bytes() == whole, cut
