"""What docs/METHOD.md points to exists: every `file.py:Name.member` and every `file.py::test`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/METHOD.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


def definitions(path: Path) -> set[str]:
    """Names at the top of a file, and Class.member."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name, children in named(node):
            found.add(name)
            found |= {f"{name}.{inner}" for child in children for inner, _ in named(child)}
    return found


def named(node: ast.AST) -> list[tuple[str, list[ast.stmt]]]:
    if isinstance(node, ast.ClassDef):
        return [(node.name, node.body)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [(node.name, [])]
    if isinstance(node, ast.Assign):
        return [(t.id, []) for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [(node.target.id, [])]
    return []


def test_the_page_points_to_something():
    assert len(CODE) > 40 and len(TESTS) > 30


@pytest.mark.parametrize(("file", "name"), CODE, ids=str)
def test_code_that_the_page_names(file, name):
    assert name in definitions(ROOT / "src/pgpo" / file)


@pytest.mark.parametrize(("file", "name"), TESTS, ids=str)
def test_tests_that_the_page_names(file, name):
    assert name in definitions(ROOT / "tests" / file)
