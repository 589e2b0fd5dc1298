"""The page of stage=serve in a real browser: what a visitor sees, what is refused, and what leaves the page."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from forking import start
from helpers.browser import CHROMIUM, CONTRAST, OVERFLOW, WIDTHS, chromium
from helpers.settings import composed
from helpers.videos import write

from tartvg.data.datasets import load_samples
from tartvg.types import GroundingSample

pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("gradio", reason="needs the extra `app`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
# Notes every text, bar and status that the page shows, in order, and where the player goes.
NOTES = """() => {
  window.notes = {texts: [], bars: [], status: [], seeks: []};
  const last = (list, value) => { if (value !== undefined && list.at(-1) !== value) list.push(value); };
  new MutationObserver(() => {
    last(notes.texts, document.querySelector('.said .text')?.textContent);
    last(notes.bars, [...document.querySelectorAll('.voice:first-of-type .bar')].map(b => b.classList[1]).join());
    last(notes.status, document.querySelector('.status')?.textContent);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
  document.addEventListener('seeking', event => notes.seeks.push(event.target.currentTime), true);
}"""


@dataclass
class Served:
    """A running page."""

    address: str
    process: Any
    output: Path
    runs: Path


@pytest.fixture(scope="module")
def settings(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The embedded base beside an adapter that has spoilt it."""
    from tartvg.policy.loading import save_adapter
    from tartvg.policy.policy import Policy

    folder = tmp_path_factory.mktemp("spoilt") / "sft" / "adapter"
    policy = Policy(composed(*small).policy)
    torch.manual_seed(0)
    for name, weight in policy.model.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.5)
    save_adapter(policy.model, folder, "embedded:tiny")
    return [*small, f"serve.policies=[base,{folder}]", "serve.max_seconds=20", "serve.num_examples=2"]


@pytest.fixture(scope="module")
def served(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = folder / "said"
    output.touch()
    overrides = [*settings, "stage=serve", f"serve.port={port}", f"runs_dir={folder / 'runs'}"]
    process = start(overrides, output, output)
    try:
        wait_for(lambda: "page: " in output.read_text() or process.poll() is not None, 120)
        said = output.read_text()
        assert process.poll() is None, said
        (address,) = re.findall(r"page: (http://127.0.0.1:\d+/)", said)
        yield Served(address, process, output, folder / "runs")
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def asked(settings: list[str]) -> GroundingSample:
    """A question that the base answers in the format."""
    return load_samples(composed(*settings).dataset, "test")[0]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def wait_for(is_there: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@dataclass
class Visitor:
    """Somebody with a browser."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ask(self, query: str) -> None:
        self.page.get_by_label("Sentence").fill(query)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def status(self, words: str) -> None:
        self.page.locator(".status", has_text=words).wait_for(timeout=60_000)

    def upload(self, file: Path) -> None:
        self.page.locator("input[type=file]").set_input_files(str(file))

    def texts(self) -> list[str]:
        return self.page.locator(".said .text").all_inner_texts()


def visit(browser: Any, address: str, width: str = "desktop") -> Visitor:
    size = WIDTHS[width]
    page = browser.new_context(viewport={"width": size[0], "height": size[1]}).new_page()
    visitor = Visitor(page)
    page.on("console", lambda message: visitor.console.append(message.text))
    page.on("pageerror", lambda error: visitor.console.append(str(error)))
    page.on("request", lambda request: visitor.requests.append(request.url))
    page.goto(address)
    page.locator("[data-example]").first.wait_for(timeout=60_000)
    page.evaluate(NOTES)
    return visitor


def check_quiet(visitor: Visitor, address: str) -> None:
    """Nothing on the console, no request to anywhere else, nothing that is hard to read."""
    outside = [url for url in visitor.requests if not url.startswith((address, "data:", f"blob:{address}"))]
    assert (visitor.console, outside) == ([], [])
    assert visitor.page.evaluate(OVERFLOW) <= 0, "the page scrolls sideways"
    assert visitor.page.evaluate(CONTRAST) >= 4.5, "text that is hard to read"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_visitor_asks_and_plays_a_window(
    served: Served,
    browser: Any,
    settings: list[str],
    asked: GroundingSample,
    width: str,
    run_command: Any,
    tmp_path: Path,
) -> None:
    """Set TARTVG_SCREENSHOTS to a folder to keep what was seen."""
    shots = Path(os.environ.get("TARTVG_SCREENSHOTS") or tmp_path)
    video, query = asked.video, asked.query
    visitor = visit(browser, served.address, width)
    page = visitor.page
    visitor.upload(video)
    visitor.status("Now type a sentence")
    visitor.ask(query)
    visitor.status("Click a bar")

    noted = page.evaluate("notes")
    growing = [text for text in noted["texts"] if text]
    assert len(growing) > 5 and all(growing[-1].startswith(text) for text in growing), "it comes token by token"
    appeared = [bars.split(",") for bars in noted["bars"] if bars]
    assert len(appeared) > 1 and "answer" not in appeared[0], "bars come one by one"
    assert appeared[-1][-1] == "answer" and appeared[-1].count("answer") == 1
    base, spoilt = page.locator(".said").all_inner_texts()
    assert "Format: as asked for." in base and "Format:\n" in spoilt
    if width == "desktop":
        ground = run_command(*settings, "stage=ground", f"video={video}", f"query='{query}'", f"runs_dir={tmp_path}")
        assert f"\n{visitor.texts()[0]}\nanchor 1:" in ground.stdout

    assert page.locator(".strip").evaluate("picture => picture.naturalWidth > 400")
    page.screenshot(path=shots / f"serve-{width}.png", full_page=True)
    bar = page.locator(".bar.answer").first
    begin, end = (float(bar.get_attribute(name)) for name in ("data-start", "data-end"))
    page.evaluate("player.playbackRate = 8")
    bar.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("notes.seeks.length > 0")
    assert page.evaluate("notes.seeks[0]") == pytest.approx(begin, abs=0.01) and begin > 1
    page.wait_for_function("player.paused && player.currentTime > 0", timeout=60_000)
    length = page.evaluate("player.duration")
    assert page.evaluate("player.currentTime") == pytest.approx(min(end, length), abs=1.0)
    check_quiet(visitor, served.address)
    page.context.close()


def test_what_is_refused_is_said_in_words(served: Served, browser: Any, tmp_path: Path) -> None:
    visitor = visit(browser, served.address)
    visitor.page.get_by_role("button", name="Ask", exact=True).click()
    visitor.status("Upload a video first")
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 5000)
    visitor.upload(tmp_path / "broken.mp4")
    visitor.status("This file cannot be read as a video")
    visitor.upload(write(tmp_path / "long.mp4", list(range(0, 200, 2)), g="50"))
    visitor.status("the limit is 20 s (serve.max_seconds)")
    assert visitor.page.locator("#player").count() == 0
    visitor.page.locator("[data-example]").first.click()
    visitor.page.locator("#player").wait_for()
    visitor.ask("  ")
    visitor.status("Type a sentence")
    visitor.ask("x" * 301)
    visitor.status("the limit is 300")
    check_quiet(visitor, served.address)
    visitor.page.context.close()


def test_two_visitors_at_once_each_get_their_own_answer(served: Served, browser: Any) -> None:
    visitors = [visit(browser, served.address) for _ in range(2)]
    alone = []
    for place, visitor in enumerate(visitors):
        visitor.page.locator("[data-example]").nth(place).click()
        visitor.page.locator("#player").wait_for()
        visitor.page.get_by_role("button", name="Ask", exact=True).click()
        visitor.status("Done")
        alone.append(visitor.texts())
    assert alone[0] != alone[1]
    for visitor in visitors:
        visitor.page.evaluate("notes.status.length = 0")  # of the first question, whose end is not waited for again
        visitor.page.get_by_role("button", name="Ask", exact=True).click()
        if visitor is visitors[0]:
            visitor.status("base answers")
    for visitor in visitors:
        wait_for(lambda visitor=visitor: len(visitor.page.evaluate("notes.status")) > 1, 60)
        visitor.status("Done")
    wait_for(lambda: [visitor.texts() for visitor in visitors] == alone, 60)
    assert "Another question is being answered; yours is next." in visitors[1].page.evaluate("notes.status")
    for visitor in visitors:
        check_quiet(visitor, served.address)
        visitor.page.context.close()


def test_nothing_stays_behind(served: Served, browser: Any, asked: GroundingSample, run_command: Any) -> None:
    visitor = visit(browser, served.address)
    visitor.upload(asked.video)
    visitor.status("Now type a sentence")
    source = visitor.page.locator("#player").get_attribute("src")
    file = Path(source.partition("file=")[2])
    assert file.is_file()
    policy = visitor.page.request.get(served.address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    for path in ("/etc/hostname", "http://127.0.0.1:9/", str(Path(__file__).resolve())):
        assert visitor.page.request.get(f"{served.address}gradio_api/file={path}").status == 403
    visitor.page.context.close()
    wait_for(lambda: not file.exists(), 30)

    port = served.address.rpartition(":")[2].rstrip("/")
    taken = run_command("stage=serve", f"serve.port={port}", "serve.num_examples=0", check=False)
    assert taken.returncode == 2 and taken.stderr == (
        f"error: serve.host=127.0.0.1 serve.port={port}: no page can be opened there; is the port in use?\n"
    )
    served.process.terminate()
    assert served.process.wait(60) == 0
    assert served.output.read_text().endswith("stopped\n")
    assert not file.parents[1].exists() and not served.runs.exists()
