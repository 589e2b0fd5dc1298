"""A page for the rollouts of each training: a slider over its steps, and every completion with what it was paid for.

The only page with a script. It is inline, loads nothing, and the page's own policy allows no other.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Callable
from html import escape
from importlib import resources
from pathlib import Path

from tartvg import rewards
from tartvg.records import dumps, write_atomic
from tartvg.report.page import html_page, key_html, page_links, remarks_html
from tartvg.report.rollout_steps import Advantages, ChosenSteps, choose_steps
from tartvg.report.runs import RunFolder, config_of

ASSETS = resources.files("tartvg") / "assets" / "report"


def write_rollout_pages(
    run: RunFolder, folder: Path, advantages_of: Callable[[str], Advantages | None]
) -> dict[str, str]:
    """Write `<folder>/rollouts_<stage>.html` for every stage that recorded rollouts; returns file names by title.

    `advantages_of` a stage is None where its settings cannot be read: then the text has no colours. Raises ValueError
    for a damaged file.
    """
    pages = {}
    for stage, path in run.rollouts.items():
        advantages = advantages_of(stage)
        chosen = choose_steps(path, advantages)
        if chosen.texts:
            name = f"rollouts_{stage}.html"
            write_atomic(folder / name, _page(run, stage, chosen, advantages is not None))
            pages[f"rollouts of {stage}"] = name
    return pages


def _page(run: RunFolder, stage: str, chosen: ChosenSteps, has_advantages: bool) -> str:
    style, script = (ASSETS / name for name in ("rollouts.css", "rollouts.js"))
    code = script.read_text(encoding="utf-8")
    allowed = b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{style.read_text(encoding='utf-8')}</style>"
    )
    lead = (
        f"<p>{escape(_introduction(run, stage, has_advantages))}</p>{remarks_html(_remarks(chosen, has_advantages))}"
        f"{page_links({'the whole run': '../report.html'})}"
    )
    titles = dumps({term.name: term.title for term in rewards.rubric.TERMS})
    # An escaped "<" is the same JSON and cannot end the element.
    data = f'{{"titles": {titles}, "steps": [{", ".join(chosen.texts)}]}}'.replace("<", "\\u003c")
    body = (
        f"{_controls(len(chosen.texts))}{key_html()}{_scale() if has_advantages else ''}"
        '<noscript><p class="remark">This page needs JavaScript; rollouts.jsonl holds the same.</p></noscript>'
        f'<div id="groups"></div><script id="data" type="application/json">{data}</script><script>{code}</script>'
    )
    title = f"{run.path.resolve().name}: rollouts of {stage}"
    return html_page(title, lead, [("rollouts", "Completions", body)], head)


def _introduction(run: RunFolder, stage: str, has_advantages: bool) -> str:
    text = (
        f"What the policy said in {stage}, query by query, with its reward, the terms before their weights, and its "
        "times. Disagreement is 1 minus the mean IoU of an answer with the others of its group."
    )
    if has_advantages:
        credit = config_of(run, "grpo.credit", "outcome", stage)
        text += (
            f" Advantages are those of grpo.credit={credit}, computed again from the recorded rewards: each stands "
            "before the tokens that it was given to, and colours them."
        )
    return text


def _remarks(chosen: ChosenSteps, has_advantages: bool) -> list[str]:
    remarks = []
    if len(chosen.texts) < chosen.num_steps:
        remarks.append(
            f"{len(chosen.texts)} of {chosen.num_steps:,} steps are here, at even distances: more would make the page "
            "too large. rollouts.jsonl holds all."
        )
    if not has_advantages:
        remarks.append("No advantages: the settings of this stage cannot be read.")
    return remarks


def _controls(num_steps: int) -> str:
    orders = {
        "drawn": "as they were drawn",
        "highest": "reward, highest first",
        "lowest": "reward, lowest first",
        "disagreement": "disagreement, largest first",
    }
    options = "".join(f'<option value="{value}">{escape(name)}</option>' for value, name in orders.items())
    return (
        '<form class="controls" aria-label="What is shown">'
        '<div class="wide"><label for="step">Step</label><span id="number" aria-hidden="true"></span>'
        f'<input id="step" type="range" min="0" max="{num_steps - 1}" value="0" autocomplete="off"></div>'
        '<div><label for="fault">Fault</label><select id="fault" autocomplete="off"></select></div>'
        f'<div><label for="order">Order</label><select id="order" autocomplete="off">{options}</select></div>'
        '<p id="status" role="status"></p></form>'
    )


def _scale() -> str:
    return (
        '<p class="scale">Advantage over the group: <span id="lowest"></span> <i aria-hidden="true"></i> '
        '<span id="highest"></span></p>'
    )
