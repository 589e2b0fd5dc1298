"""What does not fit into memory is done in parts, and left out in the end. The system itself refuses the memory."""

import dataclasses
import multiprocessing
import os
import resource
import traceback
from pathlib import Path

import pytest
import torch
from helpers.policies import planted_prompts, tiny_policy
from helpers.training import CPU, GRPO, OFF, RUBRIC, fit, lines, make_grpo

from tartvg.config import Aggregation, SftConfig, TrainerConfig
from tartvg.grpo import LossOutput, merged_metrics
from tartvg.policy.policy import token_batch
from tartvg.tracking import Tracker
from tartvg.training.faults import Faults
from tartvg.training.grpo_module import TrainingGroup
from tartvg.training.out_of_memory import in_fewest_parts, is_out_of_memory, row_slices
from tartvg.training.sft_module import SftModule, TraceDataset
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer
from tartvg.training.update import GroupLoss, LocalUpdate
from tartvg.types import Completion, RolloutGroup, Trace


def too_much():
    """An allocation that the system really refuses."""
    return torch.empty(1 << 50, dtype=torch.uint8)


def test_torch_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        too_much()
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as caught:
        bytearray(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'", False),
    ],
)
def test_what_cuda_says_of_lacking_memory(text, is_it):
    """The words of the libraries; every one of them comes as a RuntimeError or as a subclass of it."""
    for kind in (RuntimeError, torch.AcceleratorError):
        assert is_out_of_memory(kind(text)) == is_it
    assert not is_out_of_memory(ValueError(text))


def test_memory_is_given_back_before_sampling_again(policy, prompts, tmp_path, monkeypatch):
    """Else the halves would be cut out of what the attempt before has left in pieces."""
    happened = []
    monkeypatch.setattr("tartvg.training.grpo_module.free_cached_memory", lambda: happened.append("freed"))
    module = make_grpo(policy, tmp_path, RUBRIC)

    def sample(prepared, *_):
        happened.append(len(prepared))
        return too_much() if len(prepared) > 1 else [[] for _ in prepared]

    policy.sample = sample
    encoded = [(index, policy.prepare(prompt)) for index, prompt in enumerate(prompts[:2])]
    assert len(module.sample(encoded, 0)) == 2
    assert happened == [2, "freed", 1, 1]


@pytest.mark.parametrize("parts", [2, 3, 5, 99])
def test_slices_cover_all_rows_once(parts):
    slices = row_slices(5, parts)
    assert [i for s in slices for i in range(5)[s]] == list(range(5)) and len(slices) == min(parts, 5)


def rows_that_fit(limit):
    """Work on rows 0..7 that really runs out of memory for more than `limit` of them."""

    def work(part):
        rows = list(range(8))[part]
        return rows if len(rows) <= limit else too_much()

    return work


