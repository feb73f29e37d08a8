"""`pgpo report`: one self-contained HTML page, which opens from disk and needs no network; or Markdown (markdown.py).

    paths --sources--> runs, studies --methods--> comparisons of methods --comparison, tables--> HTML --page--> file

The Content-Security-Policy of the page allows its own script and style by their hash and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pgpo import __version__, runlog
from pgpo.errors import UserError
from pgpo.files import write_atomically
from pgpo.report import markdown
from pgpo.report import methods as m
from pgpo.report.charts import styles_of
from pgpo.report.comparison import SIGNAL_CHARTS, Shared, comparison_section
from pgpo.report.details import (
    NOT_TOLD,
    alarm_marks,
    alarm_section,
    configuration_section,
    mapping,
    plan_section,
    profile_section,
)
from pgpo.report.markup import Html, data_block, el, join
from pgpo.report.methods import Comparison
from pgpo.report.samples import sample_section
from pgpo.report.sources import StudySource, number, read_sources
from pgpo.report.tables import COLLAPSE_POINTS, overview_table, scrolling
from pgpo.runlog import LoggedRun

MOST_POINTS, FEWEST_POINTS = 25_000, 25  # on the page; of one curve
LONGEST_TITLE = 80  # characters
EXPLAINED = (  # the metrics that the page draws
    runlog.INFORMATION,
    runlog.RHO,
    runlog.STUDENT_ENTROPY,
    runlog.TEACHER_ENTROPY,
    runlog.DIVERGENCE,
    runlog.SAMPLED_KL,
    runlog.SAMPLED_KL_WRONG,
    runlog.DEMONSTRATION_LOGPROB,
    runlog.TRUST_RHO,
    runlog.TRUST_MOVED,
    runlog.TRUST_BUDGET,
    runlog.TRUST_RATIO,
    runlog.GRAD_NORM,
    runlog.COMPLETION_LENGTH,
    runlog.LENGTH_TAIL,
    runlog.ACTIVE_SHARE,
)


FORMATS = {"html": ".html", "markdown": ".md"}  # name -> ending of its files


def main(paths: Sequence[Path], out: Path | None = None, figures: Path | None = None, form: str | None = None) -> int:
    """Write the report, and with `figures` a PNG and an SVG of each setting into that folder; returns the exit status.

    `form` is of FORMATS, by default what the ending of `out` says; `out` by default report.html or report.md.

    Raises UserError when nothing can be reported, `out` or `figures` cannot be written, or matplotlib is missing.
    """
    form = form or ("markdown" if out is not None and out.suffix in (".md", ".markdown") else "html")
    out = out or Path("report" + FORMATS[form])
    if out.is_dir():
        raise UserError(f"{out} is a folder; give --out a file, such as {out / 'report.html'}.")
    if figures is not None:
        from pgpo.report.figures import require_matplotlib

        require_matplotlib()
    report = Report.of(*read_sources(paths))
    text = page(report) if form == "html" else as_markdown(report)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"the report {out} cannot be written ({error.strerror}); choose another --out.") from error
    size = len(text.encode("utf-8", "backslashreplace"))
    amount = f"{size / 1e6:.1f} MB" if form == "html" else f"{size / 1e3:.0f} kB"
    print(f"report: {out} ({amount})", file=sys.stderr)
    if figures is not None:
        from pgpo.report.figures import plot_comparisons

        for path in plot_comparisons(report.comparisons, figures):
            print(f"figure: {path}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Report:
    """What is reported. `of_runs`: the comparison of all runs, None without runs; `of_studies`: those of each study."""

    runs: list[LoggedRun]
    studies: list[StudySource]
    of_runs: Comparison | None
    of_studies: list[list[Comparison]]

    @classmethod
    def of(cls, runs: list[LoggedRun], studies: list[StudySource]) -> Report:
        of_runs = m.comparison_of_runs(runs, "Runs") if runs else None
        return cls(runs, studies, of_runs, [m.comparisons_of_study(study) for study in studies])

    @property
    def comparisons(self) -> list[Comparison]:
        of_runs = [self.of_runs] if self.of_runs else []
        return of_runs + [comparison for comparisons in self.of_studies for comparison in comparisons]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for comparison in self.comparisons for method in comparison.methods))


def page(report: Report) -> str:
    """The whole page as text; the same files give the same page."""
    shared = Shared(styles_of(report.methods), _points_for(report))
    sections = [*_sections_of_runs(shared, report), *_sections_of_studies(shared, report)]
    sections.append(("how-to-read", "How to read", _how_to_read()))
    links = [el("li", _link(key, text)) for key, text, _ in sections]
    title = _title(report)
    style = _asset("page.css") + _legend_rules(style.index for style in shared.styles.values())
    script = _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<meta name="referrer" content="no-referrer">'),
        el("title", f"{title} · pgpo report"),
        el("style", Html(style)),
    )
    body = el(
        "body",
        el("a", "Skip to the results", href="#main", class_="skip"),
        el(
            "header",
            el("p", "pgpo report", class_="eyebrow"),
            el("h1", title),
            _lead(),
            _facts(report),
            el("nav", el("ul", *links), aria_label="Contents"),
        ),
        el("main", *(section for *_, section in sections), id="main"),
        el("footer", el("p", f"Made by pgpo {__version__}. The page is whole: it loads nothing from elsewhere.")),
        data_block("readings", shared.readings),
        el("script", Html(script)),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def as_markdown(report: Report) -> str:
    """The whole report as Markdown; the same files give the same text."""
    settings: list[list[str]] = []
    if report.of_runs is not None and len(report.runs) > 1:
        labels = [run.method for run in report.of_runs.runs]
        names = [
            label if labels.count(label) == 1 else f"{label} ({run.name})" for label, run in zip(labels, report.runs)
        ]
        configs = [{k: v for k, v in run.config.items() if k != "arguments"} for run in report.runs]
        told = [name for name in m.differing(configs) if name not in NOT_TOLD]
        rows = [[name, *(m.short(config.get(name)) for config in configs)] for name in told]
        settings = [[markdown.plain(cell) for cell in row] for row in (["setting", *names], *rows)] if rows else []
    commands = [" ".join(map(str, run.command)) for run in report.runs]
    told_facts = facts(report) | {"Command": "; ".join(dict.fromkeys(commands))}
    return markdown.document(_title(report), told_facts, report.comparisons, settings)


Section = tuple[str, str, Html]  # id, what the contents call it, markup


def _sections_of_runs(shared: Shared, report: Report) -> list[Section]:
    if report.of_runs is None:
        return []
    labels = [run.method for run in report.of_runs.runs]
    marks = alarm_marks(report.runs)
    curves = comparison_section(shared, report.of_runs, "runs", "Learning curves", marks, all_open=True)
    sections: list[tuple[str, str, Html | None]] = [
        ("runs", "Learning curves", curves),
        ("samples", "Samples", sample_section(report.runs, labels)),
        ("profile", "Profile", profile_section(report.runs, labels)),
        ("alarms", "Alarms", alarm_section(report.runs)),
        ("configuration", "Configuration", configuration_section(report.runs, labels)),
    ]
    return [(key, text, section) for key, text, section in sections if section is not None]


def _sections_of_studies(shared: Shared, report: Report) -> list[Section]:
    sections = []
    alone = len(report.studies) == 1 and not report.runs
    for number_, (study, comparisons) in enumerate(zip(report.studies, report.of_studies), 1):
        key = f"study-{number_}"
        title = "Overview" if alone else f"Study {study.name}"
        links = [_link(f"{key}-{place}", comparison.name) for place, comparison in enumerate(comparisons)]
        table = overview_table(comparisons, links, shared.styles)
        sections.append((key, title, el("section", el("h2", title), table, id=key)))
        for place, comparison in enumerate(comparisons):
            place_key, name = f"{key}-{place}", f"Setting {comparison.name}"
            sections.append((place_key, comparison.name, comparison_section(shared, comparison, place_key, name, [])))
        sections.append((f"{key}-plan", "Plan and environment", plan_section(study, comparisons, f"{key}-plan")))
    return sections


def _asset(name: str) -> str:
    return (files("pgpo.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _legend_rules(indices: Iterable[int]) -> str:
    """CSS by which a checkbox of a legend hides a method, and pointing at a name fades the others, without a script."""
    hide = 'section:has(.legend input[value="{0}"]:not(:checked)) svg [data-m="{0}"]{{display:none}}\n'
    asked = '[data-key="{0}"]:hover,[data-key="{0}"] :focus-visible'
    fade = f'section:has({asked}) figure [data-m]:not([data-m="{{0}}"]){{{{opacity:.1}}}}\n'
    return "".join((hide + fade).format(index) for index in indices)


def _points_for(report: Report) -> int:
    """Points per curve that keep the page below about 3 MB (measured: 100 bytes a point, with band and readings)."""
    curves = sum(len(comparison.results) for comparison in report.comparisons) * sum(
        len(signal.names) for signal in SIGNAL_CHARTS
    )
    return max(FEWEST_POINTS, min(m.POINTS, MOST_POINTS // max(1, curves)))


def _link(target: str, text: str) -> Html:
    return el("a", text, href=f"#{target}")


# Head and end ----------------------------------------------------------------------------------------------------


def _title(report: Report) -> str:
    parts = [f"Study {study.name}" for study in report.studies]
    if report.of_runs is not None:
        count = f"{len(report.runs)} runs: " if len(report.runs) > 1 else "One run: "
        methods = _listed(report.of_runs.methods, 4)
        parts.insert(
            0, count + (methods if len(methods) <= LONGEST_TITLE else f"{len(report.of_runs.methods)} methods")
        )
    return "; ".join(parts)


def _lead() -> Html:
    i_k, rho_k = join([el("i", "I"), el("sub", "k")]), join(["ρ", el("sub", "k")])
    text = [
        *(
            "A student model learns from its own teacher: the same network, shown a right solution. The information ",
            i_k,
        ),
        *(
            " of step ",
            el("i", "k"),
            " is the student’s token entropy minus the teacher’s. PGPO multiplies the step by ",
        ),
        *(rho_k, " = min(exp(α ", i_k, "), ρ", el("sub", "max"), "), SDPO takes it as it is, GRPO has no teacher."),
    ]
    return el("p", *text, class_="lead")


def _facts(report: Report) -> Html:
    told = [el("div", el("dt", name), el("dd", text)) for name, text in facts(report).items() if text]
    return el("dl", *told, class_="facts")


def facts(report: Report) -> dict[str, str]:
    """What was run, in words; an empty text where nothing is known."""
    runs = [run for comparison in report.comparisons for run in comparison.runs]
    lines = [line for run in runs for line in run.evaluations]
    last = [max([*run.steps[-1:], *(line[runlog.STEP] for line in run.evaluations)], default=0) for run in runs]
    environments = [run.environment for run in report.runs]
    environments += [mapping(study.summary.get("environment")) for study in report.studies]
    ks, questions = (_span(line.get(name) for line in lines) for name in (runlog.K, runlog.QUESTIONS))
    seeds = {run.seed for run in runs if run.seed}
    return {
        "Task": _listed(_tasks(report), 4),
        "Settings": str(len(report.comparisons)) if report.studies else "",
        "Methods": str(len(report.methods)),
        "Runs": f"{len(runs)} with {len(seeds)} seeds" if len(seeds) > 1 else str(len(runs)),
        "Steps": _span(last),
        "Evaluation": f"avg@{ks} on {questions} questions" if lines else "none",
        "Device": _listed(_values(environments, "device"), 2),
        "Commit": _listed([_commit(value) for value in _commits(environments)], 2),
    }


def _tasks(report: Report) -> list[str]:
    """Task and domain of the runs, and of the settings of the studies where they name them."""
    configs = [run.config for run in report.runs]
    for study, comparisons in zip(report.studies, report.of_studies):
        document = mapping(study.summary.get("study"))
        common, written = mapping(document.get("common")), mapping(document.get("settings"))
        configs += [common | mapping(written.get(comparison.name)) for comparison in comparisons]
    keys = ("task", "domain")
    found = [" ".join(str(config[key]) for key in keys if config.get(key) is not None) for config in configs]
    return [text for text in dict.fromkeys(found) if text]


def _values(dictionaries: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(str(values[name]) for values in dictionaries if values.get(name) is not None))


def _commits(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of runs, which have one each, and of studies, which may have several."""
    found = [[values.get("git_commit"), *mapping(values.get("commits"))] for values in environments]
    return list(dict.fromkeys(str(commit) for commits in found for commit in commits if commit not in (None, "None")))


