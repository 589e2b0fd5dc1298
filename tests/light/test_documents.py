"""Documents: links lead somewhere, commands compose, files that are named exist, pictures are small. No torch."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.settings import ROOT, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from markdown_it import MarkdownIt
from markdown_it.token import Token

IGNORED = {".venv", "runs", "data", "build", "corpus"}
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md")
    if not {part for part in path.relative_to(ROOT).parts if part in IGNORED or part.startswith(".")}
)  # fmt: skip
MAX_README_LINES = 150
MAX_PICTURE_BYTES = 200_000
MAX_JOBS = 12
"""Jobs of a command with several values per setting that are composed."""
MARKDOWN = MarkdownIt("commonmark").enable("table")
STARTERS = re.compile(r"(?:^|\s|/)(?:run\.py|slurm\.sbatch|torchrun\.sh)(?=\s|$)")
"""What passes its arguments on to Hydra."""
FORMER = {"CHANGELOG.md"}
"""Documents that name what no longer exists."""
TUTORIAL = "docs/tutorial.md"
"""Names what its reader makes; tests/test_tutorial.py follows it."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tokens(path: Path) -> Iterator[Token]:
    """All tokens, inline ones too."""
    for token in MARKDOWN.parse(path.read_text()):
        yield token
        yield from token.children or []


def anchors(path: Path) -> set[str]:
    """The ids that GitHub gives the headings of a document."""
    found: set[str] = set()
    parsed = MARKDOWN.parse(path.read_text())
    for opening, inline in pairwise(parsed):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            number, unique = 0, slug
            while unique in found:
                number += 1
                unique = f"{slug}-{number}"
            found.add(unique)
    return found


def links(path: Path) -> Iterator[str]:
    """Targets of links and pictures that are no addresses."""
    for token in tokens(path):
        target = str(token.attrs.get("href", token.attrs.get("src", "")))
        if target and not re.match(r"[a-z]+:", target):
            yield target


def shell(path: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and inline code."""
    for token in tokens(path):
        if token.type in ("fence", "code_block"):
            yield from token.content.replace("\\\n", " ").splitlines()
        elif token.type == "code_inline":
            yield token.content


def words(text: str) -> list[str]:
    """The words of one command, up to `&&` or a comment; [] for code that is no command."""
    try:
        found = shlex.split(text, comments=True)
    except ValueError:
        return []
    return found[: found.index("&&")] if "&&" in found else found


def commands(path: Path) -> Iterator[tuple[str, ...]]:
    """Arguments of every call of run.py, also through a recipe, without Hydra's own options."""
    for line in shell(path):
        if not STARTERS.search(line):
            continue
        said = words(line)
        starts = [i for i, word in enumerate(said) if STARTERS.search(" " + word)]
        if not starts:
            continue
        given = said[starts[0] + 1 :]
        overrides = [word for word in given if "=" in word and not word.startswith("--") and "<" not in word]
        if overrides:
            yield tuple(overrides)


def jobs(overrides: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One job per value: `seed=0,1,2` stands for three."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    chosen: list[list[str]] = [[]]
    for text, override in zip(overrides, parsed, strict=True):
        values = [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()] \
            if override.is_sweep_override() else [text]  # fmt: skip
        chosen = [[*before, value] for before in chosen for value in values]
    return [tuple(job) for job in chosen[:MAX_JOBS]]


CASES = sorted({(name(path), command) for path in DOCUMENTS if name(path) != TUTORIAL for command in commands(path)})


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(ROOT) and there.exists(), f"{name(path)}: {target}"
        if anchor:
            assert there.suffix == ".md" and anchor in anchors(there), f"{name(path)}: {target}"


@pytest.mark.parametrize(("path", "command"), CASES, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_every_command_composes(path: str, command: tuple[str, ...]) -> None:
    """Values may be placeholders such as /path/to/videos; names of settings and choices may not."""
    for job in jobs(command):
        composed(*job)


def test_the_commands_are_found() -> None:
    """The search itself: the README's and those of every page that has some."""
    found = {path for path, _ in CASES}
    assert {"README.md", "docs/commands.md", "docs/reports.md", "recipes/README.md"} <= found
    assert ("README.md", ("policy=qwen2_5_vl_7b", "dataset=charades_sta")) in CASES
    assert jobs(("seed=0,1", "evaluate.split=val")) == [
        ("seed=0", "evaluate.split=val"), ("seed=1", "evaluate.split=val")
    ]  # fmt: skip


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if name(path) not in {*FORMER, TUTORIAL}], ids=name)
def test_every_setting_that_a_document_names_is_there(path: Path) -> None:
    """Inline code such as `grpo.lr` or `filter.*`."""
    config = composed()
    for token in tokens(path):
        dotted = re.fullmatch(r"([a-z]+)((?:\.[a-z0-9_]+)+)(?:\.\*|=\S*)?", token.content)
        if token.type != "code_inline" or not dotted or not hasattr(config, dotted[1]):
            continue
        if Path(dotted[0]).suffix in (".md", ".html", ".py", ".yaml", ".jsonl"):
            continue
        value: object = config
        for part in (dotted[1] + dotted[2]).split("."):
            assert hasattr(value, part), f"{name(path)}: {token.content}"
            value = getattr(value, part)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if name(path) not in {*FORMER, TUTORIAL}], ids=name)
