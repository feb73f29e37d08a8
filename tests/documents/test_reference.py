"""The tables of the reference pages hold every field, flag, command and metric, each with what a reader needs."""

from __future__ import annotations

import dataclasses
import re

import pytest
import reference_tables as tables
from trl import GRPOConfig

from pgpo import PGPOConfig, cli, runlog
from pgpo.settings.arguments import RunArguments

OWN = tables.own_fields()
NAMED = {row.name for row in OWN}
# Fields of TRL that PGPOConfig works out itself, and shows under their own name.
FIELDS = {field.name for field in dataclasses.fields(PGPOConfig)}


def test_every_field_has_a_row():
    inherited = set(re.findall(r"^\| `(\w+) =", tables.inherited_fields(), re.MULTILINE))
    assert inherited | NAMED == FIELDS
    assert inherited & NAMED == set()
    assert FIELDS - {field.name for field in dataclasses.fields(GRPOConfig)} <= NAMED


@pytest.mark.parametrize("row", OWN, ids=lambda row: row.name)
def test_a_field_says_where_its_default_comes_from(row):
    """In its help text, or in the heading above it; a new field without a source turns this red."""
    assert row.source and set(row.source.split(", ")) <= set(tables.SOURCES)
    assert row.section and row.text.endswith(".") and row.default == repr(getattr(PGPOConfig, row.name))


def test_a_field_without_a_source_is_found():
    assert tables.source("How many.", "Batch and lengths") == ""
    assert tables.source("How many. Ours.", "Batch and lengths") == "ours"
    assert tables.source("How many.", "Measured trust (ours)") == "ours"
    assert tables.source("Paper: 32.", "Measured trust (ours)") == "PGPO"


def test_values_are_named_once():
    rows = {row.name: row for row in OWN}
    assert rows["teacher"].values == "" and "'trust_region'" in rows["teacher"].text
    assert rows["trust_tokens"].values == "it must be at least 1"


def test_the_tables_are_those_of_the_code():
    assert all(f"`{name}`" in tables.metrics() for name in runlog.METRICS)
    assert all(f"`{name}`" in tables.evaluations() for name in runlog.EVALUATIONS)
    flags = {f.name for f in dataclasses.fields(RunArguments) if f.init}
    assert set(re.findall(r"`--(\w+)`", tables.run_arguments())) == flags
    files = {value for name, value in vars(runlog).items() if name.endswith("_FILE") and name != "LOCK_FILE"}
    assert [name for name in files if name not in tables.run_directory()] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_answers_help(name):
    assert tables.command_help(name).startswith(f"usage: pgpo {name}")


def test_a_cell_holds_no_markup():
    assert tables.plain("a_b * <c> [d]") == r"a\_b \* \<c\> \[d\]"
    assert tables.table(("x",), [("a|b",)]).splitlines()[-1] == r"| a\|b |"
