"""`pgpo report` as Markdown, what runs say of each other by their test records, and the loss of diversity."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from report_kit import HOSTILE, write_run, write_study

from pgpo.cli import main
from pgpo.evaluate import Record, write_records
from pgpo.runlog import RunLog
from pgpo.study_files import narrowed

T2 = 4.302653  # Student's t, 95 %, 2 degrees of freedom


def markdown(*paths: Path, out: Path) -> str:
    assert main(["report", *map(str, paths), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def rows(text: str, head: str) -> list[list[str]]:
    """Cells of the table whose first cell is `head`, without its head and rule."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert len({len(row) for row in table}) == 1
    return table[2:]


def with_records(run: Path, scores: dict[str, tuple[float, ...]], stems: dict[str, str] | None = None) -> Path:
    """Gives a run test records with these rewards."""
    records = [
        Record(
            question_id=question,
            domain="",
            sample=sample,
            reward=reward,
            answer=None,
            well_formed=None,
            completion="",
            **({"stem": stems[question]} if stems else {}),
        )
        for question, rewards in scores.items()
        for sample, reward in enumerate(rewards)
    ]
    write_records(run / "test_records.jsonl", records)
    return run


def test_runs_are_compared_with_the_first_by_question(tmp_path: Path) -> None:
    # Differences 1/2, 1, 0: mean 1/2, variance 1/4, of the mean 1/12.
    first = with_records(write_run(tmp_path / "a", "sdpo", seed=3), {"p": (0, 0), "q": (0, 0), "r": (1, 0)})
    other = with_records(write_run(tmp_path / "b", "pgpo", seed=4), {"r": (0, 1), "p": (1, 0), "q": (1, 1)})
    text = markdown(first, other, out=tmp_path / "r.md")
    half = 100 * T2 * math.sqrt(1 / 12)
    (row,) = rows(text[text.index("| method | minus |") :], "method")
    assert row[:2] == ["PGPO α = 1", "SDPO"]
    assert row[2] == f"+50.0 [−{half - 50:.1f}, +{half + 50:.1f}]"
    assert row[3] == f"{half * (1 + 1.060660 / T2):.1f}" and row[4:] == ["1", "3"]
    assert "single pair of runs does not hold the noise of seeds" in text
    # As one stem and a single question there are two units, one degree of freedom: t = 12.7.
    stems = {"p": "s", "q": "s", "r": "r"}
    with_records(first, {"p": (0, 0), "q": (0, 0), "r": (1, 0)}, stems)
    with_records(other, {"r": (0, 1), "p": (1, 0), "q": (1, 1)}, stems)
    wide = markdown(first, other, out=tmp_path / "s.md")
    bounds = rows(wide[wide.index("| method | minus |") :], "method")[0][2]
    assert float(re.findall(r"[\d.]+", bounds)[-1]) > 300


@pytest.mark.parametrize("other", [{"p": (1, 1)}, {"x": (1, 1), "q": (0, 0)}, {}], ids=["fewer", "others", "none"])
def test_runs_on_other_questions_are_not_compared(tmp_path: Path, other: dict[str, tuple[float, ...]]) -> None:
    first = with_records(write_run(tmp_path / "a", "sdpo"), {"p": (0, 0), "q": (0, 1)})
    second = write_run(tmp_path / "b", "pgpo")
    if other:
        with_records(second, other)
    assert "| method | minus |" not in markdown(first, second, out=tmp_path / "r.md")


def test_broken_records_are_named_and_the_rest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = with_records(write_run(tmp_path / "a", "sdpo"), {"p": (0, 0)})
    second = write_run(tmp_path / "b", "pgpo")
    (second / "test_records.jsonl").write_text('{"reward": 1}\n', encoding="utf-8")
    assert "PGPO α = 1" in markdown(first, second, out=tmp_path / "r.md")
    assert f"{second / 'test_records.jsonl'} cannot be read; its run is compared with none." in capsys.readouterr().err


