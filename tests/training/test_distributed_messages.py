"""Several processes: who gets what, how they are started and how they end. The trainings are in test_distributed.py."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forking import call_ranks
from two_processes import START

from tartvg.config import (
    AnchorsConfig,
    Config,
    LoraConfig,
    PolicyConfig,
    SettingError,
    SftConfig,
    StageConfig,
    StageName,
    Strategy,
    TrainerConfig,
    Zero3Config,
)
from tartvg.launch.processes import LAUNCHED, is_started, needs_processes, run_processes
from tartvg.launch.signals import SIGNALS
from tartvg.policy.policy import Policy, TokenBatch
from tartvg.prompts import build_prompt
from tartvg.training import distributed
from tartvg.training.batches import StepDataset
from tartvg.training.deepspeed import zero_config
from tartvg.training.sft_module import TraceDataset
from tartvg.training.zero3 import make_zero3_strategy
from tartvg.types import GroundingSample, Span, Trace

TWO = TrainerConfig(devices=2, strategy=Strategy.ddp)


def prompts(tmp_path, count):
    samples = [GroundingSample(str(i), tmp_path / f"{i}.mp4", "q", (Span(1, 2),), 9.0, "train") for i in range(count)]
    return [build_prompt(sample, AnchorsConfig()) for sample in samples]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_processes_share_the_prompts_of_a_step_without_overlap(tmp_path, count):
    some = prompts(tmp_path, 10)
    whole = StepDataset(some, 6, 0, 0, 4)
    for step in range(4):
        shares = [StepDataset(some, 6, 0, 0, 4, share=(r, count))[step] for r in range(count)]
        assert {len(share.prompts) for share in shares} == {6 // count}
        pairs = sorted(pair for share in shares for pair in zip(share.indices, share.prompts, strict=True))
        assert [prompt for _, prompt in pairs] == list(whole[step].prompts)
        assert [place for place, _ in pairs] == list(range(6))


def test_processes_share_the_queries_of_an_sft_step(tmp_path):
    by_id = {p.sample.sample_id: p for p in prompts(tmp_path, 5)}
    traces = [Trace(key, f"{key} {i}", 7.0, ()) for i in range(3) for key in by_id]
    whole = TraceDataset(traces, by_id, SftConfig(batch_size=7), 0)
    parts = [TraceDataset(traces, by_id, SftConfig(batch_size=7), 0, share=(r, 2)) for r in range(2)]
    for step in range(len(whole)):
        mine, others = parts[0][step].groups, parts[1][step].groups
        assert [g for pair in zip(mine, others, strict=False) for g in pair] == list(whole[step].groups)[
            : 2 * len(others)
        ]
        assert len(mine) - len(others) in (0, 1)


def test_only_training_with_a_strategy_starts_processes(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    sequence = StageConfig(StageName.pipeline, [StageName.filter, StageName.sft])
    assert needs_processes(Config(stage=sequence, trainer=TWO))
    assert not needs_processes(Config(stage=StageConfig(StageName.evaluate), trainer=TWO))
    assert not needs_processes(Config(stage=sequence, trainer=TrainerConfig()))
    assert not needs_processes(Config(stage=sequence, trainer=TrainerConfig(strategy=Strategy.zero3)))
    tower = PolicyConfig(lora=LoraConfig(vision=True))
    with pytest.raises(SettingError, match=r"policy\.lora\.vision must be false unless"):
        needs_processes(Config(stage=sequence, trainer=TWO, policy=tower))
    assert not needs_processes(Config(stage=sequence, policy=tower))
    nodes = TrainerConfig(devices=2, num_nodes=2, strategy=Strategy.ddp)
    with pytest.raises(SettingError, match="torchrun"):
        needs_processes(Config(stage=sequence, trainer=nodes))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")):
        assert not is_started()
        monkeypatch.setenv(name, value)
    assert is_started() and not needs_processes(Config(stage=sequence, trainer=nodes))


def test_a_launcher_with_another_count_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match="make 2 processes, but 3 were started"):
        distributed.init(TWO)
    with pytest.raises(SettingError, match="make 1 processes, but 3"):
        distributed.init(TrainerConfig())


def test_one_process_talks_to_itself():
    assert (distributed.rank(), distributed.world_size(), distributed.is_rank_zero()) == (0, 1, True)
    assert distributed.all_gather_lines(["a", "b"]) == ["a", "b"]
    assert distributed.all_reduce_max(1.5, -2) == [1.5, -2] == distributed.all_reduce_sum(1.5, -2)
    assert distributed.on_rank_zero(lambda: 3) == 3 and distributed.broadcast(4) == 4


def talk(end):
    distributed.init(TrainerConfig(devices=3, strategy=Strategy.ddp))
    me = distributed.rank()
    assert distributed.world_size() == 3
    assert distributed.all_gather_lines([f"{me} é {i}" for i in range(me)]) == ["1 é 0", "2 é 0", "2 é 1"]
    assert distributed.all_gather_lines([]) == []
    assert distributed.all_reduce_max(me, -me) == [2, 0] and distributed.all_reduce_sum(me, 0.5) == [3, 1.5]
    assert distributed.broadcast(me + 7) == 7
    alone = []
    assert distributed.on_rank_zero(lambda: alone.append(distributed.world_size())) is None
    assert alone == ([1] if me == 0 else [])
    assert distributed.on_rank_zero(lambda: 4) == 4
    assert distributed.on_rank_zero(lambda: distributed.on_rank_zero(lambda: 5)) == 5 and distributed.world_size() == 3
    with distributed.rank_zero_first():
        pass
    distributed.destroy()
    assert distributed.world_size() == 1
    return 40 + me if end == "fail" else 0


@pytest.mark.slow
def test_three_processes_talk(tmp_path):
    for end, code in (("well", 0), ("fail", 40)):
        assert call_ranks(3, talk, end, output=tmp_path / end).wait(300) == code, (tmp_path / end).read_text()


def wait_for_one_another():
    distributed.init(TrainerConfig(devices=2, strategy=Strategy.ddp, timeout_minutes=0.05))
    me = distributed.rank()
    assert distributed.on_rank_zero(lambda: time.sleep(4) or 4) == 4, "the leader's work may take longer"
    with distributed.rank_zero_first():
        time.sleep(4 * distributed.is_rank_zero())
    begun = time.monotonic()
    try:
        if me == 1:
            time.sleep(15)
        distributed.any_rank(False)
    except RuntimeError as error:
        return 50 if me == 0 and time.monotonic() - begun < 12 and "Timed out" in str(error) else 1
    finally:
        distributed.destroy()  # as a run does: torch's threads would abort a process that ends without it, now and then


@pytest.mark.slow
def test_only_the_leader_is_waited_for_with_patience(tmp_path):
    """Three seconds are the limit within a step."""
    said = tmp_path / "said"
    assert call_ranks(2, wait_for_one_another, output=said).wait(300) == 50, said.read_text()


def test_every_process_has_its_rank_and_the_exit_code_comes_back(tmp_path, monkeypatch):
    say = "import os, sys; p = os.environ; open(p['RANK'], 'w').write(p['WORLD_SIZE'] + p['LOCAL_RANK']); "
    code = say + "sys.exit(int(sys.argv[1]) if p['RANK'] == '1' else 0)"
    monkeypatch.chdir(tmp_path)
    assert run_processes(2, [sys.executable, "-c", code, "0"]) == 0
    assert [(tmp_path / r).read_text() for r in "01"] == ["20", "21"]
    assert run_processes(2, [sys.executable, "-c", code, "5"]) == 5


WAIT = """
import os, pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1], "told" + os.environ["RANK"]).touch()
    sys.exit(9)
