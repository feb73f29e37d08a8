"""The tables of docs/DROP_IN.md are what the runs give."""

from __future__ import annotations

import pytest
import table
from scenarios import SCENARIOS


def test_every_name_stands_once():
    names = [(s.of, s.test) for s in SCENARIOS]
    assert len(names) == len(set(names))
    assert all((s.run is None) == bool(s.needs) for s in SCENARIOS)


def test_the_page_has_a_row_for_each_and_none_that_fails():
    rows = [line for line in table.written().splitlines() if line.startswith("| `test_")]
    assert [row.split("`")[1] for row in rows] == [s.test for of in ("GRPO", "SDPO") for s in SCENARIOS if s.of == of]
    assert not [row for row in rows if "fails:" in row]


@pytest.mark.slow
def test_the_page_is_what_the_runs_give():
    """Red if a script that passed no longer does, if weights leave TRL's, or if a refusal has other words."""
    assert table.table().strip() == table.written()
