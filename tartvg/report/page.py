"""One self-contained HTML page about a run: no script, nothing loaded from the network, everything escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tartvg.launch.sweeps import FAILED, read_job
from tartvg.records import write_atomic
from tartvg.report.alarms import alarms_table
from tartvg.report.cards import case_html, choose_cases, rollouts_html
from tartvg.report.compare import pooled_p_value
from tartvg.report.curves import draw_panels
from tartvg.report.difficulty import difficulty_tables
from tartvg.report.faithfulness import controls_table
from tartvg.report.paper import paper_tables
from tartvg.report.runs import TARGETS, RunFolder, first_and_last_groups, read_run
from tartvg.report.sources import source_tables
from tartvg.report.strips import ANCHOR_COLOUR, ANSWER_COLOUR, TRUTH_COLOUR
from tartvg.report.style import CSS
from tartvg.report.tables import Table, filter_table, percent, seconds_table, stage_table, throughput_table, to_html
from tartvg.types import GroundingSample, Scorecard

NO_PAGES: Mapping[str, str] = {}


def build_report(
    run_dir: Path,
    samples_by_id: Mapping[str, GroundingSample],
    output: Path,
    pages: Mapping[str, str] = NO_PAGES,
    remarks: Sequence[str] = (),
) -> Path:
    """Write the page about `run_dir` to the file `output` and return it.

    `samples_by_id` are the evaluated samples: they give the truth and the video files of the film strips. `pages` are
    further pages to link to, `remarks` what the reader has to know first. What the run folder lacks is left out and
    named at the end of the page. Raises ValueError for a folder that does not exist and for damaged files; a damaged
    video only loses its frames.
    """
    run = read_run(run_dir)
    sections = [
        ("scores", "Scores", _scores(run)),
        ("sources", "Sources", "".join(map(to_html, source_tables(run.path, run.metrics)))),
        ("faithfulness", "Faithfulness", _table(controls_table(run.path))),
        ("alarms", "Alarms", _table(alarms_table(run.path))),
        ("curves", "Training curves", _curves(run)),
        ("difficulty", "Difficulty", "".join(map(to_html, difficulty_tables(run.path)))),
        ("filter", "Filter", _filter(run)),
        ("time", "Time", _time(run)),
        ("examples", "Test queries", _examples(run, samples_by_id)),
        ("rollouts", "What the policy said while it learned", _rollouts(run)),
        ("config", "Configuration", _config(run)),
        ("missing", "Missing", _missing(run)),
    ]
    title = f"TAR-TVG run: {run.path.resolve().name}"
    lead = f"{_lead(run, samples_by_id)}{remarks_html([*_failure(run), *remarks])}{page_links(pages)}"
    write_atomic(output, html_page(title, lead, sections))
    return output


def html_page(title: str, lead: str, sections: Sequence[tuple[str, str, str]], head: str = "") -> str:
    """A whole page: `lead`, the sections (anchor, title, body) and `head` are HTML; empty sections are left out."""
    shown = [(anchor, name, body) for anchor, name, body in sections if body]
    links = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name, _ in shown)
    contents = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(shown) > 1 else ""
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{body}</section>' for anchor, name, body in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style>{head}</head><body>"
        f"<header><h1>{escape(title)}</h1>{lead}"
        f"{contents}</header><main>{body}</main></body></html>\n"
    )


def page_links(pages: Mapping[str, str]) -> str:
    """Links to further pages beside this one: address, relative to it, by name."""
    if not pages:
        return ""
    items = "".join(f'<li><a href="{escape(address)}">{escape(name)}</a></li>' for name, address in pages.items())
    return f'<nav aria-label="Further pages"><ul>{items}</ul></nav>'


def remarks_html(remarks: Sequence[str]) -> str:
    """What the reader has to know before the numbers."""
    return "".join(f'<p class="remark">{escape(remark)}</p>' for remark in remarks)


def _failure(run: RunFolder) -> list[str]:
    job = read_job(run.path)
    return [f"The job of this run failed: {job.error}"] if job and job.status == FAILED else []


def _ends(run: RunFolder) -> tuple[str | None, str | None]:
    """The policies to compare: the base (or the earliest one scored) and the last one of the method."""
    scored = [target for target in TARGETS if target in run.scores]
    if not scored:
        return None, next(iter(run.scores), None)
    return (scored[0] if len(scored) > 1 else None), scored[-1]


def _lead(run: RunFolder, samples_by_id: Mapping[str, GroundingSample]) -> str:
    first, last = _ends(run)
    intro = (
        '<p class="lead">Temporal video grounding with timestamp anchors: the policy reasons in a think block, narrows '
        "the moment down anchor by anchor, and answers with its start and end.</p>"
    )
    if last is None:
        return f"{intro}<p>No policy of this run has been scored yet.</p>"
    before = _headline(run.scores[first]) if first else {}
    items = ""
    for name, value in _headline(run.scores[last]).items():
        shown, small = percent(value), f"{last}, %"
        if name in before:
            shown, small = f"{percent(before[name])} → {shown}", f"{first} → {last}, %"
        items += f"<div><dt>{escape(name)}</dt><dd>{escape(shown)}<small>{escape(small)}</small></dd></div>"
    return f'{intro}<dl class="figures">{items}</dl>{_significance(run, first, last, samples_by_id)}'


def _headline(card: Scorecard) -> dict[str, float]:
    recall = {f"R1@{t:g}": e.value for t, e in card.recall.items() if t == max(card.recall)}
    return {"mIoU": card.miou.value, **recall, "Valid outputs": card.valid_rate.value}


def _significance(
    run: RunFolder,
    first: str | None,
    last: str,
    samples_by_id: Mapping[str, GroundingSample],
) -> str:
    if first is None or first not in run.predictions or last not in run.predictions:
        return ""
    before, after = run.predictions[first], run.predictions[last]
    p = pooled_p_value(samples_by_id, [(after, before)])
    if p is None:
        return ""
    samples = [samples_by_id[i] for i in {p.sample_id for p in (*before, *after)}]
    shown = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    return (
        f'<p class="note">Difference in mIoU between {escape(first)} and {escape(last)}: {shown} '
        f"(paired sign-flip permutation test by video, {len(samples)} queries of "
        f"{len({s.video for s in samples})} videos).</p>"
    )


def _scores(run: RunFolder) -> str:
    papers = "".join(f"<div>{to_html(_without_note(table))}</div>" for table in paper_tables())
    note = paper_tables()[0].note
    return (
        f"{to_html(stage_table(run.scores))}"
        f'<aside class="paper" aria-label="The paper\'s own numbers"><div class="side">{papers}</div>'
        f'<p class="note">{escape(note)}</p></aside>'
    )


def _without_note(table: Table) -> Table:
    return Table(table.title, table.columns, table.rows)


def _curves(run: RunFolder) -> str:
    panels, absent = draw_panels(run.metrics)
    if not panels:
        return ""
    figures = "".join(f"<figure><figcaption>{escape(p.title)}</figcaption>{p.svg}</figure>" for p in panels)
    note = f'<p class="note">No data for: {escape("; ".join(absent))}.</p>' if absent else ""
    return f'<div class="panels">{figures}</div>{note}'


def _table(table: Table | None) -> str:
    return to_html(table) if table else ""


def _filter(run: RunFolder) -> str:
    return to_html(filter_table(run.filtered)) if run.filtered else ""


def _time(run: RunFolder) -> str:
    table = seconds_table(run.metrics, run.manifests)
    unfinished = [stage for stage, manifest in run.manifests.items() if not manifest.get("finished", False)]
    note = f'<p class="note">Not finished: {escape(", ".join(unfinished))}.</p>' if unfinished else ""
    return f"{_table(table)}{note}{_table(throughput_table(run.metrics))}"


def _examples(run: RunFolder, samples_by_id: Mapping[str, GroundingSample]) -> str:
    first, last = _ends(run)
    if last is None or last not in run.predictions:
        return ""
    before = run.predictions.get(first, []) if first else []
    cases = choose_cases(before, run.predictions[last], samples_by_id)
    if not cases:
        return ""
    cards = "".join(case_html(case, (first or "", last), samples_by_id) for case in cases)
    return (
        "<p>Greedy answers, chosen by rule and not by hand: the largest improvements, the median, the largest losses. "
        f"Each frame stands for its part of the time axis.</p>{key_html()}{cards}"
    )


def key_html() -> str:
    """What the colours of the film strips mean."""
    keys = [(TRUTH_COLOUR, "truth"), (ANCHOR_COLOUR, "anchors, in order"), (ANSWER_COLOUR, "answer")]
    items = "".join(f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for colour, name in keys)
    return f'<ul class="key">{items}</ul>'


def _rollouts(run: RunFolder) -> str:
    parts = []
    for stage, path in run.rollouts.items():
        cards = "".join(rollouts_html(groups) for groups in first_and_last_groups(path))
        if cards:
            parts.append(f"<details open><summary>{escape(stage)}: first and last step</summary>{cards}</details>")
    if not parts:
        return ""
    intro = "<p>Sampled completions with their reward terms before weights; the total has the weights applied.</p>"
    return intro + "".join(parts)


def _config(run: RunFolder) -> str:
    commands = {str(m["command"]) for m in run.manifests.values() if m.get("command")}
    shown = "".join(f"<pre><code>{escape(command)}</code></pre>" for command in sorted(commands))
    if run.config is not None:
        shown += f"<details><summary>config.yaml</summary><pre><code>{escape(run.config)}</code></pre></details>"
    return shown


def _missing(run: RunFolder) -> str:
    if not run.missing:
        return ""
    items = "".join(f"<li><code>{escape(name)}</code></li>" for name in run.missing)
    return f"<p>A complete run has these files too; what would come from them is not on this page.</p><ul>{items}</ul>"
