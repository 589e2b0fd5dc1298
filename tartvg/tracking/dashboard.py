"""The W&B workspace of a project: which curves stand beside which, as data; and the command that creates it.

python -m tartvg.tracking --entity me --project tartvg         creates it
python -m tartvg.tracking --entity me --groups anchors/anchors kl/kl  creates one that compares two sweeps
python -m tartvg.tracking --print                              prints its specification; no account, no network
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tartvg import rewards
from tartvg.config import SettingError, TrackingConfig
from tartvg.records import dumps
from tartvg.timing import PHASES
from tartvg.tracking.tracker import STEP

NAME = "TAR-TVG"


class PanelKind(Enum):
    """How a panel shows its metrics."""

    line = "line"
    """Curves over `progress/step`."""
    bar = "bar"
    """One bar per run: for stages that log a single line."""
    table = "table"
    """A table of completions; exactly one metric."""
    pictures = "pictures"
    """Film strips."""


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    metrics: tuple[str, ...]
    kind: PanelKind = PanelKind.line


@dataclass(frozen=True)
class Section:
    """Panels that answer one question together."""

    name: str
    panels: tuple[Panel, ...]
    is_open: bool = True


@dataclass(frozen=True)
class Workspace:
    """A saved view of one project. Runs are grouped by W&B's group, which is the run or the sweep, then by stage.

    `evaluate-base` and `evaluate-grpo2` are stages of their own, so that bars compare the policy with its base.
    """

    name: str
    x_axis: str
    sections: tuple[Section, ...]
    groups: tuple[str, ...] = ()
    """Only their runs are shown; all where it is empty."""

    @property
    def metrics(self) -> set[str]:
        """All names that any panel shows."""
        return {metric for section in self.sections for panel in section.panels for metric in panel.metrics}


def workspace(dataset: str, groups: Sequence[str] = ()) -> Workspace:
    """The curated view; `dataset` names the evaluation whose scores are shown, `groups` the runs or sweeps compared."""
    name = f"{NAME}: {', '.join(groups)}" if groups else NAME
    return Workspace(name, STEP, (_evaluation(f"eval/{dataset}"), *_training()), tuple(groups))


def _training() -> tuple[Section, ...]:
    return (
        Section(
            "Does it learn?",
            (
                Panel("Reward", ("reward/total_mean",)),
                Panel("Answer: soft IoU", ("reward/iou_mean",)),
                Panel("Format kept", ("reward/format_mean",)),
                Panel("Valid: format and two anchors", ("anchors/valid_rate",)),
            ),
        ),
        Section(
            "Anchors and faithfulness",
            (
                Panel("Anchors per completion", ("anchors/count_mean",)),
                Panel("Share of completions with an anchor", ("anchors/anchored_rate",)),
                Panel("Later anchor closer to the truth", ("anchors/refinement_rate",)),
                Panel("IoU of the first and of the last anchor", ("anchors/first_iou_mean", "anchors/last_iou_mean")),
                Panel("Gain, and held back (IoU)", ("anchors/gain_mean", "anchors/held_back_mean")),
                Panel("First anchor exact, and said twice", ("anchors/first_exact_rate", "anchors/equal_rate")),
                Panel(
                    "First anchor not exact: refined, made worse",
                    ("anchors/inexact_refined_rate", "anchors/inexact_worsened_rate"),
                ),
                Panel("Answer is the last anchor", ("anchors/answer_match_rate",)),
                Panel("Same times with shuffled frames", ("anchors/shuffled_agreement",)),
                Panel("Reward terms", tuple(f"reward/{term.name}_mean" for term in rewards.rubric.TERMS)),
            ),
        ),
        Section(
            "Throughput and memory",
            (
                Panel("Tokens per second", ("perf/tokens_per_second_sampled", "perf/tokens_per_second_trained")),
                Panel("Seconds per step", ("perf/seconds_per_step", *(f"time/{phase}_s" for phase in PHASES))),
                Panel("Model FLOPs utilisation", ("perf/mfu",)),
                Panel("Peak memory, GiB", ("memory/peak_gib",)),
            ),
        ),
        Section(
            "What it says",
            (Panel("Completions, to be grouped by their faults", ("rollout/examples",), PanelKind.table),),
        ),
        Section(
            "Is it healthy?",
            (
                Panel("Entropy, nats per token", ("rollout/entropy",)),
                Panel("KL to the reference, nats per token", ("rollout/kl",)),
                Panel("Groups that teach nothing", ("group/zero_variance_rate",)),
                Panel("Cut off by the length limit", ("rollout/truncated_rate",)),
                Panel("Gradient norm", ("optim/grad_norm",)),
                Panel("Tokens clipped", ("loss/clip_fraction",)),
                Panel("Loss", ("loss/total",)),
                Panel("Length, tokens", ("rollout/length_mean", "rollout/length_max")),
            ),
        ),
    )


def _evaluation(prefix: str) -> Section:
    bars = {
        "mIoU": ("miou",),
        "R1": ("r1@0.3", "r1@0.5", "r1@0.7"),
        "Format and valid": ("format_rate", "valid_rate"),
        "Refined, and answer is the last anchor": ("refinement_rate", "answer_match_rate"),
        "IoU of the first anchor, of the last": ("first_iou", "last_iou"),
        "First anchor exact, said twice": ("first_exact_rate", "equal_rate"),
        "mIoU with wrong videos": ("shuffled_control_miou", "other_control_miou"),
    }
    panels = [Panel(t, tuple(f"{prefix}/{name}" for name in names), PanelKind.bar) for t, names in bars.items()]
    panels.append(Panel("Film strips of the best and worst answers", (f"{prefix}/film_strips",), PanelKind.pictures))
    panels.append(Panel("Answers, to be grouped by their faults", (f"{prefix}/answers",), PanelKind.table))
    return Section("Policy against base", tuple(panels))


def create(view: Workspace, entity: str, project: str) -> str:
    """Save the workspace in W&B; returns its address. Raises SettingError without the extra `workspace`."""
    made = to_wandb(view, entity, project).save()
    return str(made.url)


def to_wandb(view: Workspace, entity: str, project: str) -> Any:
    """The view in the terms of wandb-workspaces; nothing is sent yet. Raises SettingError without that package."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
    except ImportError as error:
        raise SettingError(f"wandb-workspaces is missing: pip install 'tartvg[workspace]' ({error})") from error
    sections = [
        workspaces.Section(
            name=section.name,
            is_open=section.is_open,
            panels=[_panel(panel, view.x_axis, reports) for panel in section.panels],
        )
        for section in view.sections
    ]
    grouped = workspaces.RunsetSettings(
        groupby=[workspaces.Metric("Group"), workspaces.Config("stage")],
        filters=expr.And(workspaces.Metric("Group").isin(list(view.groups))) if view.groups else [],
    )
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=view.name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=view.x_axis),
        runset_settings=grouped,
    )


