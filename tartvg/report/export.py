"""Tables and plots as files for papers and spreadsheets: LaTeX, CSV, Markdown, SVG, PNG."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tartvg.records import write_atomic
from tartvg.report.tables import PAPER_COLUMN, Table, to_markdown

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "→": r"$\to$", "−": "$-$",  # noqa: RUF001
}  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def slug(title: str) -> str:
    """A file name of a title: `mIoU of each run` -> `miou_of_each_run`."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:80] or "table"


def latex_text(text: str) -> str:
    """Escaped for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def to_latex(table: Table) -> str:
    """A `table` environment for booktabs. The paper's numbers are grey and in italics, under columns that say so."""

    def shown(text: str, is_paper: bool) -> str:
        return rf"\textit{{\textcolor{{gray}}{{{latex_text(text)}}}}}" if is_paper and text else latex_text(text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line([shown(f"{c.text} {c.interval}".strip(), c.is_paper) for c in row]) for row in table.rows]
    note = [rf"\par\footnotesize {latex_text(table.note)}"] if table.note else []
    return "\n".join(
        [
            "% needs booktabs and xcolor",
            r"\begin{table}",
            rf"\caption{{{latex_text(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            line([shown(column, column.startswith(PAPER_COLUMN)) for column in table.columns]),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *note,
            r"\end{table}",
            "",
        ]
    )


def to_csv(table: Table) -> str:
    """One line per row, intervals in a column of their own beside the value.

    Text that a spreadsheet would take for a formula gets an apostrophe in front.
    """

    def safe(text: str) -> str:
        return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text

    with_interval = [any(row[i].interval for row in table.rows) for i in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head: list[str] = []
    for column, is_wide in zip(table.columns, with_interval, strict=True):
        head += [safe(column), safe(f"{column} (95 % interval)")] if is_wide else [safe(column)]
    writer.writerow(head)
    for row in table.rows:
        cells: list[str] = []
        for cell, is_wide in zip(row, with_interval, strict=True):
            cells += [safe(cell.text), safe(cell.interval)] if is_wide else [safe(cell.text)]
        writer.writerow(cells)
    return buffer.getvalue()


def write_tables(tables: Sequence[Table], folder: Path, title: str) -> None:
    """`report.md`, `tables.tex` and one CSV per table in `folder`."""
    write_atomic(folder / "report.md", f"# {title}\n\n" + "\n".join(to_markdown(t) for t in tables))
    write_atomic(folder / "tables.tex", "\n".join(to_latex(t) for t in tables))
    for table in tables:
        write_atomic(folder / f"{slug(table.title)}.csv", to_csv(table))


def write_figure(figure: Figure, path: Path) -> None:
    """`<path>.svg` and `<path>.png`; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(str(path.with_name(f"{path.name}.svg")), metadata={"Date": None})
    FigureCanvasAgg(figure).print_png(str(path.with_name(f"{path.name}.png")), metadata={"Software": None})
