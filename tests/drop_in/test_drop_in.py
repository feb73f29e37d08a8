"""The tables of docs/DROP_IN.md are what the runs give."""

from __future__ import annotations

import re

import pytest
import table
from scenarios import SCENARIOS


def test_every_name_stands_once():
    names = [(s.of, s.test) for s in SCENARIOS]
    assert len(names) == len(set(names))
    assert all((s.run is None) == bool(s.needs) for s in SCENARIOS)


def test_the_page_names_each_and_none_that_fails():
    page = table.written()
    grpo, sdpo = page.split("## Tests of TRL's SDPOTrainer")
    for of, part in (("GRPO", grpo), ("SDPO", sdpo)):
        assert sorted(re.findall(r"`(test_\w+)`", part)) == sorted(s.test for s in SCENARIOS if s.of == of)
    assert "fails" not in page


@pytest.mark.slow
def test_the_page_is_what_the_runs_give():
    """Red if a script that passed no longer does, if weights leave TRL's, or if a refusal has other words."""
    assert table.table().strip() == table.written()
