"""A question and its answer as it is written; several adapters on one base."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.policies import tiny_policy

from tartvg.config import AnchorsConfig, SamplingConfig
from tartvg.policy.asking import ask
from tartvg.policy.loading import ADAPTER, save_adapter

LIMITS = SamplingConfig(max_new_tokens=20)
QUERY = "the red circle"


def said(policy, video, **kwargs):
    return ask(policy, video, QUERY, AnchorsConfig(), LIMITS, **kwargs)


def test_what_is_told_grows_by_a_token_and_ends_with_the_answer(policy, prompts):
    texts = []
    answer = said(policy, prompts[0].sample.video, tell=texts.append)
    assert answer == said(policy, prompts[0].sample.video)
    assert len(texts) == len(answer.token_ids) == 20
    assert texts[-1] == answer.text.rstrip("\N{REPLACEMENT CHARACTER}")
    assert all(len(before) <= len(after) for before, after in pairwise(texts))


def test_what_is_raised_on_the_way_ends_the_answer(policy, prompts):
    told = []

    def tell(text):
        told.append(text)
        if len(told) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        said(policy, prompts[0].sample.video, tell=tell)
    assert len(told) == 3


def test_the_newest_tokens_of_all_rows_are_seen(policy, prompts):
    seen = []
    prepared = [policy.prepare(prompt) for prompt in prompts[:2]]
    settings = replace(LIMITS, temperature=1.0)
    groups = policy.sample(prepared, 2, settings, [1, 2], watch=seen.append)
    assert groups == policy.sample(prepared, 2, settings, [1, 2])
    rows = [completion.token_ids for group in groups for completion in group]
    for step, newest in enumerate(seen):
        if len(newest) == len(rows):
            assert all(step >= len(row) or row[step] == token for row, token in zip(rows, newest, strict=True))
    assert len(seen) == max(map(len, rows))


def test_adapters_on_one_base_answer_as_each_alone(untrained_base, prompts, tmp_path):
    video = prompts[0].sample.video
    policy, alone = tiny_policy(untrained_base), {}
    alone[ADAPTER] = said(policy, video)
    for name in ("one", "other"):
        own = tiny_policy(untrained_base)
        torch.manual_seed(len(name))
        for weight_name, weight in own.model.named_parameters():
            if ".lora_B." in weight_name:
                weight.data.normal_(std=0.5)
        alone[name] = said(own, video)
        save_adapter(own.model, tmp_path / name, str(untrained_base))
        policy.add_adapter(name, tmp_path / name)
    assert len({answer.text for answer in alone.values()}) == 3
    for name, expected in [*alone.items(), (ADAPTER, alone[ADAPTER])]:
        with policy.as_adapter(name):
            assert said(policy, video) == expected
