"""sft: a fresh base learns to write like the filtered traces."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from tartvg.config import Config, SettingError
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import read_jsonl, to_json, trace_from_json
from tartvg.stages.choice import selection_key, selection_of
from tartvg.stages.common import base_identity, keep_before, load_policy, prompts_of
from tartvg.stages.folder import StageFolder, fingerprint, run_dir
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.batches import first
from tartvg.training.faults import FAULTS
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer


def run_sft(config: Config) -> None:
    """Train `<run>/sft/adapter` on `<run>/filter/traces.jsonl`, starting from the untouched base."""
    set_up_torch(config.trainer)
    source = run_dir(config) / "filter" / "traces.jsonl"
    if not source.is_file():
        raise SettingError(f"stage=sft needs {source}: run stage=filter with the same name first")
    key = {
        "policy": config.policy, "dataset": config.dataset, "prompt": config.anchors.prompt,
        "target": config.anchors.target, "sft": config.sft, "seed": config.seed, "traces": fingerprint(source),
        "base": base_identity(config), "threads": config.trainer.num_threads, **selection_key(config),
    }  # fmt: skip
    place = StageFolder(run_dir(config) / "sft", config, key)
    with place.work() as is_needed:
        if is_needed:
            _train(config, place.folder, source)


def _train(config: Config, folder: Path, source: Path) -> None:
    traces = [trace_from_json(row) for row in read_jsonl(source)]
    with distributed.rank_zero_first():
        prompts = {p.sample.sample_id: p for p in prompts_of(config, "train")}
    policy = load_policy(config, None, is_trained=True)
    max_steps = TraceDataset(traces, prompts, config.sft, config.seed).stop
    run = StageRun.from_config(config.trainer, "sft", folder, config.seed, max_steps, config.monitors)
    is_rank_zero = distributed.is_rank_zero()
    tracker = Tracker(folder, config.tracking, config.name, "sft", to_json(config), config.seed, is_active=is_rank_zero)
    module = SftModule(policy, config.sft, run, tracker)
    module.selection = selection_of(config, folder, max_steps)
    tracker.resume_at(module.start_step)
    if is_rank_zero:
        keep_before(folder / FAULTS, module.start_step)
    share = (distributed.rank(), distributed.world_size())
    steps = TraceDataset(traces, prompts, config.sft, config.seed, module.start_step, share)
    with tracker, module.preemptible():
        tracker.uses("traces", "traces", source)
        if len(steps):
            loader = DataLoader(steps, batch_size=1, shuffle=False, collate_fn=first)
            make_trainer(config.trainer, folder, config.sft.max_grad_norm).fit(module, loader)
        module.save_result()
        tracker.artifact("sft-adapter", "adapter", folder / "adapter")
