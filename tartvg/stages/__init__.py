"""The stages of the method, one file each: the only rooms that see the others."""

from __future__ import annotations

from collections.abc import Callable

from tartvg.config import Config, SettingError, StageName
from tartvg.config.processes import TRAINED, is_parallel, is_started


def _pretrain(config: Config) -> None:
    from tartvg.stages.pretrain import run_pretrain

    run_pretrain(config)


def _rollouts(config: Config) -> None:
    from tartvg.stages.rollouts import run_rollouts

    run_rollouts(config)


def _grpo1(config: Config) -> None:
    from tartvg.stages.grpo import run_grpo

    run_grpo(config, "grpo1")


def _filter(config: Config) -> None:
    from tartvg.stages.filter import run_filter

    run_filter(config)


def _sft(config: Config) -> None:
    from tartvg.stages.sft import run_sft

    run_sft(config)


def _grpo2(config: Config) -> None:
    from tartvg.stages.grpo import run_grpo

    run_grpo(config, "grpo2")


def _evaluate(config: Config) -> None:
    from tartvg.stages.controls import run_controls
    from tartvg.stages.evaluate import run_evaluate

    run_evaluate(config)
    run_controls(config)


def _ground(config: Config) -> None:
    from tartvg.stages.ground import run_ground

    run_ground(config)


def _validate(config: Config) -> int:
    from tartvg.stages.validate import run_validate

    return run_validate(config)


def _memory(config: Config) -> None:
    from tartvg.stages.memory import run_memory

    run_memory(config)


def _report(config: Config) -> None:
    from tartvg.stages.report import run_report

    run_report(config)


def _pipeline(config: Config) -> None:
    from tartvg.training import ranks

    if not config.stage.sequence:
        raise SettingError("stage.sequence is empty: stage=pipeline needs the stages to run")
    for name in config.stage.sequence:
        if name is StageName.pipeline:
            raise SettingError("stage.sequence must not contain pipeline")
        if ranks.is_leader():
            print(f"── {name.value} " + "─" * (60 - len(name.value)))
        _by_all_who_must(name, config)


def _by_all_who_must(name: StageName, config: Config) -> int | None:
    """All processes train; whatever else there is to do, the leader does, and the others wait for it."""
    from tartvg.training import ranks

    if name in (*TRAINED, StageName.pipeline):
        return STAGES[name](config)
    return ranks.by_leader(lambda: STAGES[name](config))


# imports wait for their stage, so that a refusal or a help text does not wait for torch
STAGES: dict[StageName, Callable[[Config], int | None]] = {
    StageName.pipeline: _pipeline,
    StageName.pretrain: _pretrain,
    StageName.rollouts: _rollouts,
    StageName.grpo1: _grpo1,
    StageName.filter: _filter,
    StageName.sft: _sft,
    StageName.grpo2: _grpo2,
    StageName.evaluate: _evaluate,
    StageName.ground: _ground,
    StageName.validate: _validate,
    StageName.memory: _memory,
    StageName.report: _report,
}


def run(config: Config) -> int | None:
    """Run the stage that the configuration names. Returns an exit code, None for 0."""
    from tartvg.stages.quiet import quiet_libraries

    quiet_libraries()
    if not is_started() and not is_parallel(config):
        return STAGES[config.stage.name](config)
    from tartvg.training import ranks

    ranks.join(config.trainer)
    try:
        return _by_all_who_must(config.stage.name, config)
    finally:
        ranks.leave()
