"""The stages of the method, one file each: the only rooms that see the others."""

from __future__ import annotations

from importlib import import_module

from tartvg.config import Config, SettingError, StageName
from tartvg.launch.processes import TRAINED, is_parallel, is_started, prepare_allocator

STAGES: dict[StageName, str] = {
    StageName.rollouts: "tartvg.stages.rollouts:run_rollouts",
    StageName.grpo1: "tartvg.stages.grpo:run_grpo1",
    StageName.filter: "tartvg.stages.filter:run_filter",
    StageName.sft: "tartvg.stages.sft:run_sft",
    StageName.grpo2: "tartvg.stages.grpo:run_grpo2",
    StageName.evaluate: "tartvg.stages.evaluate:run_evaluate",
    StageName.ground: "tartvg.stages.ground:run_ground",
    StageName.serve: "tartvg.stages.serve:run_serve",
    StageName.export: "tartvg.stages.export:run_export",
    StageName.check_data: "tartvg.stages.check_data:run_check_data",
    StageName.memory: "tartvg.stages.memory:run_memory",
    StageName.report: "tartvg.stages.report:run_report",
}
"""What runs each stage, as `module:function`; imported when the stage runs, as most of them import torch."""


def run(config: Config) -> int | None:
    """Run the stage that the configuration names. Returns an exit code, None for 0."""
    prepare_allocator()
    from tartvg.stages.quiet import quiet_libraries

    quiet_libraries()
    if not is_started() and not is_parallel(config):
        return run_stage(config.stage.name, config)
    from tartvg.training import distributed

    distributed.init(config.trainer)
    try:
        return run_on_ranks(config.stage.name, config)
    finally:
        distributed.destroy()


def run_stage(name: StageName, config: Config) -> int | None:
    """Run one stage, or all of `stage.sequence` for the pipeline, in this process."""
    if name is StageName.pipeline:
        run_pipeline(config)
        return None
    module, _, function = STAGES[name].partition(":")
    code: int | None = getattr(import_module(module), function)(config)
    if name in TRAINED:  # now, on every rank: an evaluation may use this GPU from another process
        from tartvg.stages.common import free_finished_policies

        free_finished_policies()
    return code


def run_pipeline(config: Config) -> None:
    """Run the stages of `stage.sequence`, one after another."""
    from tartvg.training import distributed

    if not config.stage.sequence:
        raise SettingError("stage.sequence is empty: stage=pipeline needs the stages to run")
    for name in config.stage.sequence:
        if name is StageName.pipeline:
            raise SettingError("stage.sequence must not contain pipeline")
        if distributed.is_rank_zero():
            print(f"-- {name.value} " + "-" * (60 - len(name.value)))
        run_on_ranks(name, config)


def run_on_ranks(name: StageName, config: Config) -> int | None:
    """Run a training stage on all ranks and any other on rank 0, for which the others wait."""
    from tartvg.training import distributed

    if name in (*TRAINED, StageName.pipeline):
        return run_stage(name, config)
    return distributed.on_rank_zero(lambda: run_stage(name, config))
