"""The W&B workspace: valid JSON that names only metrics that exist, and what wandb-workspaces makes of it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tartvg.config import AnchorsConfig, ControlName, RewardConfig, SettingError
from tartvg.rewards import Rubric
from tartvg.tracking.dashboard import Panel, PanelKind, Section, Workspace, main, to_wandb, workspace
from tartvg.tracking.tracker import check_name


@pytest.fixture(scope="module")
def existing() -> set[str]:
    """Every name that a training or an evaluation logs, asked of the code that makes them."""
    torch = pytest.importorskip("torch")
    from tartvg.grpo import LossInputs, LossSettings, grpo_loss, rollout_metrics
    from tartvg.stages.controls import controls_as_metrics
    from tartvg.stages.evaluate import scores_as_metrics
    from tartvg.timing import PhaseTimer
    from tartvg.training.throughput import Throughput
    from tartvg.types import (
        Completion,
        Estimate,
        GroundingSample,
        Prompt,
        Response,
        Rollout,
        RolloutGroup,
        Scorecard,
        Span,
    )

    sample = GroundingSample("s", Path("v"), "q", (Span(0, 1),), 2.0, "train")
    response = Response((), None, ())
    reward = Rubric(RewardConfig(), AnchorsConfig()).score(response, sample)
    rollout = Rollout(Completion("", (1,), (-1.0,), True), response, reward)
    zeros = torch.zeros(2, 1)
    loss = grpo_loss(LossInputs(zeros, zeros, zeros, zeros, torch.ones(2, 1)), LossSettings())
    some = Estimate(0.5, 0.4, 0.6)
    card = Scorecard(1, 0, 0, some, dict.fromkeys((0.3, 0.5, 0.7), some))
    times = PhaseTimer().flush()
    counted = Throughput(1, torch.device("cpu"))
    counted.num_sampled = counted.num_trained = 1
    throughput = counted.metrics({name: 1.0 for name in times})
    control = dict.fromkeys(("agreement", "changed_rate", "real_miou", "control_miou"), 0.5)
    return {
        *rollout_metrics([RolloutGroup(Prompt(sample, ""), (rollout,), 0)], 2),
        *loss.metrics,
        *times,
        *{name for name in throughput if not name.startswith("memory/peak_gib_rank")},
        "perf/mfu",  # on a GPU only
        *scores_as_metrics(card, "charades_sta"),
        *controls_as_metrics({kind.value: control for kind in ControlName}, "charades_sta"),
        *{"optim/grad_norm", "optim/lr", "rollout/kl", "anchors/shuffled_agreement", "anchors/shuffled_changed_rate"},
        *{"rollout/examples", "eval/charades_sta/answers", "eval/charades_sta/film_strips"},
    }


def test_it_names_only_what_exists(existing: set[str]) -> None:
    view = workspace("charades_sta")
    assert view.metrics <= existing, view.metrics - existing
    for name in view.metrics:
        check_name(name)
    assert view.x_axis == "progress/step"
    panels = [panel for section in view.sections for panel in section.panels]
    assert all(len(panel.metrics) == 1 for panel in panels if panel.kind is PanelKind.table)
    assert len({panel.title for panel in panels}) == len(panels)


def test_its_specification_is_printed_as_json_without_torch_and_without_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from tartvg.tracking.dashboard import main; main(['--print', '--dataset', 'tacos']);"
        "assert not {'torch', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    value = json.loads(done.stdout)
    assert value["sections"][0]["panels"][0] == {"title": "mIoU", "metrics": ["eval/tacos/miou"], "kind": "bar"}
    first = ["Policy against base", "Does it learn?", "Anchors and faithfulness", "Throughput and memory"]
    assert [s["name"] for s in value["sections"]][:4] == first and all(s["is_open"] for s in value["sections"])
    assert {m for s in value["sections"] for p in s["panels"] for m in p["metrics"]} == workspace("tacos").metrics


def test_the_command_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "--entity" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb_workspaces", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SettingError, match=r"tartvg\[workspace\]"):
        to_wandb(workspace("planted"), "me", "p")


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_what_is_sent_is_json_with_every_panel() -> None:
    pytest.importorskip("wandb_workspaces")
    view = workspace("planted")
    model = to_wandb(view, "me", "tartvg")._to_model()
    spec = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))["spec"]
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == [s.name for s in view.sections]
    assert [len(s["panels"]) for s in sections] == [len(s.panels) for s in view.sections]
    sent = set(strings(spec))
    assert view.metrics <= {text.removeprefix("summary:") for text in sent}, view.metrics - sent
    assert view.x_axis in sent and {"group", "stage.value"} <= sent


def test_two_sweeps_are_compared_in_a_view_of_their_own() -> None:
    pytest.importorskip("wandb_workspaces")
    model = to_wandb(workspace("planted", ["anchors/anchors", "kl/kl"]), "me", "tartvg")._to_model()
    value = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    (condition,) = value["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"]) == ("IN", ["anchors/anchors", "kl/kl"])
    assert value["displayName"] == "TAR-TVG: anchors/anchors, kl/kl"


def test_a_workspace_knows_its_metrics() -> None:
    panels = (Panel("a", ("x/a", "x/b")), Panel("b", ("x/b",)))
    assert Workspace("w", "x", (Section("s", panels),)).metrics == {"x/a", "x/b"}
