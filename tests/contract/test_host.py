"""Nobody sets an attribute of a trainer: what it needs from outside is in its Host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src/pgpo"


def set_from_outside(source: str) -> list[str]:
    """Assignments to an attribute of `trainer` or of `<something>.trainer`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
        for target in flat:
            if isinstance(target, ast.Attribute):
                owner = target.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
                if name == "trainer":
                    found.append(f"line {target.lineno}: {ast.unparse(target)}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_file_sets_an_attribute_of_a_trainer(path: Path) -> None:
    assert set_from_outside(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "trainer.say = print",
        "self.trainer.trusted = None",
        "a, trainer.run_id = 1, 2",
        "trainer.count += 1",
        "trainer.x: int = 1",
    ],
)
def test_an_attribute_set_from_outside_is_found(source: str) -> None:
    assert len(set_from_outside(source)) == 1


def test_what_the_host_is_told_is_not_mistaken_for_it() -> None:
    assert set_from_outside("trainer.host.run_id = trainer.x = 1\nself.trainer = t") == ["line 1: trainer.x"]