def test_rows_are_halved_until_they_fit():
    assert in_fewest_parts(rows_that_fit(8), 8) == [list(range(8))]
    assert in_fewest_parts(rows_that_fit(3), 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(RuntimeError, match="allocate"):
        in_fewest_parts(rows_that_fit(0), 8)


class OneWeight:
    """What `LocalUpdate.gradients` asks of an engine."""

    def __init__(self):
        self.parameters = [torch.nn.Parameter(torch.ones(()))]


def local_gradients(groups_of, tmp_path, rows_per_pass=None):
    """Gradients, outputs and faults of groups that are made from the one weight."""
    engine = OneWeight()
    faults = Faults(tmp_path, max_skipped=5)
    update = LocalUpdate(engine, None, faults, 1.0, rows_per_pass)
    (gradient,), outputs = update.gradients(groups_of(engine.parameters[0]), step=0)
    return float(gradient), outputs, lines(tmp_path / "faults.jsonl") if (tmp_path / "faults.jsonl").exists() else []


def test_a_group_that_never_fits_is_left_out_and_the_others_are_not(tmp_path):
    limits, attempts = [8, 3, 0], []

    def groups_of(weight):
        def loss(group, part):
            attempts.append(group)
            rows = rows_that_fit(limits[group])(part)
            return LossOutput(weight * 10**group * len(rows), {"rows": torch.tensor(len(rows))}, len(rows))

        return [GroupLoss(str(g), 8, 8, lambda part, g=g: loss(g, part)) for g in range(3)]

    gradient, outputs, faults = local_gradients(groups_of, tmp_path)
    assert gradient == 8 + 80  # an attempt that failed leaves nothing behind
    assert [[int(o.metrics["rows"]) for o in parts] for parts in outputs] == [[8], [2, 2, 2, 2], []]
    actions = [(f["samples"], f["action"]) for f in faults]
    tried = {g: [f"tried in {n} parts" for n in parts] for g, parts in (("1", (2, 4)), ("2", (2, 4, 8)))}
    assert actions == [([g], a) for g in "12" for a in tried[g]] + [(["2"], "left out")]
    assert all("allocate" in f["error"] for f in faults) and len(attempts) > 8

    def nothing_of(weight):
        return groups_of(weight)[2:]

    (tmp_path / "nothing").mkdir()
    gradient, outputs, _ = local_gradients(nothing_of, tmp_path / "nothing")
    assert (gradient, outputs) == (0.0, [[]])


def test_another_error_is_no_lack_of_memory(tmp_path):
    def broken(part):
        raise ValueError("else")

    with pytest.raises(ValueError, match="else"):
        local_gradients(lambda weight: [GroupLoss("a", 8, 8, broken)], tmp_path)
    assert not (tmp_path / "faults.jsonl").exists()


@pytest.mark.parametrize(("rows_per_pass", "sizes"), [(None, [8]), (3, [2, 3, 3]), (8, [8]), (1, [1] * 8)])
def test_rows_per_pass_bounds_every_pass(tmp_path, rows_per_pass, sizes):
    def groups_of(weight):
        return [
            GroupLoss("a", 8, 8, lambda part: LossOutput(weight * len(rows_that_fit(8)(part)), {}, len(range(8)[part])))
        ]

    gradient, (outputs,), faults = local_gradients(groups_of, tmp_path, rows_per_pass)
    assert gradient == 8 and sorted(o.num_tokens for o in outputs) == sizes and not faults


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("is_by_token", [False, True])
def test_a_group_in_parts_has_the_same_gradient(policy, prompts, tmp_path, aggregation, is_by_token):
    module = make_grpo(policy, tmp_path, RUBRIC, dataclasses.replace(GRPO, loss_aggregation=aggregation))
    prepared = policy.prepare(prompts[0])
    completions = [Completion("x", tuple(range(20, 20 + n)), (-3.0,) * n, True) for n in (5, 2, 7, 3, 4)]
    tokens = token_batch(completions, policy.device)
    with policy.as_reference():
        reference_GT = policy.logps(prepared, tokens) + 0.1
    group = RolloutGroup(prompts[0], (), 0)
    coef_GT = torch.linspace(0, 0.1, 7).expand(5, 7) if is_by_token else None
    work = TrainingGroup(0, prepared, group, tokens, reference_GT, torch.zeros_like(tokens.logps), coef_GT)
    advantages_GT = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0])[:, None]
    if is_by_token:
        advantages_GT = advantages_GT * torch.linspace(-1, 1, 7)

    def gradient(slices):
        module.zero_grad()
        for part in slices:
            parts.append(module.loss(work, advantages_GT, part, num_groups=2))
            parts[-1].loss.backward()
        return torch.cat([p.grad.flatten() for p in module.engine.parameters if p.grad is not None])

    parts = []
    whole, metrics = gradient(row_slices(5, 1)), parts[0].metrics
    parts = []
    split = gradient(row_slices(5, 3))
    assert whole.abs().max() > 0
    assert torch.allclose(whole, split, rtol=1e-4, atol=1e-7)
    merged = merged_metrics(parts)
    assert {k: float(v) for k, v in merged.items()} == pytest.approx(
        {k: float(v) for k, v in metrics.items()}, abs=1e-5
    )


