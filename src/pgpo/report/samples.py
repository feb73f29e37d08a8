"""Sample completions, with the disagreement of teacher and student token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from pgpo import runlog
from pgpo.report.charts import fixed, significant
from pgpo.report.markup import Html, el, join
from pgpo.report.sources import number
from pgpo.runlog import LoggedRun

# nats; ours: below the first a token says nothing, and a Jensen-Shannon divergence cannot exceed ln 2 = .69
LEVELS = (0.01, 0.05, 0.2, 0.5)
STEPS_SHOWN, PER_STEP = 4, 4
MOST_CHARACTERS, MOST_TOKENS, MOST_LISTED, LONG = 4000, 600, 10, 800


def sample_section(runs: Sequence[LoggedRun], labels: Sequence[str]) -> Html | None:
    """A few steps, evenly spaced, of the first run of each method that has samples; the first and the last are open."""
    parts = []
    done: set[str] = set()
    coloured = False
    for run, label in zip(runs, labels):
        logged = [line for line in run.samples if isinstance(line.get("samples"), list) and line["samples"]]
        if label in done or not logged:
            continue
        done.add(label)
        parts.append(el("h3", label if labels.count(label) == 1 else f"{label}, run {run.name}"))
        chosen = _spread(logged, STEPS_SHOWN)
        for line in chosen:
            samples = [sample for sample in line["samples"][:PER_STEP] if isinstance(sample, dict)]
            coloured |= any(_tokens(sample.get("tokens")) for sample in samples)
            cards = el("div", *map(_card, samples), class_="samples")
            open_ = line is chosen[0] or line is chosen[-1]
            parts.append(el("details", el("summary", f"Step {line[runlog.STEP]}"), cards, open=open_))
    if not parts:
        return None
    return el("section", el("h2", "Sample completions"), token_key() if coloured else None, *parts, id="samples")


def token_key() -> Html:
    """The legend of the tokens' colours and lines."""
    names = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(LEVELS)] + [f"≥ {LEVELS[-1]:g}"]
    steps = [el("span", text, class_=f"tok less d{i}") for i, text in enumerate(names, 1)]
    other = [el("span", text, class_=f"tok more d{i}") for i, text in enumerate(names, 1)]
    return el(
        "div",
        el("span", "Divergence between student and teacher, nats per token:"),
        el("span", *steps, " underlined: the teacher finds the token less likely than the student does"),
        el("span", *other, " overlined: more likely"),
        el("span", "Point at a token, or move to it with Tab and the arrow keys, to read its numbers.", class_="muted"),
        class_="token-key",
    )


def spaced(tokens: Sequence[str], completion: str) -> list[tuple[str, str, bool]]:
    """(white space before it, text, is it part of the completion?) of each token.

    Some tokenizers keep the blank in the token, others drop it when a token is decoded alone; the completion knows.
    """
    place = 0
    found = []
    for token in tokens:
        before = ""
        if not completion.startswith(token, place):
            rest = completion[place:]
            before = rest[: len(rest) - len(rest.lstrip())]
            if not completion.startswith(token, place + len(before)):
                found.append(
                    ("", token, False)
                )  # an end-of-sequence token, or one that only decodes with its neighbours
                continue
        place += len(before) + len(token)
        found.append((before, token, True))
    return found


def level_of(divergence: float) -> int:
    """0 to 4: how many of LEVELS the divergence (nats) reaches; a nan reaches none, as an infinity reaches all."""
    return sum(divergence >= level for level in LEVELS)


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    last = len(items) - 1
    return [items[i] for i in dict.fromkeys(round(j * last / max(1, count - 1)) for j in range(count))]


def _card(sample: dict[str, Any]) -> Html:
    prompt, completion = (str(sample.get(name, "")) for name in ("prompt", "completion"))
    tokens = _tokens(sample.get("tokens"))
    reward = number(sample.get("reward"))
    return el(
        "article",
        _text("prompt", _cut(prompt)),
        _text("completion", _coloured(tokens, completion) if tokens else _cut(completion)),
        el("p", "reward ", el("b", significant(reward)), class_="grade") if math.isfinite(reward) else None,
        _largest(tokens),
        class_="sample",
    )


def _text(name: str, text: str) -> Html:
    """A paragraph in the direction of its own text; a long one scrolls, so that the keyboard must reach it."""
    return el("p", text, class_=name, dir="auto", tabindex="0" if len(text) > LONG else None)


def _tokens(value: object) -> list[tuple[str, float, float, float]]:
    """Text, divergence, student's and teacher's log-probability (nats); empty where they are not all there."""
    if not isinstance(value, list) or not all(isinstance(token, list) and len(token) == 4 for token in value):
        return []
    return [(str(text), *map(number, numbers)) for text, *numbers in value]  # type: ignore[misc]


def _coloured(tokens: Sequence[tuple[str, float, float, float]], completion: str) -> Html:
    shown = tokens[:MOST_TOKENS]
    parts: list[object] = []
    placed = spaced([token[0] for token in shown], completion)
    for (text, divergence, student, teacher), (before, _, inside) in zip(shown, placed):
        level = level_of(divergence)
        direction = "less" if teacher < student else "more"
        parts.append(before)
        parts.append(
            el(
                "span",
                text,
                class_=f"tok d{level}{f' {direction}' if level else ''}{'' if inside else ' special'}",
                title=_told(text, divergence, student, teacher),
                tabindex="0" if level >= 2 else None,
            )
        )
    rest = completion[sum(len(before) + len(text) for before, text, inside in placed if inside) :]
    return join([*parts, _cut(rest)])


def _told(text: str, divergence: float, student: float, teacher: float) -> str:
    return (
        f"“{text.strip() or text}”: divergence {significant(divergence)} nats; student {_probability(student)},"
        f" teacher {_probability(teacher)}"
    )


def _probability(logprob: float) -> str:
    share = 100 * math.exp(min(logprob, 0.0)) if not math.isnan(logprob) else math.nan
    percent = fixed(share, 1) if not share < 0.05 else significant(share, 2)
    return f"{percent} % (log p {fixed(logprob, 2)})"


def _largest(tokens: Sequence[tuple[str, float, float, float]]) -> Html | None:
    """A table of the tokens that differ most, for readers without a pointer."""
    listed = sorted((token for token in tokens if token[1] >= LEVELS[0]), key=lambda token: -token[1])[:MOST_LISTED]
    if not listed:
        return None
    rows = [
        el(
            "tr",
            el("th", el("code", text), scope="row"),
            *(el("td", cell) for cell in (significant(divergence), fixed(student, 2), fixed(teacher, 2))),
        )
        for text, divergence, student, teacher in listed
    ]
    heads = [el("th", name, scope="col") for name in ("token", "divergence, nats", "log p student", "log p teacher")]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows))
    return el("details", el("summary", "Largest disagreements"), el("div", table, class_="table"))


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} … ({more} more characters)"
