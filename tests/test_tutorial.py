"""docs/tutorial.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.settings import ROOT
from markdown_it import MarkdownIt

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "tutorial.md"
NOT_RUN = "console"
"""The language of what takes long."""


def blocks() -> Iterator[tuple[str, str, str]]:
    """Language, file to make (or nothing) and content of each code block."""
    for token in MarkdownIt("commonmark").parse(PAGE.read_text()):
        if token.type == "fence":
            language, _, more = token.info.partition(" ")
            yield language, more.removeprefix("file="), token.content


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's files, those of git and those that it does not ignore."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def test_every_block_does_what_the_page_says(copy: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {k: v for k, v in os.environ.items() if k != "TARTVG_ROOT"} | {"PATH": path, "PYTHONPATH": str(copy)}
    said = []

    def run(*command: str, given: str | None = None) -> str:
        done = subprocess.run(
            command, cwd=copy, env=environment, input=given, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{given}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    for language, file, content in blocks():
        if file:
            assert not (copy / file).exists(), f"{file} is there already"
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_text(content)
        elif language == "diff":
            run("git", "apply", "--recount", "-", given=content)
        elif language == "sh":
            said.append(run("bash", "-ec", content))
        else:
            assert language == NOT_RUN, f"a block in {language} is neither a file nor run"
    settings, scored, reported = said
    assert "narrowing_weight: 1.0" in settings and "3 passed" in settings
    assert "`reward.narrowing_weight`" in (copy / "docs/settings.md").read_text()
    assert "2 passed" in scored and re.search(r"mIoU\D+50\.00", scored)
    logged = [json.loads(file.read_text()) for file in (copy / "runs/try").glob("*/grpo1/metrics.jsonl")]  # one step
    assert len(logged) == 2 and all("reward/narrowing_mean" in line for line in logged)
    assert "report: runs/try/report.html" in reported
    assert "narrowing" in (copy / "runs/try/report.html").read_text()
    changed = [file for _, file, _ in blocks() if file.endswith(".py")]
    run(sys.executable, "-m", "ruff", "check", "--no-cache", *changed)
    run(sys.executable, "-m", "ruff", "format", "--check", "--no-cache", *changed)