def _commit(text: str) -> str:
    """Ten digits, and whether the source had uncommitted changes."""
    name, _, changed = text.partition("-")
    return f"{name[:10]}{' (changed)' if changed else ''}"


def _span(values: Iterable[Any]) -> str:
    """The value, or the range from the smallest to the largest."""
    known = sorted({value for value in map(number, values) if math.isfinite(value)})
    return "–".join(f"{value:.10g}" for value in dict.fromkeys((known[0], known[-1]))) if known else "?"


def _listed(names: Sequence[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _how_to_read() -> Html:
    texts = [
        "Signals: the strong line is a centered mean over 5 % of the steps (geometric on a log scale), the faint line"
        " is every step. Of several seeds both show the mean, and the band goes from the lowest to the highest smoothed"
        " seed. A spike of the faint line may leave the chart.",
        f"A run has collapsed when its last evaluation lies more than {COLLAPSE_POINTS} below its own highest.",
        "The boxes of a legend hide a method. Point at a chart to read its numbers, or move to it with Tab and then"
        " with the arrow keys.",
    ]
    described = {runlog.AVG_AT_K: runlog.EVALUATIONS[runlog.AVG_AT_K]}
    described |= {name: runlog.METRICS[name] for name in EXPLAINED}
    rows = [
        el("tr", el("th", el("code", name), scope="row"), el("td", "" if unit == "1" else unit), el("td", meaning))
        for name, (unit, meaning) in described.items()
    ]
    heads = [el("th", text, scope="col", class_="left") for text in ("Name in the files", "Unit", "Meaning")]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows), class_="settings")
    paragraphs = [el("p", text, class_="lead") for text in texts]
    return el("section", el("h2", "How to read this page"), *paragraphs, scrolling(table, "Names"), id="how-to-read")
