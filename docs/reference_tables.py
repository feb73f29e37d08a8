"""The tables of the reference pages, as Markdown, made from the code that they describe. conf.py puts them in."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from trl import GRPOConfig

from pgpo import cli, runlog
from pgpo.settings import config as settings
from pgpo.settings.arguments import RunArguments
from pgpo.settings.config import PGPOConfig
from pgpo.settings.fields import FATES, Fate
from pgpo.settings.rules import CHOICES, RANGES

# How a help text, or the heading above it in config.py, names where a default comes from.
SOURCES = {
    "PGPO": r"\b[Pp]aper\b|\bEq\. \d",
    "SDPO": r"\bSDPO\b(?!Config)",
    "TRL": r"\bTRL\b|\bTRL's\b",
    "ours": r"\b[Oo]urs\b",
}
_SECTION = re.compile(r"^    # (.+?) -{10,}$")
_FIELD = re.compile(r"^    (\w+): .*=")


@dataclasses.dataclass(frozen=True)
class Row:
    """A field of PGPOConfig: its default and help text, the values that it takes, and whence the default is."""

    section: str
    name: str
    default: str
    text: str
    values: str
    source: str

    @property
    def setting(self) -> str:
        return f"{self.name} = {self.default}"

    @property
    def meaning(self) -> str:
        return f"{self.text} Values: {self.values}." if self.values else self.text


def own_fields() -> list[Row]:
    """The fields that PGPOConfig adds, or whose default it changes, in the order of the source."""
    known = {field.name: field for field in dataclasses.fields(PGPOConfig)}
    rows, section = [], ""
    for line in inspect.getsource(PGPOConfig).splitlines():
        if found := _SECTION.match(line):
            section = found[1]
        elif (found := _FIELD.match(line)) and (field := known.get(found[1])) and "help" in field.metadata:
            text = field.metadata["help"]
            told = values(field.name, text), source(text, section)
            rows.append(Row(section, field.name, shown(field.default), text, *told))
    return rows


def source(text: str, section: str) -> str:
    """What the help text names, else what the heading of its section names."""
    return next((", ".join(found) for words in (text, section) if (found := named(words))), "")


def named(text: str) -> list[str]:
    return [name for name, words in SOURCES.items() if re.search(words, text)]


def values(name: str, text: str) -> str:
    """The choices, or the range, that `settings/rules.py` allows, where the help text does not name them."""
    if name in CHOICES:
        return "" if all(f"'{choice}'" in text for choice in CHOICES[name]) else ", ".join(CHOICES[name])
    return RANGES[name][1] if name in RANGES and "in [" not in text and "in (" not in text else ""


def shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return "" if value is dataclasses.MISSING else repr(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def config_fields() -> str:
    """All own fields, a table per section."""
    parts, rows = [], own_fields()
    for section in dict.fromkeys(row.section for row in rows):
        cells = [(code(r.setting), plain(r.meaning), r.source) for r in rows if r.section == section]
        parts += [f"## {section}", table(("field and default", "meaning", "source"), cells)]
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """A help text as Markdown: nothing in it is markup but backquotes."""
    return re.sub(r"([*_<>{}\[\]$~])", r"\\\1", text)


def inherited_fields() -> str:
    """What becomes of every field of trl.GRPOConfig that PGPOConfig leaves as it is."""
    ours = {row.name for row in own_fields()}
    defaults = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    rows = []
    for name, (distilling, policy) in sorted(FATES.items()):
        if name in ours or name not in defaults:
            continue
        fate = told(distilling) if distilling == policy else f"{told(distilling)} With grpo: {told(policy)}"
        rows.append((code(f"{name} = {inherited_default(defaults[name])}"), fate))
    return table(("field and default", "what becomes of it"), rows)


def inherited_default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return shown(field.default)


def told(fate: Fate) -> str:
    if fate.kind == "acts":
        return f"Acts, in `{fate.text}`."
    reason = plain(f"{fate.text}{'; ' + fate.remedy if fate.remedy else ''}")
    if fate.kind == "moot":
        return f"Nothing to act on: {reason}."
    mixed = " It acts where `distillation_weight` is below 1." if fate.mixed else ""
    return f"Refused when set, {reason}.{mixed}"


def run_arguments() -> str:
    """The flags of `pgpo train` that are no field of PGPOConfig or TRL's ModelConfig."""
    rows = [
        (code(f"--{f.name}"), code(shown(f.default)), plain(f.metadata["help"]))
        for f in dataclasses.fields(RunArguments)
        if "help" in f.metadata
    ]
    return table(("flag", "default", "meaning"), rows)


def paper_preset() -> str:
    return table(("field", "value"), [(code(k), code(repr(v))) for k, v in settings.PAPER.items()])


def commands() -> Iterator[tuple[str, str]]:
    """(command, what its --help prints), but for `pgpo train`, whose flags fill three tables."""
    yield "pgpo", cli.HELP
    for name in cli.COMMANDS:
        if name != "train":
            yield f"pgpo {name}", command_help(name)


def command_help(name: str) -> str:
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "92"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return printed.getvalue()


def command_line() -> str:
    return "\n\n".join(f"## {title}\n\n```text\n{text.rstrip()}\n```" for title, text in commands())


def metrics() -> str:
    return units(runlog.METRICS)


def evaluations() -> str:
    return units(runlog.EVALUATIONS)


def units(names: dict[str, tuple[str, str]]) -> str:
    return table(("name", "unit", "meaning"), [(code(n), unit, plain(text)) for n, (unit, text) in names.items()])


def run_directory() -> str:
    """The files of a run directory, as the docstring of runlog.py lists them."""
    listed = inspect.getdoc(runlog)
    assert listed is not None
    block = re.search(r"\n\n((?:    .*\n)+)", listed)
    assert block is not None
    return f"```text\n{inspect.cleandoc(block[1])}\n```"


# Name in a page's ```{pgpo} NAME block -> what stands there.
TABLES = {
    "config-fields": config_fields,
    "inherited-fields": inherited_fields,
    "paper-preset": paper_preset,
    "run-arguments": run_arguments,
    "command-line": command_line,
    "metrics": metrics,
    "evaluations": evaluations,
    "run-directory": run_directory,
}
