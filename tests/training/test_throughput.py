"""Throughput and memory of a step: hand numbers, and a real step that logs them."""

import json

import pytest
import torch
from helpers.training import CPU, make_grpo

from tartvg.config import AnchorsConfig, RewardConfig
from tartvg.rewards import Rubric
from tartvg.training.batches import StepDataset
from tartvg.training.throughput import GIB, Throughput, peak_flops, utilisation
from tartvg.training.trainer import make_trainer


def test_utilisation_of_a_frozen_model():
    # 7e9 weights, 1,000 tokens in 0.1 s: 4 * 7e9 * 1e3 / 0.1 = 2.8e14 FLOP/s
    assert utilisation(1000, 7_000_000_000, 0.1, 989e12) == pytest.approx(2.8e14 / 989e12)
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce GTX 1080") is None


def test_tokens_are_counted_from_the_beginning_of_a_step():
    throughput = Throughput(10, torch.device("cpu"))
    throughput.num_sampled, throughput.num_trained = 30, 90
    found = throughput.metrics({"time/sample_s": 2.0, "time/update_s": 3.0})
    assert found["perf/tokens_per_second_sampled"] == 15 and found["perf/tokens_per_second_trained"] == 30
    assert 0 < found["memory/peak_gib"] == pytest.approx(throughput.peak_bytes() / GIB, rel=0.01)
    assert "perf/mfu" not in found  # no peak is known for a CPU
    throughput.begin()
    empty = throughput.metrics({"time/sample_s": 2.0, "time/update_s": 0.0})
    assert not [name for name in empty if "tokens" in name] and empty["perf/seconds_per_step"] < 1


def test_a_training_logs_them(policy, prompts, tmp_path):
    module = make_grpo(policy, tmp_path, Rubric(RewardConfig(), AnchorsConfig()))
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    groups = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        sampled = sum(len(r["completion"]["token_ids"]) for g in groups if g["step"] == row["progress/step"]
                      for r in g["rollouts"])  # fmt: skip
        assert row["perf/tokens_per_second_sampled"] * row["time/sample_s"] == pytest.approx(sampled)
        assert (
            row["perf/tokens_per_second_trained"] * row["time/update_s"] > sampled
        )  # prompts are trained through, too
        phases = sum(value for name, value in row.items() if name.startswith("time/"))
        assert row["perf/seconds_per_step"] >= phases * 0.99 and row["memory/peak_gib"] > 0.1
