"""The documents as a site: built as `make docs` does, every warning an error, and opened from the disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, OVERFLOW, chromium
from helpers.settings import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
for module in ("playwright", "sphinx", "myst_parser", "furo"):
    pytest.importorskip(module, reason="needs the extra dev")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A link that leads nowhere would be a warning."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_site_opens_from_a_disk_and_asks_no_network(browser: Any, site: Path) -> None:
    asked: list[str] = []
    said: list[str] = []
    page = browser.new_page(viewport={"width": 500, "height": 900})
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((site / "index.html").as_uri())
    addresses = page.eval_on_selector_all(".sidebar-tree a[href]", "links => links.map(link => link.href)")
    pages = {address.partition("#")[0] for address in addresses} - {""}
    for source in [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "experiments/README.md"]:
        assert (site / source.relative_to(ROOT).with_suffix(".html")).as_uri() in pages, "every page is in the side bar"
    for address in sorted(pages):
        page.goto(address)
        assert page.locator("article h1").count() >= 1
        assert page.evaluate(OVERFLOW) <= 0, address
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert broken == [], address
    page.goto(f"{(site / 'search.html').as_uri()}?q=anchors")
    page.wait_for_selector("#search-results li a")
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.close()