def _panel(panel: Panel, x_axis: str, reports: Any) -> Any:
    if panel.kind is PanelKind.line:
        return reports.LinePlot(title=panel.title, x=x_axis, y=list(panel.metrics))
    if panel.kind is PanelKind.bar:
        return reports.BarPlot(title=panel.title, metrics=list(panel.metrics))
    if panel.kind is PanelKind.pictures:
        return reports.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
    return reports.WeavePanelSummaryTable(table_name=panel.metrics[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tartvg.tracking", description="The project's workspace in W&B.")
    parser.add_argument("--entity", help="whose project it is: a user or a team")
    parser.add_argument("--project", default=TrackingConfig().project)
    parser.add_argument("--dataset", default="planted", help="whose scores are shown: planted, charades_sta, ...")
    parser.add_argument("--groups", nargs="+", default=(), help="W&B groups to compare: those of two sweeps, say")
    parser.add_argument("--print", action="store_true", help="only print the specification, as JSON")
    options = parser.parse_args(arguments)
    view = workspace(options.dataset, options.groups)
    if options.print:
        print(dumps(view))
        return 0
    if not options.entity:
        parser.error("--entity is needed to create the workspace; --print only shows it")
    try:
        print(create(view, options.entity, options.project))
    except SettingError as error:
        print(f"error: {error}")
        return 2
    return 0