signal.signal(getattr(signal, sys.argv[2]), end)
pathlib.Path(sys.argv[1], "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""
REFUSED = """
import os, sys, time
time.sleep(0.2 if os.environ["RANK"] == "1" else 0)
sys.exit(int(sys.argv[1 + int(os.environ["RANK"])]))
"""


@pytest.mark.parametrize(("codes", "end"), [((1, 2), 2), ((2, 1), 2), ((1, 75), 75), ((2, 75), 75), ((1, 0), 1)])
def test_the_code_that_says_most_is_that_of_the_run(codes, end, tmp_path):
    """A rank that ends first leaves the others to fail for want of it."""
    script = tmp_path / "ends.py"
    script.write_text(REFUSED)
    assert run_processes(2, [sys.executable, str(script), *map(str, codes)]) == end


def started(tmp_path, awaited=signal.SIGTERM):
    command = [sys.executable, "-c", START, sys.executable, "-c", WAIT, str(tmp_path), awaited.name]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process, [int(file.read_text()) for file in files]


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_cluster_sends_reaches_every_process(tmp_path, number):
    process, _ = started(tmp_path, number)
    process.send_signal(number)
    assert process.wait(timeout=60) == 9
    assert (tmp_path / "told0").exists() and (tmp_path / "told1").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is a Linux thing")
def test_the_processes_die_with_the_one_that_started_them(tmp_path):
    process, pids = started(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_clipping_is_deepspeeds_own():
    config = make_zero3_strategy(TrainerConfig(strategy=Strategy.zero3_offload, zero3=Zero3Config(0)), 0.7).config
    assert config["gradient_clipping"] == 0.7
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"]) == (3, 0)
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert zero_config(TrainerConfig(strategy=Strategy.zero2), 1.0)["zero_optimization"]["stage"] == 2


@pytest.fixture(scope="module")
def policy(untrained_base):
    from tartvg.config import PolicyConfig

    return Policy(PolicyConfig(name="t", path=str(untrained_base), logit_chunk=3), seed=0).train()


@pytest.mark.parametrize("is_saving", [False, True])
def test_an_idle_pass_reaches_every_weight_and_changes_none(policy, monkeypatch, is_saving):
    monkeypatch.setattr(policy.settings, "activation_checkpointing", is_saving)
    policy.zero_grad()
    with policy.lockstep(4):
        loss = policy.empty_pass()
        loss.backward()
    assert loss.item() == 0.0
    trainable = [p for p in policy.parameters() if p.requires_grad]
    assert trainable and all(p.grad is not None and not p.grad.any() for p in trainable)


@pytest.mark.parametrize("is_saving", [False, True])
def test_surplus_calls_of_the_head_change_nothing(policy, monkeypatch, is_saving):
    from tartvg.policy.features import VideoFeatures
    from tartvg.policy.inputs import PromptInputs
    from tartvg.policy.policy import PreparedPrompt

    monkeypatch.setattr(policy.settings, "activation_checkpointing", is_saving)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    inputs = PromptInputs(ids[0], torch.arange(4).expand(3, -1), ids[0] < 0)
    video = VideoFeatures(torch.zeros(0, policy.language_model.config.hidden_size), (0, 0, 0), 0.0, 0.0)
    prepared = PreparedPrompt(None, inputs, video)
    tokens = TokenBatch(ids, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4))
    assert policy.num_head_calls(8) == 3

    def gradient(num_calls):
        policy.zero_grad()
        with policy.lockstep(num_calls):
            logps = policy.logps(prepared, tokens)
            logps.sum().backward()
        return logps, [p.grad.clone() for p in policy.parameters() if p.requires_grad]

    once, surplus = gradient(0), gradient(6)
    assert torch.equal(once[0], surplus[0])
    assert all(torch.equal(a, b) for a, b in zip(once[1], surplus[1], strict=True))
