"""`pgpo report`: the page by parsing it, its numbers by hand, its charts by their coordinates, bad input by name."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_kit import HOSTILE, METHODS, write_run, write_study

from pgpo.cli import main
from pgpo.errors import UserError
from pgpo.intervals import student_t
from pgpo.report import charts, comparison, details, figures, markup, methods, page, samples, tables
from pgpo.report.charts import Chart, Style, line_chart, styles_of, ticks
from pgpo.report.methods import Comparison, Curve, MethodResult, PairedDifference
from pgpo.report.sources import RunCurves, number, numbers, read_sources

VOID = {"meta", "input", "wbr", "br", "link", "img"}
DANGEROUS = {"img", "iframe", "object", "embed", "link", "base", "form", "foreignobject", "image", "use", "animate"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, name: str, **attributes: str) -> list[Element]:
        """Descendants of a name (or *); class_="x" asks for a class."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                same = all(
                    value in classes if key == "class_" else child.attributes.get(key.replace("_", "-")) == value
                    for key, value in attributes.items()
                )
                found += [child] if name in ("*", child.name) and same else []
                found += child.all(name, **attributes)
        return found

    def one(self, name: str, **attributes: str) -> Element:
        (found,) = self.all(name, **attributes)
        return found


class Parser(HTMLParser):
    """A tree; an element that is not closed, or closed in the wrong place, fails."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parsed(text: str) -> Element:
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def report(*paths: Path, out: Path, expect: int = 0) -> Element:
    assert main(["report", *map(str, paths), "--out", str(out)]) == expect
    return parsed(out.read_text(encoding="utf-8"))


def section(root: Element, identifier: str) -> Element:
    return root.one("section", id=identifier)


def cells(table: Element) -> dict[str, dict[str, str]]:
    """Row head -> column head -> text."""
    heads = [" ".join(head.text.split()) for head in table.one("thead").all("th")]
    rows = {}
    for line in table.one("tbody").all("tr"):
        texts = [" ".join(cell.text.split()) for cell in line.children if isinstance(cell, Element)]
        rows[texts[0]] = dict(zip(heads, texts, strict=True))
    return rows


def is_sound(root: Element) -> None:
    """One script of ours, one style, their hashes in the policy, nothing that loads, calls or links outside."""
    scripts = root.all("script")
    assert [script.attributes.get("type") for script in scripts] == ["application/json", None]
    policy = root.one("meta", http_equiv="Content-Security-Policy").attributes["content"] or ""
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    for key, element in (("script-src", scripts[1]), ("style-src", root.one("style"))):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert allowed[key] == f"'sha256-{digest}'"
    identifiers = [element.attributes["id"] for element in root.all("*") if "id" in element.attributes]
    assert len(set(identifiers)) == len(identifiers)
    for element in root.all("*"):
        assert element.name not in DANGEROUS
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "xlink:href", "action")
            if name == "href":
                assert value is not None and value.startswith("#") and value[1:] in identifiers
            if name == "clip-path":
                assert value is not None and value.removeprefix("url(#").removesuffix(")") in identifiers
    assert "@import" not in root.one("style").text and "url(" not in root.one("style").text
    keys = {element.attributes["data-chart"] for element in root.all("svg") if "data-chart" in element.attributes}
    assert json.loads(scripts[0].text).keys() == keys


# The page ---------------------------------------------------------------------------------------------------------


def test_a_page_of_runs_has_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, name) for name in ("pgpo", "sdpo")]
    alarm = {"step": 22, "signal": "grad_norm", "value": 3.125, "limit": 1.24, "action": "freeze", "reason": "why not"}
    (runs[0] / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    root = report(*runs, out=tmp_path / "report.html")
    is_sound(root)
    assert root.one("h1").text == "2 runs: PGPO α = 1, SDPO"
    facts = {div.one("dt").text: div.one("dd").text for div in root.one("dl").all("div")}
    assert facts["Task"] == "lab_world" and facts["Steps"] == "40" and facts["Runs"] == "2"
    assert facts["Evaluation"] == "avg@16 on 64–128 questions"
    curves = section(root, "runs")
    assert curves.all("h3")[0].text == "Accuracy, avg@16, validation questions"
    assert [head.text for head in curves.all("h4")] == [
        "Information I",
        "Step multiplier ρ",
        "Token entropy",
        "Gradient norm before clipping",
        "Divergence of student and teacher",
        "Completion length",
        "Training reward",
        "Samples with a teacher",
        "Time per step",
    ]
    assert [box.attributes["value"] for box in curves.one("div", class_="legend").all("input")] == ["0", "1"]
    entropy = next(figure for figure in curves.all("figure") if figure.all("h4") and "entropy" in figure.one("h4").text)
    assert entropy.one("figcaption").text == "Solid: student; dashed: teacher."
    drawn = {s["n"]: s["y"] for s in json.loads(root.all("script")[0].text)["runs-student-entropy"]["s"]}
    assert list(drawn) == [f"{name}, {who}" for name in ("PGPO α = 1", "SDPO") for who in ("student", "teacher")]
    places = {  # the student's is the higher one
        bool(line.all("path", class_="dashed")): float(
            np.mean([y for _, y in _points(_d(line.one("path", class_="line")))])
        )
        for line in entropy.all("g", data_m="0")
        if line.all("path", class_="line")
    }
    assert places[False] < places[True]
    row = cells(section(root, "alarms").one("table"))["pgpo"]
    assert row == {"run": "pgpo"} | {k: str(v) for k, v in alarm.items()} | {"value": "3.12"}
    assert all(
        len(svg.all("path", class_="flag-mark")) == 1 for svg in curves.all("svg") if "data-chart" in svg.attributes
    )
    settings = section(root, "configuration").all("details")
    assert settings[0].one("summary").text == "Settings that differ (1)" and "open" in settings[0].attributes
    assert cells(settings[0].one("table")) == {"objective": {"Name": "objective", "PGPO α = 1": "pgpo", "SDPO": "sdpo"}}
    assert capsys.readouterr().err == f"pgpo: report: {tmp_path / 'report.html'} (0.1 MB)\n".removeprefix("pgpo: ")


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    study, run = write_study(tmp_path / "study", steps=20, seeds=(0, 1)), write_run(tmp_path / "run")
    texts = []
    for name in ("a.html", "b.html"):
        report(study, run, out=tmp_path / name)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]


def test_runs_and_studies_share_a_page_and_the_colors(tmp_path: Path) -> None:
    one, two = (write_study(tmp_path / name, ("plain",), ("frozen", "sdpo"), (0, 1), 20) for name in ("one", "two"))
    root = report(write_run(tmp_path / "run", "sdpo"), one, two, out=tmp_path / "report.html")
    is_sound(root)
    assert root.one("h1").text == "One run: SDPO; Study made-up; Study made-up"
    numbers_of = []
    for identifier in ("runs", "study-1-0", "study-2-0"):
        labels = section(root, identifier).one("div", class_="legend").all("label")
        numbers_of.append({label.text.split(" (")[0]: label.one("input").attributes["value"] for label in labels})
    of_runs, *of_studies = numbers_of
    assert of_studies[0] == of_studies[1]
    assert len({*of_runs.values(), *of_studies[0].values()}) == 3  # SDPO of the runs is another method
    names = [link.text for link in root.one("nav").all("a")]
    assert names[:1] == ["Learning curves"] and names.count("Study made-up") == 2


# Safety -----------------------------------------------------------------------------------------------------------

BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u200e\u200f]")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_of_a_run_becomes_markup(tmp_path: Path, hostile: str) -> None:
    tokens = [[hostile, 0.3, -1.0, -2.0], ["b", 0.6, -2.0, -1.0]]
    sample = {"prompt": hostile, "completion": hostile + "b", "reward": 1.0, "tokens": tokens}
    name = re.sub(r"[/\x00\ud800]", "", hostile)
    run = write_run(tmp_path / name, hostile, samples=[sample], task=hostile, extra=hostile, **{hostile: hostile})
    plain = write_run(tmp_path / "other", "sdpo", task=hostile, samples=[{"prompt": hostile, "completion": hostile}])
    (run / "alarms.jsonl").write_text(json.dumps({"step": 3} | dict.fromkeys(("signal", "action", "reason"), hostile)))
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "split": hostile, "k": 16, "avg_at_k": 0.5}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, hostile: 1.0, "information": hostile}) + "\n")
    root = report(run, plain, out=tmp_path / "report.html")
    is_sound(root)
    raw = (tmp_path / "report.html").read_bytes().decode("utf-8")
    assert not BIDI.search(raw) and "\x00" not in raw and "\u2028" not in raw and "\u2029" not in raw
    shown = markup.visible(hostile)
    assert [p.text for p in root.all("p", class_="prompt")] == [shown] * 8  # 4 steps of each of the 2 runs
    assert [p.text for p in root.all("p", class_="completion")] == [shown + "b"] * 4 + [shown] * 4


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_of_a_study_becomes_markup(tmp_path: Path, hostile: str) -> None:
    clean = hostile.replace("\ud800", "")
    study = write_study(tmp_path / "study", (clean,), (clean, "sdpo"), (0, 1), 20)
    root = report(study, out=tmp_path / "report.html")
    is_sound(root)
    shown = markup.visible(clean)
    assert root.one("title").text == "Study made-up · pgpo report"
    assert section(root, "study-1-0").one("h2").text == f"Setting {shown}"
    assert shown in [label.text.removesuffix(" (2)") for label in root.one("div", class_="legend").all("label")]


def test_text_is_escaped_and_unseen_characters_are_spelled() -> None:
    assert markup.el("p", '<&>"', markup.Html("<b>x</b>"), None, class_='a"b', hidden=True, off=False) == (
        '<p class="a&quot;b" hidden>&lt;&amp;&gt;&quot;<b>x</b></p>'
    )
    assert markup.visible("a\u202eb\u2066\x00\x1b\x7f\ufeff\ud800") == (
        "a⟨U+202E⟩b⟨U+2066⟩⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩⟨U+FEFF⟩⟨U+D800⟩"
    )
    kept = "tab\tline\nétat 数学 العربية 👩‍🔬"  # right-to-left letters and joiners are text
    assert markup.visible(kept) == kept
    block = markup.data_block("x", {"<!--": "</script>\u2028\u2029&"})
    inner = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert not re.search("[<>&\u2028\u2029]", inner)
    assert json.loads(inner) == {"<!--": "</script>\u2028\u2029&"}


# Bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named_and_the_rest_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "good")
    schema = write_run(tmp_path / "schema", steps=2)
    document = json.loads((schema / "config.json").read_text())
    (schema / "config.json").write_text(json.dumps(document | {"schema": 7}))
    no_metrics = write_run(tmp_path / "no-metrics", steps=2)
    (no_metrics / "metrics.jsonl").unlink()
    corrupt = write_run(tmp_path / "corrupt", steps=3)
    lines = (corrupt / "metrics.jsonl").read_text().splitlines()
    (corrupt / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2], ""]))
    cut = write_run(tmp_path / "cut", "sdpo", steps=12)
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text()[:-30])
    science = write_run(tmp_path / "science", task="science_qa", domain="physics", steps=2)
    domain = write_run(tmp_path / "domain", domain="biology", steps=2)
    keyless = write_run(tmp_path / "keyless", steps=2)
    (keyless / "config.json").write_text(json.dumps({"schema": 1, "config": {}, "pgpo": "0"}))
    listed = write_run(tmp_path / "listed", steps=2)
    (listed / "config.json").write_text(json.dumps(document | {"config": [1]}))
    old_study = write_study(tmp_path / "old-study", ("a",), ("sdpo",), (0,), 4)
    summary = json.loads((old_study / "summary.json").read_text())
    (old_study / "summary.json").write_text(json.dumps(summary | {"schema": 2}))
    unfinished = write_study(tmp_path / "unfinished", ("a",), ("sdpo",), (0,), 4)
    (unfinished / "summary.json").unlink()
    paths = [
        *(tmp_path / "missing", good, schema, no_metrics, corrupt, cut, science, domain, keyless, listed),
        *(old_study, unfinished, good),
    ]
    root = report(*paths, out=tmp_path / "report.html")
    assert root.one("h1").text == "2 runs: PGPO α = 1, SDPO"
    *warnings, last = capsys.readouterr().err.splitlines()
    assert last.startswith("report: ")
    expected = [
        f"skipped {tmp_path / 'missing'}: There is no run directory",
        f"skipped {schema}: {schema / 'config.json'} has schema version 7, this pgpo reads version 1",
        f"skipped {no_metrics}: it has no line in metrics.jsonl",
        f"skipped {corrupt}: Line 2 of {corrupt / 'metrics.jsonl'} is not a JSON object",
        f"the last line of {cut / 'metrics.jsonl'} is truncated and is ignored.",
        f"skipped {science}: its task is science_qa physics, that of {good} is lab_world",
        f"skipped {domain}: its task is lab_world biology, that of {good} is lab_world",
        f"skipped {keyless}: {keyless / 'config.json'} has no 'command'",
        f"skipped {listed}: the config in {listed / 'config.json'} is not a JSON object",
        f"skipped {old_study}: {old_study / 'summary.json'} has schema version 2",
        f"skipped {unfinished}: it has no summary.json",
        f"skipped {good}: it is given twice.",
    ]
    assert len(warnings) == len(expected)
    for line, start in zip(warnings, expected):
        assert line.startswith(f"pgpo: {start}")
    # The run with the cut line is there, without that line.
    (curve,) = [s for s in json.loads(root.all("script")[0].text)["runs-information"]["s"] if s["n"] == "SDPO"]
    assert curve["x"] == 1 and len(curve["y"]) == 11


def test_nothing_to_report_is_refused_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in error] == [
        f"skipped {tmp_path / 'a'}",
        f"skipped {tmp_path / 'b'}",
        "there is nothing to report; give at least one run directory or study folder that can be read.",
    ]
    assert not out.parent.exists()
    assert main(["report"]) == 2
    assert "RUN_OR_STUDY" in capsys.readouterr().err


def test_the_page_is_replaced_in_one_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = write_run(tmp_path / "run", steps=4, every=2), tmp_path / "deep" / "er" / "report.html"
    report(run, out=out)
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    out.write_text("old")

    def fails(text: str, *rest: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        assert main(["report", str(run), "--out", str(out)]) == 2
    assert out.read_text() == "old" and [path.name for path in out.parent.iterdir()] == ["report.html"]
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"pgpo: the report {out} cannot be written (No space left on device); choose another --out."
    )
    report(run, out=out)
    assert main(["report", str(run), "--out", str(out.parent)]) == 2
    assert f"{out.parent} is a folder; give --out a file" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(out / "below.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10, every=5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    odd = ["NaN", "Infinity", None, [1], {"a": 1}, "text", 10**400, True]
    for line, value in zip(lines, odd):
        line |= {"information": value, "grad_norm": -1.0, "entropy": value}
    lines.append({"step": 10**400, "information": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 7, "avg_at_k": null}\n{"step": 8, "avg_at_k": 0.5, "k": [1], "split": {"a": 1}}\n')
    root = report(run, out=tmp_path / "report.html")
    is_sound(root)
    drawn = json.loads(root.all("script")[0].text)
    assert drawn["runs-information"]["s"][0]["y"][:7] == [None] * 7
    assert drawn["runs-information"]["s"][0]["y"][7] == 1.0
    assert (
        drawn["runs-grad-norm"]["s"][0]["y"][:8] == [None] * 8 and None not in drawn["runs-grad-norm"]["s"][0]["y"][8:]
    )


def test_number_and_numbers() -> None:
    assert [number(x) for x in (1, 2.5, True, "Infinity", "-Infinity", 10**400, -1e200)] == [
        *(1, 2.5, 1, math.inf, -math.inf, math.inf, -math.inf)
    ]
    assert all(math.isnan(number(x)) for x in (None, "NaN", "1.5", [], {}))
    assert numbers(0.5).tolist() == [0.5] and numbers([1, 2]).tolist() == [1, 2]
    assert not len(numbers(None)) and not len(numbers("12")) and not len(numbers({"a": 1}))


# Methods and their numbers ----------------------------------------------------------------------------------------


def _curves(method: str = "a", **series: Any) -> RunCurves:
    count = len(next(iter(series.values()))) if series else 0
    steps = np.arange(1, count + 1, dtype=float)
    return RunCurves("name", method, "0", steps, {k: np.array(v, dtype=float) for k, v in series.items()}, [])


def _evaluated(values: dict[int, float], split: str = "validation", width: float = 0.1) -> list[dict[str, Any]]:
    return [
        {"step": step, "split": split, "k": 4, "avg_at_k": v, "avg_at_k_low": v - width, "avg_at_k_high": v + width}
        for step, v in values.items()
    ]


def test_the_numbers_of_one_run_by_hand() -> None:
    run = _curves(information=[0.2, -0.1, math.nan, -0.3], rho=[1.2, 1.0, math.nan, 0.8], step_seconds=[9, 1, 3, 2])
    lines = _evaluated({0: 0.5, 10: 0.9, 40: 0.78}) + _evaluated({0: 0.4, 40: 0.7}, "test", 0.05)
    run.evaluations.extend(lines)
    row = methods._result([run], methods.curve_split([run]))
    expected = {
        methods.INITIAL: 0.5,
        methods.PEAK: 0.9,
        methods.FINAL_VALIDATION: 0.78,
        methods.FINAL: 0.7,
        methods.AUC: (0.7 * 10 + 0.84 * 30) / 40,
        methods.MEAN_RHO: 1.0,
        methods.NEGATIVE_INFORMATION_SHARE: 2 / 3,
        methods.SECONDS_PER_STEP: 2.5,
    }
    for measure, value in expected.items():
        assert row.mean(measure) == pytest.approx(value), measure
    assert row.collapsed == [True] and row.seeds == ["0"]
    assert row.interval(methods.PEAK) == pytest.approx((0.8, 1.0))
    assert row.interval(methods.FINAL_VALIDATION) == pytest.approx((0.68, 0.88))
    assert row.interval(methods.FINAL) == pytest.approx((0.65, 0.75))
    assert row.interval(methods.AUC) is None and math.isnan(row.sd(methods.PEAK))


def test_intervals_over_seeds_are_students_t() -> None:
    # Tabulated two-sided 95 % quantiles.
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 29: 2.045, 120: 1.980}
    for freedom, quantile in table.items():
        assert student_t(freedom) == pytest.approx(quantile, abs=6e-4)
    assert student_t(4, 0.99) == pytest.approx(4.604, abs=6e-4)
    row = MethodResult("a", ["0", "1", "2"], {"final": np.array([0.5, 0.6, 0.7]), "mean_rho": np.array([1.0, 3.0])}, [])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert row.interval("final") == pytest.approx((0.6 - half, 0.6 + half), abs=1e-4)
    assert row.sd("final") == pytest.approx(0.1)
    wide = MethodResult("a", ["0", "1"], {"final": np.array([0.5, 0.9])}, [], bounds={"final": (0.1, 0.2)})
    assert wide.interval("final") == (0.0, 1.0)  # an accuracy has no interval beyond 0 and 1
    low, high = row.interval("mean_rho") or (0, 0)
    assert low < 0 and high > 4


def test_runs_of_one_method_differ_in_their_seed_alone() -> None:
    base = {"objective": "sdpo", "teacher_rate": 0.05, "learning_rate": 1e-3, "seed": 1, "output_dir": "x"}
    configs = [
        base,
        base | {"seed": 2, "output_dir": "y", "logging_dir": "z", "save_steps": 3, "arguments": {"seed": 2}},
        base | {"teacher_rate": 0.01},
        base | {"objective": "pgpo", "alpha": 1.5},
        base | {"objective": "pgpo", "alpha": 1.0, "note": "n"},
        {"seed": 3},
    ]
    assert methods.method_labels(configs, list("abcdef")) == [
        *("SDPO, teacher_rate 0.05", "SDPO, teacher_rate 0.05", "SDPO, teacher_rate 0.01"),
        *("PGPO α = 1.5", "PGPO α = 1", "f"),
    ]
    # More settings differ than a label tells: the directory does.
    many = [{f"setting_{j}": int(i == j) for j in range(5)} | {"objective": "grpo"} for i in range(5)]
    assert methods.method_labels(many, list("abcde")) == [
        "GRPO, setting_0 1, setting_1 0, setting_2 0",
        "GRPO, setting_0 0, setting_1 1, setting_2 0",
        "GRPO, setting_0 0, setting_1 0, setting_2 1",
        "GRPO, setting_0 0, setting_1 0, setting_2 0 (d)",
        "GRPO, setting_0 0, setting_1 0, setting_2 0 (e)",
    ]
    # A setting that tells no more apart than those before it is left out.
    pair = [base | {"teacher": name, "teacher_rate": rate} for name, rate in (("ema", 0.05), ("frozen", 0.0))]
    assert methods.method_labels(pair, list("ab")) == ["SDPO, teacher_rate 0.05", "SDPO, teacher_rate 0"]


def test_a_setting_that_an_older_version_did_not_write_makes_no_method() -> None:
    old = {"objective": "sdpo", "teacher_rate": 0.05, "seed": 1}
    new = old | {"seed": 2, "guard": "off", "run_id": "b7"}
    assert methods.method_labels([old, new, new | {"run_id": "c1"}], list("abc")) == ["SDPO"] * 3
    # But where the others differ in it, it is not known which of them the old run is.
    labels = methods.method_labels([old, new, new | {"guard": "warn"}], list("abc"))
    assert labels == ["SDPO, guard none", "SDPO, guard off", "SDPO, guard warn"]
    # Without an objective nothing says that two runs belong together.
    assert methods.method_labels([{"lr": 1}, {"lr": 2}, {}], list("abc")) == ["lr 1", "lr 2", "lr none"]


def test_bands_go_over_seeds_or_over_questions() -> None:
    runs = [_curves(rho=[1, 2, 3]), _curves(rho=[3, 2]), _curves(rho=[2, 5, 4])]
    for run, values in zip(runs, ({0: 0.2, 5: 0.4}, {0: 0.3, 5: 0.8}, {0: 0.7})):
        run.evaluations.extend(_evaluated(values))
    curve = methods.accuracy_curve(runs, "validation")
    assert curve is not None and curve.low is not None and curve.high is not None and curve.runs == 3
    assert curve.x.tolist() == [0, 5] and curve.y == pytest.approx([0.4, 0.6])
    assert curve.low.tolist() == [0.2, 0.4] and curve.high.tolist() == [0.7, 0.8]
    alone = methods.accuracy_curve(runs[:1], "validation")
    assert alone is not None and alone.low == pytest.approx([0.1, 0.3]) and alone.high == pytest.approx([0.3, 0.5])
    rho = methods.metric_curve(runs, "rho", "a")
    assert rho is not None and rho.low is not None and rho.high is not None and rho.raw is not None
    assert rho.y == pytest.approx([2, 3, 3.5]) and rho.low.tolist() == [1, 2, 3] and rho.high.tolist() == [3, 5, 4]
    assert rho.raw[1] == pytest.approx(rho.y)  # too short to smooth
    single = methods.metric_curve(runs[:1], "rho", "a")
    assert single is not None and single.low is None
    assert methods.metric_curve(runs, "loss", "a") is None


def test_long_curves_are_thinned_without_losing_a_spike() -> None:
    values = np.full(5000, 2.0)
    values[1234] = 50.0
    values[4321] = -40.0
    values[2000:2100] = np.nan
    curve = methods.metric_curve([_curves(rho=values)], "rho", "a", points=50)
    assert curve is not None and curve.raw is not None
    assert len(curve.x) == 50 and len(curve.raw[0]) <= 100
    steps, raw = curve.raw
    assert dict(zip(steps, raw))[1235] == 50 and dict(zip(steps, raw))[4322] == -40
    assert np.isnan(curve.y).sum() == 1 and 2000 < curve.x[np.isnan(curve.y)][0] <= 2100
    # A geometric mean on the log scale: of 1 and 100 it is 10; what has no logarithm is left out.
    log = methods.metric_curve([_curves(g=[1, 4, 0]), _curves(g=[100, 4, 9])], "g", "a", log=True)
    assert log is not None and log.low is not None
    assert log.y == pytest.approx([10, 4, 9]) and log.low == pytest.approx([1, 4, 9])


# Charts -----------------------------------------------------------------------------------------------------------


def _svg(chart: Chart, last: float = 10.0, direct: bool = False) -> Element:
    styles = styles_of([curve.method for curve in chart.curves] + [point.method for point in chart.points])
    return parsed(line_chart(chart, styles, last, (360, 216), direct)).one("svg")


def _d(path: Element) -> str:
    return path.attributes["d"] or ""


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def _curve(x: list[float], y: list[float], **more: Any) -> Curve:
    return Curve("a", "a", np.array(x, dtype=float), np.array(y, dtype=float), **more)


def _axis(svg: Element, log: bool = False) -> tuple[Any, Any]:
    """From coordinates back to values, by the labels of the ticks."""
    frame = svg.one("g", class_="frame")
    texts = [text for text in frame.all("text") if "class" not in text.attributes]
    rows = {float(t.attributes["y"] or 0): float(t.text.replace("−", "-")) for t in texts if "dy" in t.attributes}
    columns = {float(t.attributes["x"] or 0): float(t.text) for t in texts if "dy" not in t.attributes}
    rows = {place: math.log(value) if log else value for place, value in rows.items()}

    def fit(places: dict[float, float]) -> Any:
        slope, offset = np.polyfit(list(places), list(places.values()), 1)
        assert np.allclose([slope * x + offset for x in places], list(places.values()), atol=abs(slope) * 0.2)
        return lambda place: slope * place + offset

    to_y = fit(rows)
    return fit(columns), (lambda place: math.exp(to_y(place))) if log else to_y


@pytest.mark.parametrize("log", [False, True])
def test_a_line_stands_where_its_ticks_say(log: bool) -> None:
    x, y = [0, 2, 4, 5, 7, 10], [0.5, 0.25, math.nan, 4.0, 2.0, 1.0]
    svg = _svg(Chart("key", "Title", "nats", [_curve(x, y)], log=log))
    to_x, to_y = _axis(svg, log)
    path = svg.one("path", class_="line").attributes["d"] or ""
    assert path.count("M") == 2  # the gap
    drawn = _points(path)
    assert [to_x(place) for place, _ in drawn] == pytest.approx([0, 2, 5, 7, 10], abs=0.05)
    assert [to_y(place) for _, place in drawn] == pytest.approx([0.5, 0.25, 4, 2, 1], rel=0.03)
    assert svg.attributes["aria-label"] == "Title (nats) over optimizer steps: a from 0.5 at step 0 to 1 at step 10."
    # page.js finds a step by the frame.
    left, right, low, high = map(float, (svg.attributes["data-frame"] or "").split())
    assert (low, high) == (0, 10) and drawn[0][0] == pytest.approx(left) and drawn[-1][0] == pytest.approx(right)


def test_a_band_goes_up_along_its_high_and_back_along_its_low() -> None:
    curve = _curve([0, 5, 10], [2, 3, 4], low=np.array([1, 2, 3.0]), high=np.array([3, 4, math.nan]))
    svg = _svg(Chart("key", "t", "u", [curve]))
    to_x, to_y = _axis(svg)
    drawn = _points(svg.one("path", class_="band").attributes["d"] or "")
    assert [to_x(x) for x, _ in drawn] == pytest.approx([0, 5, 5, 0], abs=0.05)
    assert [to_y(y) for _, y in drawn] == pytest.approx([3, 4, 2, 1], abs=0.05)


def test_a_lone_point_is_a_dot_and_a_spike_flattens_nothing() -> None:
    svg = _svg(Chart("key", "t", "u", [_curve([0, 3, 10], [math.nan, 2, math.nan])]))
    assert (svg.one("path", class_="line").attributes["d"] or "").endswith("h0")
    steps = np.arange(1.0, 301)
    raw = np.where(steps == 100, 1e6, np.sin(steps))
    svg = _svg(Chart("key", "t", "u", [_curve([0, 10], [-1, 1], raw=(steps / 30, raw))]))
    places = [y for _, y in _points(svg.one("path", class_="line").attributes["d"] or "")]
    assert abs(places[0] - places[1]) > 100  # px of 216
    assert svg.one("g", clip_path="url(#clip-key-360)").all("path", class_="raw")  # the spike is cut, not drawn over


def test_methods_keep_their_color_and_have_a_shape_of_their_own(tmp_path: Path) -> None:
    styles = styles_of(["frozen", "SDPO", "x", "PGPO α = 1", "grpo", "PGPO α = 2"])
    assert {name: style.index for name, style in styles.items()} == {
        "PGPO α = 1": 0,
        "SDPO": 1,
        "grpo": 2,
        "frozen": 3,
        "x": 4,
        "PGPO α = 2": 5,
    }
    assert styles_of(["a", "b", "sdpo"])["sdpo"].index == 1 and len(styles_of(["a", "b", "sdpo"])) == 3
    looks = {(Style(i).classes, Style(i).shape) for i in range(56)}
    assert len(looks) == 56
    outlines = {charts._marker(shape, 0, 0, 4) for shape in charts.SHAPES}
    assert len(outlines) == len(charts.SHAPES)
    # The page's light palette is that of the figures.
    css = (Path(page.__file__).parent / "page.css").read_text()
    light = css[: css.index("@media")]
    found = [re.search(rf"--c{i}: (#\w+)", light) for i in range(charts.COLORS)]
    assert [match[1] for match in found[:6] if match] == [color.lower() for color in figures.COLORS[:6]]
    assert len(figures.COLORS) == charts.COLORS == len(re.findall(r"--c\d: ", light))


def test_long_names_stay_within_title_and_chart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{i}", "sdpo", steps=4, every=2, teacher="x" * 30 + str(i)) for i in range(3)]
    root = report(*runs, out=tmp_path / "report.html")
    assert root.one("h1").text == "3 runs: 3 methods"
    names = [text.text for text in section(root, "runs").all("text", class_="name")]
    assert names and all(len(name) == 19 and name.endswith("…") for name in names)


def test_names_at_the_ends_of_the_lines_do_not_overlap() -> None:
    curves = [
        Curve(name, name, np.array([0.0, 10]), np.array([0.0, 1 + i / 1000])) for i, name in enumerate("abcdefgh")
    ]
    svg = _svg(Chart("key", "t", "u", curves), direct=True)
    places = [float(text.attributes["y"] or 0) for text in svg.all("text", class_="name")]
    assert len(places) == 8 and min(np.diff(sorted(places))) >= 13.9
    assert [
        text.text for text in sorted(svg.all("text", class_="name"), key=lambda t: float(t.attributes["y"] or 0))
    ] == [*"hgfedcba"]
    assert min(places) > 0 and max(places) <= 216


@pytest.mark.parametrize(
    "low, high, count, expected",
    [
        (0.43, 0.96, 4, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (-0.003, 0.07, 4, [0, 0.02, 0.04, 0.06]),
        (0, 60, 5, [0, 20, 40, 60]),
        (-4, 5.4, 3, [0, 5]),
        (1e-9, 5e-9, 4, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count) == pytest.approx(expected)


def test_numbers_as_written() -> None:
    assert [charts.significant(x) for x in (0, 0.1, -12.345, 1234567.0, 0.00001234, 1500, math.nan, math.inf)] == [
        *("0", "0.1", "−12.3", "1.23e6", "1.23e−5", "1500", "–", "∞")
    ]
    assert [charts.fixed(x, 1) for x in (-0.04, -0.06, 12.25, math.nan)] == ["0.0", "−0.1", "12.2", "–"]
    assert [tables.points(x) for x in (0.0123, -0.0123, 0.0001, 0.0)] == ["+1.2", "−1.2", "0.0", "0.0"]


# Settings: crosses, points, tables --------------------------------------------------------------------------------


def test_a_collapsed_run_is_marked_in_chart_and_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sdpo-{seed}", "sdpo", seed, falls=seed == 1) for seed in range(3)]
    runs.append(write_run(tmp_path / "pgpo-0", "pgpo"))
    root = report(*runs, out=tmp_path / "report.html")
    curves = section(root, "runs")
    table = cells(curves.one("table", class_="numbers"))
    assert {name: row["Collapsed runs"] for name, row in table.items()} == {"SDPO": "1 of 3", "PGPO α = 1": "no"}
    strips = curves.one("table", class_="numbers").one("tbody").all("svg", class_="strip")
    assert [(len(s.all("path", class_="cross")), len(s.all("circle"))) for s in strips] == [(1, 2), (0, 1)]
    for hero in curves.all("svg", data_chart="runs-accuracy"):
        (cross,) = hero.all("path", class_="cross")
        assert "sdpo-1 ends" in cross.one("title").text
        end = hero.all("path", class_="line")[0].attributes["d"] or ""
        assert _points(cross.attributes["d"] or "")[0][0] == pytest.approx(_points(end)[-1][0] - 4.5, abs=0.2)
    caption = curves.all("figcaption")[0].text
    assert "from its lowest to its highest seed" in caption and "Band of a method with one run" in caption
    assert "Cross: a run that ends more than 10 points below its own peak." in caption
    assert "Hollow: test questions" in caption


def test_two_evaluations_are_points_and_no_line() -> None:
    run = _curves(rho=[1, 1])
    run.evaluations.extend(_evaluated({0: 0.5, 2: 0.7}, "test"))
    one = Comparison("s", [run], [methods._result([run], "test")], "test")
    chart = comparison.accuracy_chart(one, "k", [])
    assert not chart.curves and [(p.x, p.y) for p in chart.points] == [(0, 50), (2, pytest.approx(70))]
    run.evaluations.extend(_evaluated({4: 0.6}, "test"))
    chart = comparison.accuracy_chart(one, "k", [])
    assert chart.curves[0].y == pytest.approx([50, 70, 60]) and not chart.points


def test_a_study_shows_its_summary(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", steps=40)
    summary = json.loads((study / "summary.json").read_text())
    root = report(study, out=tmp_path / "report.html")
    is_sound(root)
    for place, name in enumerate(("plain", "style")):
        found = section(root, f"study-1-{place}")
        assert found.one("h2").text == f"Setting {name}"
        table = cells(found.one("table", class_="numbers"))
        assert list(table) == list(METHODS)
        for method, row in table.items():
            told = summary["settings"][name]["methods"][method]
            final = np.array(told["final"])
            half = 2.3646 * final.std(ddof=1) / math.sqrt(8)
            bounds = [max(0, final.mean() - half), min(1, final.mean() + half)]
            assert row["Final test, %"] == (
                f"{100 * final.mean():.1f} ± {100 * final.std(ddof=1):.1f}"
                f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
            )
            assert row["Peak validation, %"].startswith(f"{100 * np.mean(told['peak']):.1f}")
            assert row["Selected test, %"].startswith(f"{100 * np.mean(told['selected']):.1f}")
            assert row["Area validation, %"].startswith(f"{100 * np.mean(told['auc']):.1f}")
            assert row["Mean ρ"].startswith(f"{np.mean(told['mean_rho']):.3f}")
            assert row["Collapsed runs"] == f"{sum(told['collapsed'])} of 8"
            assert row["Paper one run, %"] == {"pgpo": "81.0", "sdpo": "79.0"}.get(method, "–")
        strips = found.one("table", class_="numbers").one("tbody").all("svg", class_="strip")
        assert [len(s.all("path", class_="cross")) + len(s.all("circle")) for s in strips] == [8] * 5
        pairs = found.one("table", class_="pairs").one("tbody").all("tr")
        assert len(pairs) == 2 + 8
    overview = cells(section(root, "study-1").one("table"))
    assert "4 of 8 collapsed" in overview["sdpo"]["style"] and "collapsed" not in overview["sdpo"]["plain"]
    assert "paper 79.0" in overview["sdpo"]["style"]
    plan = section(root, "study-1-plan")
    assert [d.one("summary").text for d in plan.all("details")] == [
        "Failed runs (1)",
        "Arguments that differ in plain (2)",
        "Arguments that differ in style (2)",
        "The study as it was written (15)",
        "Environment (4)",
    ]
    assert plan.all("table")[0].one("tbody").text == "plain/pgpo, seed 99ArithmeticError: rho"
    assert cells(plan.all("table")[1])["learning_rate"]["sdpo_matched"] == "0.001, 0.00101, 0.00102, …"
    assert "Failed: pgpo seed 99." in section(root, "study-1-0").text


def test_differences_are_drawn_where_they_lie_and_filled_when_decided() -> None:
    found = {
        "decided": PairedDifference(0.05, 0.01, 0.09, 8, 256, 0.056),
        "open": PairedDifference(-0.01, -0.04, 0.02, 1, 256),
        "below": PairedDifference(-0.05, -0.09, -0.01, 8, 256),
    }
    rows = [MethodResult(name, ["0", "1"], {}, [], versus={"sdpo": one}) for name, one in found.items()]
    rows.append(MethodResult("sdpo", ["0", "1"], {}, [], versus={"grpo": found["open"]}))
    drawn = tables.difference_table(Comparison("s", [], rows, None), styles_of([row.method for row in rows]))
    assert drawn is not None
    root = parsed(drawn)
    lines = root.one("tbody").all("tr")
    assert [line.all("th")[0].text for line in lines] == ["minus sdpo", *found, "minus grpo", "sdpo"]
    places = []
    for line in lines[1:4]:
        strip = line.one("svg", class_="forest")
        (dot,) = strip.all("circle")
        (left, right) = re.findall(r"[MH]([\d.]+)", strip.one("path", class_="line").attributes["d"] or "")
        zero = float((strip.one("path", class_="zero").attributes["d"] or "")[1:].split()[0])
        centre = float(dot.attributes["cx"] or 0)
        places.append((float(left) - zero, centre - zero, float(right) - zero))
    scale = places[0][1] / 5
    for place, (name, one) in zip(places, found.items()):
        assert place == pytest.approx([100 * scale * v for v in (one.low, one.value, one.high)], abs=0.3), name
    marks = [line.all("circle")[0].attributes["class"] for line in lines if line.all("circle")]
    assert marks == ["mark", "hollow", "mark", "hollow"]
    assert [line.all("td")[2].text for line in lines if line.all("td")] == [
        *("excludes 0", "includes 0", "excludes 0", "includes 0")
    ]
    assert next(line.all("td")[1].text for line in lines if line.all("td")) == "+5.0 [+1.0, +9.0]"
    # What an older summary does not have is left open.
    assert [line.all("td")[3].text for line in lines if line.all("td")] == ["5.6", "–", "–", "–"]
    assert "The interval of a single pair of runs does not hold the noise of seeds." in root.text


def test_a_method_with_many_controls_lists_them_in_one_column() -> None:
    one = PairedDifference(0.02, -0.01, 0.05, 8, 256)
    rows = [
        MethodResult("sdpo", ["0"], {}, []),
        MethodResult("a", ["0"], {}, [], versus={"sdpo": one, "lr-a": one}),
        MethodResult("b", ["0"], {}, [], versus={"sdpo": one, "lr-b": one, "shuffled": one}),
    ]
    root = parsed(tables.method_table(Comparison("s", [], rows, None), styles_of(["sdpo", "a", "b"])))
    table = cells(root.one("table"))
    assert table["a"]["minus sdpo points"] == "+2.0[−1.0, +5.0]" and table["sdpo"]["minus sdpo points"] == "–"
    assert table["a"]["minus controls points"] == "lr-a+2.0[−1.0, +5.0]"
    assert table["b"]["minus controls points"] == "lr-b+2.0[−1.0, +5.0]shuffled+2.0[−1.0, +5.0]"


def test_a_study_without_usable_records_keeps_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study", ("plain",), ("pgpo", "sdpo"), (0, 1), 20, failed=False)
    records = study / "records.jsonl.gz"
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) // 2])
    root = report(study, out=tmp_path / "a.html")
    assert re.match(
        rf"pgpo: {records} is damaged: the [123] runs before the damage are drawn\.", capsys.readouterr().err
    )
    assert len(cells(section(root, "study-1-0").one("table", class_="numbers"))) == 2
    records.unlink()
    root = report(study, out=tmp_path / "b.html")
    assert "has no records.jsonl.gz: its tables are shown without curves." in capsys.readouterr().err
    assert "No evaluation was recorded." in root.text and not json.loads(root.all("script")[0].text)
    is_sound(root)
    with gzip.open(records, "wt") as file:
        file.write(
            '[1]\n{"setting": "plain", "method": "pgpo", "status": "ok", "steps": [2, 1], "metrics": {"rho": [1]}}\n'
        )
    report(study, out=tmp_path / "c.html")
    assert "has 1 lines that are not records" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"a": 1},
        {"a": {"methods": {}}},
        {"a": {"methods": {"m": {}, "n": 3}}},
        {"a": {"methods": {"m": {"final": None}}}},
    ],
)
def test_a_thin_summary_is_no_crash(tmp_path: Path, settings: dict[str, Any]) -> None:
    study = write_study(tmp_path / "study", ("a",), ("m",), (0,), 4)
    summary = json.loads((study / "summary.json").read_text())
    summary |= {"settings": settings, "study": [], "environment": None, "name": None}
    (study / "summary.json").write_text(json.dumps(summary))
    is_sound(report(study, out=tmp_path / "report.html"))


def test_a_page_of_200_runs_stays_below_three_megabytes(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", [f"s{i}" for i in range(5)], steps=200)
    root = report(study, out=tmp_path / "report.html")
    assert root.one("dl").text.count("200 with 8 seeds") == 1
    assert (tmp_path / "report.html").stat().st_size < 3e6


# Samples ----------------------------------------------------------------------------------------------------------


def test_tokens_are_placed_with_the_white_space_of_the_completion() -> None:
    assert samples.spaced(["mass", "=", "64", "</answer>", "<eos>"], "mass = 64\n </answer>") == [
        ("", "mass", True),
        (" ", "=", True),
        (" ", "64", True),
        ("\n ", "</answer>", True),
        ("", "<eos>", False),
    ]
    assert samples.spaced([" The", " answer", "�", "."], " The answer é.") == [
        ("", " The", True),
        ("", " answer", True),
        ("", "�", False),
        ("", ".", False),
    ]


def test_disagreement_is_told_by_color_line_and_number(tmp_path: Path) -> None:
    tokens = [
        ["a", 0.004, -0.1, -0.2],
        ["b", 0.01, -0.2, -0.1],
        ["c", 0.06, -1.0, -3.0],
        ["d", 0.3, -4.0, -0.5],
        ["e", 0.65, -0.01, -9.0],
        ["<eos>", 0.0, 0.0, 0.0],
    ]
    sample = {"prompt": "p", "completion": "a b c d e f", "reward": 0.5, "tokens": tokens}
    root = report(write_run(tmp_path / "run", samples=[sample], steps=2), out=tmp_path / "report.html")
    card = root.all("article")[0]
    completion = card.one("p", class_="completion")
    assert completion.text == "a b c d e<eos> f"
    spans = completion.all("span")
    assert [span.attributes["class"] for span in spans] == [
        *("tok d0", "tok d1 more", "tok d2 less", "tok d3 more", "tok d4 less", "tok d0 special")
    ]
    assert [span.attributes.get("tabindex") for span in spans] == [None, None, "0", "0", "0", None]
    assert spans[4].attributes["title"] == (
        "“e”: divergence 0.65 nats; student 99.0 % (log p −0.01), teacher 0.012 % (log p −9.00)"
    )
    rows = cells(card.one("table"))
    assert list(rows) == ["e", "d", "c", "b"]
    assert list(rows["d"].values()) == ["d", "0.3", "−4.00", "−0.50"]
    assert card.one("p", class_="grade").text == "reward 0.5"
    key = root.one("div", class_="token-key").text
    assert "underlined: the teacher finds the token less likely" in key and "overlined: more likely" in key


@pytest.mark.parametrize("tokens", [None, [], "text", [["a", 1.0]], [["a", 1.0, 2.0, 3.0], 5], {"a": 1}])
def test_a_sample_without_token_numbers_is_shown_plain(tmp_path: Path, tokens: Any) -> None:
    sample = {"prompt": "p", "completion": "plain text", "reward": None, "tokens": tokens}
    root = report(write_run(tmp_path / "run", samples=[sample], steps=2), out=tmp_path / "report.html")
    assert {p.text for p in root.all("p", class_="completion")} == {"plain text"}
    assert not root.all("span", class_="tok") and not root.all("div", class_="token-key")
    assert not root.all("p", class_="grade")


def test_few_steps_are_shown_and_long_texts_cut(tmp_path: Path) -> None:
    long = {"prompt": "x" * 5000, "completion": "y" * 9000, "reward": 1.0}
    many = long | {"completion": "z" * 900, "tokens": [["z", 0.3, -1.0, -2.0]] * 900}
    root = report(write_run(tmp_path / "run", steps=30, samples=[long, many] * 3), out=tmp_path / "report.html")
    found = section(root, "samples")
    summaries = [(d.all("summary")[0].text, "open" in d.attributes) for d in found.all("details")]
    shown = [(text, is_open) for text, is_open in summaries if text.startswith("Step")]
    assert shown == [("Step 1", True), ("Step 11", False), ("Step 20", False), ("Step 30", True)]
    assert len(found.all("article")) == 4 * 4
    assert found.all("p", class_="completion")[0].text == "y" * 4000 + " … (5000 more characters)"
    coloured = found.all("p", class_="completion")[1]
    assert coloured.text == "z" * 900 and len(coloured.all("span")) == 600


def test_only_one_run_of_a_method_shows_samples(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sdpo-{seed}", "sdpo", seed, steps=3) for seed in range(3)]
    root = report(*runs, out=tmp_path / "report.html")
    assert [head.text for head in section(root, "samples").all("h3")] == ["SDPO, run sdpo-0"]


# Details ----------------------------------------------------------------------------------------------------------


def test_settings_that_differ_stand_first_and_shared_ones_once(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "sdpo", steps=2, teacher_rate=0.05, arguments={"max_steps": 2}, hub_token="x"),
        write_run(tmp_path / "b", "sdpo", steps=2, teacher_rate=0.01, arguments={"max_steps": 2}),
    ]
    environment = json.loads((runs[1] / "environment.json").read_text())
    environment["packages"]["torch"] = "9.9"
    (runs[1] / "environment.json").write_text(json.dumps(environment))
    found = section(report(*runs, out=tmp_path / "report.html"), "configuration").all("details")
    titles = [d.one("summary").text for d in found]
    assert titles[:3] == ["Settings that differ (2)", "Environment that differs (1)", "Settings that were given (1)"]
    assert ["open" in d.attributes for d in found] == [True, True, False, False, False, False]
    names = ("SDPO, teacher_rate 0.05", "SDPO, teacher_rate 0.01")
    assert cells(found[0].one("table"))["teacher_rate"] == {"Name": "teacher_rate", names[0]: "0.05", names[1]: "0.01"}
    assert cells(found[1].one("table"))["packages.torch"][names[1]] == "9.9"
    shared = next(row for row in found[3].all("tr") if row.all("th")[0].text == "rho_max")
    assert [(cell.text, cell.attributes.get("colspan")) for cell in shared.all("td")] == [("2", "2")]
    assert details.flat({"a": {"b": {"c": 1}}, "d": {}, "e": [1]}) == {"a.b.c": 1, "d": {}, "e": [1]}


# Figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_written_for_every_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path / "study", ("a/b", "a b"), ("pgpo", "sdpo"), (0, 1), 4)
    run, folder = write_run(tmp_path / "run", steps=4, every=2), tmp_path / "figures" / "deep"
    with monkeypatch.context() as patch:  # drawing all of them takes seconds
        patch.setattr(figures, "save", lambda figure, path: path.write_text(figure.get_suptitle()))
        assert main(["report", str(run), str(study), "--out", str(tmp_path / "r.html"), "--figures", str(folder)]) == 0
    titles = {"runs": "Runs", "a-b": "a/b", "a-b-2": "a b"}
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        f"{stem}.{suffix}": title for stem, title in titles.items() for suffix in ("png", "svg")
    }
    assert [line[:8] for line in capsys.readouterr().err.splitlines()] == ["report: "] + ["figure: "] * 6
    assert main(["report", str(run), "--out", str(tmp_path / "r.html"), "--figures", str(tmp_path / "real")]) == 0
    assert (tmp_path / "real" / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "real" / "runs.svg").read_bytes().startswith(b"<?xml")
    (folder / "file").write_text("")
    assert main(["report", str(run), "--out", str(tmp_path / "r.html"), "--figures", str(folder / "file")]) == 2
    assert "cannot be created" in capsys.readouterr().err


def test_a_figure_shows_each_run_and_the_colors_of_the_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sdpo-{seed}", "sdpo", seed, falls=seed == 1) for seed in range(3)]
    sources, _ = read_sources(runs)
    one = methods.comparison_of_runs(sources, "Runs")
    styles = styles_of(one.methods)
    figure = figures.draw_comparison(one, styles)
    accuracy, final = figure.axes[:2]
    color = figures.COLORS[styles["SDPO"].index]
    line = next(line for line in accuracy.lines if len(line.get_xdata()) == 5)
    assert line.get_color() == color
    curve = methods.accuracy_curve(one.runs, "validation")
    assert curve is not None and np.asarray(line.get_ydata()) == pytest.approx(curve.y)
    drawn = [(line.get_marker(), float(line.get_ydata()[0])) for line in final.lines if line.get_marker() in ("o", "x")]
    expected = one.results[0].values["final"]
    assert [marker for marker, _ in drawn] == ["o", "x", "o"] and [y for _, y in drawn] == pytest.approx(expected)


def test_without_matplotlib_the_page_works_and_figures_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", steps=4, every=2)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    is_sound(report(run, out=tmp_path / "report.html"))
    out = tmp_path / "other.html"
    assert main(["report", str(run), "--out", str(out), "--figures", str(tmp_path / "f")]) == 2
    assert "pip install 'pgpo[report]'" in capsys.readouterr().err
    assert not out.exists() and not (tmp_path / "f").exists()
    with pytest.raises(UserError, match=r"pip install 'pgpo\[report\]'"):
        figures.plot_comparisons([], tmp_path / "f")
