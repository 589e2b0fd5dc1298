"""The page of the rollouts in a real browser, by keyboard alone; and what it says each token was paid."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, CONTRAST, OVERFLOW, chromium
from helpers.report import ATTACK, SETTINGS, said
from transformers import AutoTokenizer

from tartvg.config import AnchorsConfig, Credit, GrpoConfig, RewardConfig
from tartvg.policy.loading import embedded_path
from tartvg.records import write_atomic, write_jsonl
from tartvg.report.rollout_page import write_rollout_pages
from tartvg.report.rollout_steps import group_json
from tartvg.report.runs import read_run
from tartvg.response import parse_response
from tartvg.rewards import Rubric
from tartvg.stages.report import advantages_of
from tartvg.training.credit import segment_advantages, token_advantages
from tartvg.types import Completion, GroundingSample, Prompt, Rollout, RolloutGroup, Span

TRUTH = Span(1.0, 4.0)
RUBRIC = Rubric(RewardConfig(), AnchorsConfig())
TEXTS = (
    said(Span(0, 6), TRUTH),
    said(Span(2, 5), Span(1, 5)),
    said(Span(5, 7)),
    f"<think>{ATTACK}</think><answer>3.00 to 2.00</answer>",
    said(Span(0, 8), Span(0, 7), Span(0, 6), Span(0, 5)),
    said(TRUTH, TRUTH, answer=Span(0, 1)),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="needs playwright")
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_path())


def group_of(tokenizer: Any, step: int, query: str, texts: tuple[str, ...]) -> RolloutGroup:
    sample = GroundingSample(query, Path("v.mp4"), query, (TRUTH,), 8.0, "train")
    rollouts = []
    for text in texts:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        response = parse_response(text)
        rollouts.append(
            Rollout(Completion(text, ids, (-0.5,) * len(ids), True), response, RUBRIC.score(response, sample))
        )
    return RolloutGroup(Prompt(sample, "?"), tuple(rollouts), step)


@pytest.fixture(scope="module")
def page_file(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps; in the last one the query is an attack and every kind of fault is there."""
    run = tmp_path_factory.mktemp("trained") / "run"
    groups = [group_of(tokenizer, step, "a red square", TEXTS[:2]) for step in (0, 1)]
    groups += [group_of(tokenizer, 2, "a red square", TEXTS[:2]), group_of(tokenizer, 2, ATTACK, TEXTS)]
    write_jsonl(run / "grpo1" / "rollouts.jsonl", groups)
    write_atomic(run / "grpo1" / "config.yaml", SETTINGS.replace("group_size: 4", "group_size: 6, credit: potential"))
    found = read_run(run)
    pages = write_rollout_pages(found, run / "report", lambda stage: advantages_of(found, stage))
    assert pages == {"rollouts of grpo1": "rollouts_grpo1.html"}
    return run / "report" / "rollouts_grpo1.html"


def rewards(page: Any) -> list[float]:
    """Rewards in the order of the page."""
    titles = page.locator(".rollout h4").all_inner_texts()
    return [float(title.split("reward ")[1].split()[0].replace("\u2212", "-")) for title in titles]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_the_rollouts_are_filtered_and_sorted_by_keyboard(
    browser: Any, page_file: Path, width: int, tmp_path: Path
) -> None:
    """Set TARTVG_SCREENSHOTS to a folder to keep what was seen."""
    seen: list[str] = []
    page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: seen.append(request.url))
    page.goto(page_file.as_uri())
    keys, status = page.keyboard, page.get_by_role("status")
    assert status.inner_text().startswith("Step 0: 2 of 2 completions to 1 query,")

    keys.press("Tab")  # the link to the run
    keys.press("Tab")
    assert page.get_by_role("slider", name="Step").evaluate("e => e === document.activeElement")
    keys.press("ArrowRight")
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 1"
    keys.press("End")
    assert status.inner_text().startswith("Step 2: 8 of 8 completions to 2 queries,")
    assert page.get_by_role("heading", level=3).all_inner_texts() == ["a red square", ATTACK]
    drawn = rewards(page)

    keys.press("Tab")
    keys.press("Tab")
    assert page.get_by_role("combobox", name="Order").evaluate("e => e === document.activeElement")
    keys.type("reward, highest")
    # Queries by the mean of their completions, then the completions of each.
    assert rewards(page) == [*sorted(drawn[:2], reverse=True), *sorted(drawn[2:], reverse=True)]
    keys.press("ArrowDown")
    assert rewards(page) == [*sorted(drawn[2:]), *sorted(drawn[:2])]
    keys.press("ArrowDown")
    apart = [float(text) for text in page.locator(".terms div:last-child dd").all_inner_texts()]
    assert apart == [*sorted(apart[:6], reverse=True), *sorted(apart[6:], reverse=True)] and apart[0] == 1.0

    keys.press("Shift+Tab")
    assert page.get_by_role("combobox", name="Fault").evaluate("e => e === document.activeElement")
    keys.type("answer reversed")
    assert status.inner_text().startswith("Step 2: 1 of 8 completions to 2 queries,")
    (text,) = page.locator(".rollout .text").all_text_contents()
    assert re.fullmatch("advantage \u2212[0-9.]+: " + re.escape(TEXTS[3]), text), "what it said is text"
    assert page.locator(".fault").all_inner_texts() == ["answer reversed", "no anchor"]
    keys.press("Home")
    assert status.inner_text().startswith("Step 2: 8 of 8")

    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(CONTRAST) >= 4.5, "text that is hard to read"
    page.screenshot(
        path=Path(os.environ.get("TARTVG_SCREENSHOTS") or tmp_path) / f"rollouts-{width}.png", full_page=True
    )
    # A script that is not the page's own does not run, should one ever get in.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'alert(2)'}))")
    assert len(seen) == 2 and seen[0] == page_file.as_uri() and "Content Security Policy" in seen[1], seen
    page.context.close()


@pytest.mark.parametrize("credit", Credit)
def test_the_text_of_each_token_carries_its_advantage(tokenizer: Any, credit: Credit) -> None:
    group, settings = group_of(tokenizer, 0, "q", TEXTS), GrpoConfig(credit=credit)
    per_token_GT = token_advantages(group, RUBRIC, settings, tokenizer)
    value = group_json(group, lambda g: segment_advantages(g, RUBRIC, settings).tolist())
    for row, (rollout, shown) in enumerate(zip(group.rollouts, value["rollouts"], strict=True)):
        ids = rollout.completion.token_ids
        ends, end = [], 0
        for text, advantage in shown["parts"]:
            end += len(text)
            ends.append((end, advantage))
        begins = [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
        expected = [next(advantage for end, advantage in ends if begin < end) for begin in begins]
        trained = per_token_GT[row].expand(len(ids)) if per_token_GT.shape[1] == 1 else per_token_GT[row, : len(ids)]
        assert trained.tolist() == pytest.approx(expected, abs=1e-3)
    assert any(r["parts"][0][1] != r["parts"][-1][1] for r in value["rollouts"]) == (credit is not Credit.outcome)
