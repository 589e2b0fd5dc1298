"""sft: a fresh base learns to write like the filtered traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tartvg.config import Config, SettingError
from tartvg.policy.loading import checked_base
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import read_jsonl, trace_from_json
from tartvg.stages.common import base_identity, prompts_of, train_data
from tartvg.stages.folder import StageFolder, run_dir
from tartvg.stages.keys import fingerprint, settings_of
from tartvg.stages.train import Setup, train_stage
from tartvg.stages.validation import validation_key
from tartvg.training import distributed
from tartvg.training.sft_module import SftModule, TraceDataset


def run_sft(config: Config) -> None:
    """Train `<run>/sft/adapter` on `<run>/filter/traces.jsonl`, starting from the untouched base."""
    set_up_torch(config.trainer)
    checked_base(config.policy)
    source = run_dir(config) / "filter" / "traces.jsonl"
    if not source.is_file():
        raise SettingError(f"stage=sft needs {source}: run stage=filter with the same name first")
    output = StageFolder(run_dir(config) / "sft", config, lambda: key_of(config, source), is_training=True)
    with output.work() as is_needed:
        if is_needed:
            _train(config, output.folder, source)


def key_of(config: Config, source: Path) -> dict[str, Any]:
    """What the stage's result depends on; `source` holds the traces."""
    found = settings_of(config, "policy", "anchors.prompt", "anchors.count", "sft", "seed")
    data = train_data(config) | validation_key(config)
    return {**found, **data, "base": base_identity(config), "traces": fingerprint(source)}


def _train(config: Config, folder: Path, source: Path) -> None:
    traces = [trace_from_json(row) for row in read_jsonl(source)]
    with distributed.rank_zero_first():
        prompts = {p.sample.sample_id: p for p in prompts_of(config, "train")}

    def make_module(setup: Setup) -> SftModule:
        return SftModule(setup.policy, config.sft, setup.run, setup.tracker, setup.checkpoint, setup.validation)

    def make_steps(start_step: int) -> TraceDataset:
        share = (distributed.rank(), distributed.world_size())
        return TraceDataset(traces, prompts, config.sft, config.seed, start_step, share)

    max_steps = TraceDataset(traces, prompts, config.sft, config.seed).stop
    inputs = [("traces", "traces", source)]
    train_stage(config, "sft", folder, max_steps, None, make_module, make_steps, inputs)