def test_every_program_that_a_document_calls_is_there(path: Path) -> None:
    for line in shell(path):
        said = words(line)
        for program, argument in pairwise(said):
            module = re.fullmatch(r"((?:tartvg|experiments)(?:\.\w+)+)", argument)
            if program == "-m" and module:
                file = ROOT / module[1].replace(".", "/")
                assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{name(path)}: {line}"
            if re.fullmatch(r"(.*/)?(python|pytest)", program) and re.fullmatch(r"[\w/.]+\.py", argument):
                assert (ROOT / argument).exists(), f"{name(path)}: {line}"


def test_the_tree_of_the_readme_is_the_repository() -> None:
    """Every line of the tree exists, and every package and folder that is committed has a line."""
    text = (ROOT / "README.md").read_text()
    tree = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith("run.py"))
    named = set()
    for line in tree.splitlines():
        prefix = "tartvg/" if line.startswith("  ") else ""
        named |= {prefix + word for word in re.findall(r"(?:^ *|; )([\w.]+(?:/|\.py))(?=[ :]|$)", line)}
    for entry in named:
        assert (ROOT / entry).exists(), entry
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    parts = [Path(file).parts for file in listed]
    folders = {f"{p[0]}/" for p in parts if len(p) > 1 and not p[0].startswith(".")}
    folders |= {f"tartvg/{p[1]}/" for p in parts if p[0] == "tartvg" and len(p) > 2 and p[1] != "assets"}
    assert folders <= named


def test_the_readme_is_short_and_its_pictures_are_small_and_described() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= MAX_README_LINES
    pictures = [token for token in tokens(readme) if token.type == "image"]
    assert len(pictures) == 2 and all(len(picture.content) > 40 for picture in pictures)
    for picture in (ROOT / "docs/pictures").iterdir():
        assert picture.stat().st_size < MAX_PICTURE_BYTES, picture.name


EQUATIONS = {
    "IoU", "soft IoU", "N", "rFormat", "rsIoU", "TAR1", "TAR2", "TAR3", "rTAR, total", "cap", "prompt", "rollouts",
    "advantage", "log π", "ratio", "objective", "KL", "π_ref", "LoRA", "video positions", "filter", "stages",
    "mIoU, R1@m", "valid outputs", "reward hacking", "format collapse", "stagnation",
}  # fmt: skip
"""The first column of docs/paper_to_code.md: every equation and rule that the paper states."""


def named_rows(path: Path) -> Iterator[tuple[str, list[list[tuple[str, Path]]]]]:
    """Rows of a document's tables: the first cell, and the linked names of each later cell with their files."""
    title, cells = "", 0
    found: list[list[tuple[str, Path]]] = []
    for token in MARKDOWN.parse(path.read_text()):
        if token.type == "tr_open":
            title, cells, found = "", 0, []
        elif token.type == "inline" and token.children is not None:
            cells += 1
            if cells == 1:
                title = token.content
            hrefs = [str(t.attrs["href"]) for t in token.children if t.type == "link_open"]
            names = [t.content for t in token.children if t.type == "code_inline"]
            if hrefs:
                found.append([(n, (path.parent / h).resolve()) for n, h in zip(names, hrefs, strict=True)])
        elif token.type == "tr_close" and found:
            yield title, found


def line_of(name: str, file: Path) -> int | None:
    """Where a function, or a method as `Class.method`, is defined in a file."""
    body: list[ast.stmt] = ast.parse(file.read_text()).body
    line = None
    for part in name.split("."):
        node = next((n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part), None)
        if node is None:
            return None
        line, body = node.lineno, node.body
    return line


def test_every_equation_has_a_function_and_a_test_that_are_there() -> None:
    rows = list(named_rows(ROOT / "docs/paper_to_code.md"))
    assert {title for title, _ in rows} == EQUATIONS and len(rows) == len(EQUATIONS)
    for title, (functions, tests) in rows:
        for name, file in (*functions, *tests):
            assert line_of(name, file) is not None, f"{title}: {name} is not in {file.name}"
        assert all(file.is_relative_to(ROOT / "tartvg") for _, file in functions), title
        assert tests and all(n.startswith("test_") and f.is_relative_to(ROOT / "tests") for n, f in tests), title


def test_a_name_that_is_gone_is_found() -> None:
    """The search itself."""
    score = ROOT / "tartvg/rewards/rubric.py"
    line = line_of("Rubric.score", score)
    assert line is not None and "def score" in score.read_text().splitlines()[line - 1]
    assert line_of("Rubric.scores", score) is None and line_of("score", score) is None


def test_the_glossary_is_in_order_and_names_each_word_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    words_there = [row for row in rows if row not in ("word", "---")]
    assert words_there == sorted(set(words_there), key=str.lower) and len(words_there) > 30
