"""The pages in a real browser: Chromium without a window, at the width of a desk and of a phone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, CONTRAST, OVERFLOW, WIDTHS, chromium
from helpers.report import ATTACK

from tartvg.report.cells import read_runs, read_sweep_folder
from tartvg.report.compare_page import addresses, build_comparison, write_stage_pages
from tartvg.report.page import build_report
from tartvg.types import GroundingSample

pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
LARGEST = 10_000_000

# What a screen reader needs of a table: a name, and headers that say what they head.
TABLES = """() => [...document.querySelectorAll('table')].map(t => ({
  caption: !!t.caption && t.caption.textContent.trim() !== '',
  columns: [...t.querySelectorAll('thead th')].every(h => h.scope === 'col'),
  rows: [...t.querySelectorAll('tbody tr')].every(r => r.cells[0].tagName === 'TH' && r.cells[0].scope === 'row'),
  region: !!t.closest('[role=region][aria-label][tabindex="0"]'),
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def look(browser: Any, page_file: Path, width: str, shots: Path) -> dict[str, Any]:
    """Open the page; what it said, asked for and measured."""
    seen: dict[str, Any] = {"console": [], "requests": [], "dialogs": []}
    size = WIDTHS[width]
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, offline=True)
    page = context.new_page()
    page.on("console", lambda message: seen["console"].append(message.text))
    page.on("pageerror", lambda error: seen["console"].append(str(error)))
    page.on("request", lambda request: seen["requests"].append(request.url))
    page.on("dialog", lambda dialog: (seen["dialogs"].append(dialog.message), dialog.dismiss()))
    page.goto(page_file.as_uri())
    seen["tables"] = page.evaluate(TABLES)
    seen["contrast"] = page.evaluate(CONTRAST)
    seen["overflow"] = page.evaluate(OVERFLOW)
    seen["text"] = page.evaluate("document.body.innerText")
    seen["unnamed"] = page.evaluate(
        "[...document.querySelectorAll('svg, img')].filter(e => !e.getAttribute('aria-label') && !e.alt).length"
    )
    page.screenshot(path=shots / f"{page_file.parent.name}-{page_file.stem}-{width}.png", full_page=True)
    context.close()
    return seen


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_in_a_browser(
    browser: Any,
    sweep: tuple[Path, dict[str, GroundingSample]],
    demo: tuple[Path, dict[str, GroundingSample], str],
    width: str,
    tmp_path: Path,
) -> None:
    """Set TARTVG_SCREENSHOTS to a folder to keep what was seen."""
    shots = Path(os.environ.get("TARTVG_SCREENSHOTS") or tmp_path)
    remarks = ["Something to know before the numbers."]
    compared, _ = build_comparison(read_sweep_folder(sweep[0]), sweep[1], sweep[0], remarks)
    run = demo[0]
    stages = write_stage_pages(read_runs([run], "demo", run.parent), run / "report")
    single = build_report(run, demo[1], run / "report.html", addresses(stages), remarks)
    for file in (compared, single, sweep[0] / "report" / "grpo1.html", run / "report" / "sft.html"):
        seen = look(browser, file, width, shots)
        assert seen["console"] == [] and seen["dialogs"] == []
        # Pictures inside the page are no requests to anywhere.
        assert [url for url in seen["requests"] if not url.startswith("data:")] == [file.as_uri()]
        assert file.stat().st_size < LARGEST
        assert seen["overflow"] <= 0, "the page scrolls sideways"
        assert seen["tables"] and all(all(table.values()) for table in seen["tables"]), seen["tables"]
        assert seen["contrast"] >= 4.5, "text that is hard to read"
        assert seen["unnamed"] == 0
        assert (remarks[0] in seen["text"]) == (file in (compared, single))
        if file.name == "grpo1.html" or file == single:
            assert ATTACK in seen["text"], "the query is shown as text"