def test_a_study_is_told_setting_by_setting(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", ("plain", "style"), ("pgpo", "sdpo"), range(8), 20, failed=False)
    text = markdown(study, out=tmp_path / "study.md")
    assert text == markdown(study, out=tmp_path / "again.md")
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == ["# Study made-up", "## plain", "## style"]
    plain = rows(text, "method")
    assert [row[0] for row in plain] == ["pgpo", "sdpo"] and all(row[1] == "8" for row in plain)
    assert "## Settings" not in text and "95 % interval over seeds (Student's t)" in text


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_a_run_becomes_markup(tmp_path: Path, hostile: str) -> None:
    wild = hostile + " | [link](https://example.org) *b* `c` # d\n# e"
    one = write_run(tmp_path / "a", "sdpo", run_name=wild, warm_start=wild)
    two = write_run(tmp_path / "b", "sdpo", warm_start="tame")
    text = markdown(one, two, out=tmp_path / "r.md")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        next(line for line in text.splitlines() if line.startswith("# ")),
        "## Runs",
        "## Settings",
    ]
    assert {row[0]: row for row in rows(text, "setting")}.keys() == {r"run\_name", r"warm\_start"}
    assert not re.search(r"(?<!\\)[<`]|(?<!\\)\]\(", text.replace("`pgpo report`", ""))


def test_the_format_follows_the_name_unless_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), "--format", "markdown"]) == 0
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# One run: PGPO")
    assert not (tmp_path / "report.html").exists()
    assert main(["report", str(run)]) == 0 and (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!")
    assert main(["report", str(run), "--out", "x.txt", "--format", "markdown"]) == 0
    assert (tmp_path / "x.txt").read_text(encoding="utf-8").startswith("# ")
    assert main(["report", str(run), "--format", "pdf"]) == 2


def evaluation(average: float, passed: float | None, low: float | None = None) -> dict[str, float | None]:
    return {"step": 1, "k": 4, "avg_at_k": average, "pass_at_k": passed, "pass_at_k_low": low}


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (evaluation(0.7, 0.79), True),
        (evaluation(0.7, 0.81), False),  # within the interval of the first
        (evaluation(0.5, 0.5), False),  # both fell: that is no loss of diversity but a worse model
        (evaluation(0.7, None), False),
    ],
)
def test_diversity_is_lost_where_one_falls_and_the_other_rises(last: dict[str, float], expected: bool) -> None:
    assert narrowed(evaluation(0.5, 0.9, 0.8), last) is expected
    assert narrowed(evaluation(0.5, 0.9), last) is False  # no interval, as in an older log


def diversity_run(folder: Path, name: str, lost: bool) -> Path:
    with RunLog.create(folder / name, {"objective": "sdpo", "seed": name, "alpha": 0}, {}) as log:
        for step, average, passed in ((0, 0.5, 0.9), (10, 0.7, 0.7 if lost else 0.9)):
            values = {"avg_at_k_low": 0.4, "avg_at_k_high": 0.8, "pass_at_k_low": passed - 0.1, "pass_at_k_high": 1.0}
            measured = {"avg_at_k": average, "pass_at_k": passed}
            log.evaluation(step, {"split": "validation", "k": 4, "questions": 9} | measured | values)
        log.metrics(1, {"rho": 1.0})
    return folder / name


def test_the_report_says_where_diversity_was_lost(tmp_path: Path) -> None:
    one, kept = diversity_run(tmp_path, "one", True), diversity_run(tmp_path, "kept", False)
    text = markdown(one, kept, out=tmp_path / "r.md")
    sentence = "one: pass@4 fell from 0.900 to 0.700 while avg@4 rose from 0.500 to 0.700"
    assert text.count("pass@4 fell") == 1 and sentence in text
    main(["report", str(one), str(kept), "--out", str(tmp_path / "r.html")])
    assert sentence in (tmp_path / "r.html").read_text(encoding="utf-8")
    more = [diversity_run(tmp_path, f"n{i}", True) for i in range(4)]
    assert "In 4 of 5 runs pass@k fell while avg@k rose" in markdown(*more, kept, out=tmp_path / "m.md")


def test_the_log_of_a_run_says_it_when_diversity_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the first evaluation on the same split, also after a resumption, when only the log knows it."""
    from pgpo.command.session import Session

    kept = {"avg_at_k_low": 0.4, "avg_at_k_high": 0.8, "pass_at_k_low": 0.8, "k": 4, "questions": 9}
    for resumed in (False, True):
        session = Session.__new__(Session)
        session.main, session.first = True, {}
        session.log = RunLog(tmp_path) if resumed else RunLog.create(tmp_path, {}, {})
        lines = [("validation", 0.5, 0.9), ("test", 0.5, 0.7), ("test", 0.6, 0.7), ("validation", 0.6, 0.7)]
        for split, average, passed in lines[3:] if resumed else lines:
            session._write_evaluation(5, {"split": split, "avg_at_k": average, "pass_at_k": passed} | kept)
        session.log.close()
        err = capsys.readouterr().err
        assert err.count("pass@4 fell from 0.900 to 0.700 while avg@4 rose from 0.500 to 0.600") == 1
        assert "validation pass@4 fell" in err
