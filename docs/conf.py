"""What `make docs` shows: the documents of the repository, where they lie, as a static site that needs no network.

The source folder is the repository, so that a link which works there works in the site. A file that a document links
to, such as a module, goes along; a link to a folder leads to its README, and where there is none it becomes plain text.
Sphinx reads this file and calls its functions.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from pygments.lexers import JsonLexer, TextLexer

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!\\)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()#\s]+)/?\)")

project = "tartvg"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "experiments/**.md", "recipes/*.md"]
exclude_patterns = [".*", "build", "data", "dist", "runs", "shared", "node_modules"]
myst_heading_anchors = 4
"""Levels whose headings can be linked to, by the names that GitHub gives them."""
html_theme = "furo"
html_title = "tartvg"
html_copy_source = False
html_show_search_summary = False  # a browser refuses the fetch that it needs where the site lies on a disk
html_show_copyright = html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "monokai"

CONTENTS = {
    "Use": (
        "docs/commands", "docs/data", "docs/several_gpus", "docs/long_runs", "docs/export", "docs/serve",
        "recipes/README",
    ),
    "Look": ("docs/reports", "docs/monitoring", "docs/wandb", "docs/results", "experiments/README"),
    "Change": ("docs/tutorial", "docs/code", "docs/paper_to_code", "docs/credit", "CONTRIBUTING"),
    "Look up": ("docs/README", "docs/settings", "docs/glossary", "CHANGELOG", "SECURITY"),
}  # fmt: skip


def prepared(app: Any, name: str, source: list[str]) -> None:
    """Lead links to folders somewhere; the front page gets the contents, an index of experiments its own."""
    here = (ROOT / name).parent

    def led(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:", target) or not (here / target).is_dir():
            return match.group()
        return f"[{text}]({target.rstrip('/')}/README.md)" if (here / target / "README.md").exists() else text

    source[0] = LINK.sub(led, source[0])
    single = {page for page in app.env.found_docs if re.fullmatch(r"experiments/.+/README", page)}
    if name == root_doc:
        named = {page for pages in CONTENTS.values() for page in pages}
        source[0] += "".join(contents(pages, caption) for caption, pages in CONTENTS.items())
        source[0] += contents(sorted(app.env.found_docs - named - single - {root_doc}), "More")
    elif name == "experiments/README":
        source[0] += contents([f"/{page}" for page in sorted(single)])


def contents(pages: Any, caption: str = "") -> str:
    """A table of contents that only the side bar shows; nothing where it is empty."""
    if not pages:
        return ""
    return "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {caption}" * bool(caption), "", *pages, "```"])


def finished(app: Any, error: Exception | None) -> None:
    """Open the site at its front page."""
    if error is None:
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    for language, lexer in {"csv": TextLexer, "jsonl": JsonLexer}.items():  # Pygments knows neither
        app.add_lexer(language, lexer)
    app.connect("source-read", prepared)
    app.connect("build-finished", finished)