def address_space():
    """Bytes, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.slow
def test_a_step_in_too_little_memory_is_done_in_parts(untrained_base, prompts, planted_root, tmp_path):
    """In a process of its own: earlier tests leave memory behind that needs no asking for."""
    work = multiprocessing.get_context("spawn").Process(
        target=little_memory, args=(untrained_base, planted_root, tmp_path)
    )
    work.start()
    work.join(300)
    assert work.exitcode == 0


def little_memory(base, root, tmp_path):
    """The system itself refuses the memory (RLIMIT_AS): the same step, the same gradient, in parts.

    How much is too little depends on the system's allocator. So the limit falls until it is felt, and every try is a
    fork of this process, which never ran the step: what one try allocated is not there for the next to use again.
    """
    torch.set_num_threads(1)
    policy, prompts = tiny_policy(base), planted_prompts(root)
    settings = dataclasses.replace(GRPO, group_size=96, kl_coef=0.0, max_steps=1,
                                   sampling=dataclasses.replace(GRPO.sampling, max_new_tokens=64))  # fmt: skip

    def step(folder, margin):
        folder.mkdir()
        module = make_grpo(policy, folder, RUBRIC, settings)
        module.advantages = lambda group: (torch.arange(96.0) % 7 - 3)[:, None]
        update = module.update

        def limited(losses, step):
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if margin is not None:
                resource.setrlimit(resource.RLIMIT_AS, (address_space() + margin, hard))
            try:
                return update(losses, step)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

        module.update = limited
        fit(module, folder, prompts[:1], 1, per_step=1)

    def tried(name, margin=None):
        """The folder of one try, which ends well also where a part of the step was left out."""
        child = os.fork()
        if not child:
            code = 1
            try:
                step(tmp_path / name, margin)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return tmp_path / name

    free = tried("free")
    assert not (free / "faults.jsonl").exists()
    margin = 512 << 20
    tight = tried("tight", margin)
    while not (tight / "faults.jsonl").exists():
        margin = margin * 3 // 4
        assert margin > 1 << 20, "no limit was felt"
        tight = tried(f"tight_{margin}", margin)
    faults = lines(tight / "faults.jsonl")
    assert {fault["kind"] for fault in faults} == {"out_of_memory"}
    assert faults[0]["action"] == "tried in 2 parts" and "allocate" in faults[0]["error"]
    assert not any(fault["action"] == "left out" for fault in faults)
    measured, expected = (lines(folder / "metrics.jsonl")[0] for folder in (tight, free))
    for name in ("optim/grad_norm", "loss/total", "loss/ratio_mean"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)


def test_fine_tuning_takes_the_traces_of_a_query_in_parts(policy, prompts, tmp_path):
    """And leaves out a query whose single traces do not fit; the same rows, so the same gradient."""
    traces = [Trace(prompts[0].sample.sample_id, f"{i} 12", 7.0, ()) for i in range(4)]
    settings = SftConfig(epochs=1, batch_size=4, lr=1e-3)
    logps = policy.logps

    def step(name, limit):
        def cramped(prepared, tokens, **kwargs):
            return logps(prepared, tokens, **kwargs) if len(tokens.ids) <= limit else too_much()

        policy.logps = cramped
        with Tracker(tmp_path / name, OFF, "r", "sft", {}, 0) as tracker:
            data = TraceDataset(traces, {prompts[0].sample.sample_id: prompts[0]}, settings, 0)
            run = StageRun("sft", tmp_path / name, 0, data.stop, TrainerConfig(checkpoint_every=1))
            module = SftModule(policy, settings, run, tracker)
            before = [weight.detach().clone() for weight in module.engine.parameters]
            loader = torch.utils.data.DataLoader(data, batch_size=1, collate_fn=lambda b: b[0])
            make_trainer(CPU, tmp_path / name).fit(module, loader)
        with torch.no_grad():  # the next one starts where this one did
            for weight, value in zip(module.engine.parameters, before, strict=True):
                weight.copy_(value)
        return lines(tmp_path / name / "metrics.jsonl")[0]

    whole, parts = step("whole", 4), step("parts", 1)
    assert not (tmp_path / "whole/faults.jsonl").exists()
    assert [row["action"] for row in lines(tmp_path / "parts/faults.jsonl")] == ["tried in 2 parts", "tried in 4 parts"]
    for name in ("loss/total", "optim/grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5) and whole[name] > 0
    assert step("nothing", 0)["optim/skipped"] == 1.0
    assert [row["kind"] for row in lines(tmp_path / "nothing/faults.jsonl")][-2:] == ["out_of_memory", "empty_step"]
