"""What a stage leaves behind when it ends: no copy of the base, and no policy."""

import gc
import weakref
from functools import partial

import pytest
import torch
from forking import call
from helpers.settings import composed
from helpers.training import RUBRIC, fit, lines, make_grpo

from tartvg.config import TrainerConfig
from tartvg.policy import torch_setup
from tartvg.policy.torch_setup import set_up_torch


def test_deterministic_algorithms_are_for_the_cpu(monkeypatch):
    """On a GPU they would not make it deterministic, and fill all memory before it is used."""
    monkeypatch.setattr(torch_setup, "refuse_missing_gpus", lambda _: None)
    before = torch.get_num_threads()
    try:
        set_up_torch(TrainerConfig(accelerator="gpu", num_threads=before))
        assert not torch.are_deterministic_algorithms_enabled()
        set_up_torch(TrainerConfig(num_threads=before))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_end_of_a_fit_moves_no_weight(policy, prompts, tmp_path, monkeypatch):
    module = make_grpo(policy, tmp_path, RUBRIC)
    applied = []
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: applied.append(type(self).__name__))
    fit(module, tmp_path, prompts, 2)
    assert applied == [] and len(lines(tmp_path / "metrics.jsonl")) == 2


def held(weight):
    """Elements in memory of a weight, and of this rank's part of it under ZeRO-3."""
    part = getattr(weight, "ds_tensor", None)
    return weight.numel() + (0 if part is None else part.numel())


def run_and_look(overrides, is_partitioned):
    """Run a stage in this process; 0 where its policy is gone, or under ZeRO-3, whose records keep it, is empty."""
    import tartvg.stages.train as train
    from tartvg.stages import run
    from tartvg.stages.common import free_finished_policies

    left, load = [], train.load_policy

    def watched(*arguments, **options):
        policy = load(*arguments, **options)
        left.append(weakref.ref(policy))
        return policy

    train.load_policy = watched
    run(composed(*overrides))
    assert len(left) == 1
    free_finished_policies()
    policy = left[0]()
    if policy is None:
        return 0
    print("alive, referred to by", [str(type(r)) for r in gc.get_referrers(policy)])
    sizes = {name: held(weight) for name, weight in policy.named_parameters() if held(weight)}
    print("not empty:", sizes)
    return len(sizes) if is_partitioned else 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero2", "zero3"])
def test_nothing_of_a_finished_stage_stays_in_memory(strategy, small, tmp_path):
    trainer = "cpu" if strategy == "single" else strategy
    overrides = [
        f"trainer={trainer}", *small, "stage=grpo1", "grpo.max_steps=2", "grpo.sampling.max_new_tokens=16",
        "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_workers=0", f"runs_dir={tmp_path}", "name=r",
        "trainer.zero3.param_persistence_threshold=0",
    ]  # fmt: skip
    said = tmp_path / "said"
    assert call(partial(run_and_look, overrides, strategy == "zero3"), output=said).wait(300) == 0, said.read_text()
    assert (tmp_path / "r/grpo1/adapter/adapter_model.safetensors").exists()
