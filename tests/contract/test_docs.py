"""What docs/ points to exists, its lines are readable, and what documents say of the code is so."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*PAGES, *sorted(ROOT.glob("*.md"))]
WIDTH = 100
# A log of measurements, and a proof whose lines hold formulas; DROP_IN.md is written by a script, its rows are long.
WIDE_PAGES = {"LOG.md", "THEOREM.md"}
WIDE_TABLES = {"DROP_IN.md"}
# Written by a script of its own; a link to it may stand before the page does.
GENERATED = {ROOT / "docs/DROP_IN.md"}


def pointers(pattern: str) -> list[tuple[str, str, str]]:
    """(page, file, name) of every pointer in docs/, which runs over no line."""
    return sorted(
        {(page.name, *found) for page in PAGES for found in re.findall(pattern, page.read_text(encoding="utf-8"))}
    )


CODE = pointers(r"`([\w/]+\.py):([\w.]+)`")
TESTS = pointers(r"`(?:tests/)?([\w/]+\.py)::(\w+)`")


@functools.cache
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


def test_the_pages_point_to_something():
    pages = [page for page, _, _ in CODE]
    assert all(pages.count(page) > 10 for page in ("METHOD.md", "DEPARTURES.md", "DISTRIBUTED.md", "GLOSSARY.md"))
    assert len(TESTS) > 30


@pytest.mark.parametrize(("page", "file", "name"), CODE, ids=str)
def test_code_that_a_page_names(page, file, name):
    assert name in definitions(ROOT / "src/pgpo" / file)


@pytest.mark.parametrize(("page", "file", "name"), TESTS, ids=str)
def test_tests_that_a_page_names(page, file, name):
    assert name in definitions(ROOT / "tests" / file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names(page):
    """`core/head.py`, `recipes/paper/`: a file or folder of the package, of the tests, or of the repository."""
    named = re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|yaml|md))?)`", page.read_text(encoding="utf-8"))
    roots = (ROOT, ROOT / "src/pgpo", ROOT / "tests", ROOT / "src/pgpo/train")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def wide_lines(name: str, text: str) -> list[str]:
    lines = text.splitlines()
    if name in WIDE_PAGES:
        return []
    return [line for line in lines if len(line) > WIDTH and not (name in WIDE_TABLES and line.startswith("|"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_wider_than_a_hundred_characters(page):
    assert wide_lines(page.name, page.read_text(encoding="utf-8")) == []


def test_a_wide_line_is_found():
    row = "|" + "x" * WIDTH + "|"
    assert wide_lines("METHOD.md", f"short\n{row}") == [row]
    assert wide_lines("DROP_IN.md", f"{'x' * (WIDTH + 1)}\n{row}") == ["x" * (WIDTH + 1)]


# Words that the glossary has another word for.
DEVIATING = ("sign of life", "signs of life", "shared teacher prompt", "un-hinted", "key-value cache", "guided teacher")


def deviations(text: str) -> list[str]:
    flat = re.sub(r'[\s"#]+', " ", text).lower()  # over lines, comments and parts of a text
    return [word for word in DEVIATING if word in flat]


@pytest.mark.parametrize("folder", ["src", "recipes", "docs", "."])
def test_texts_keep_to_the_words_of_the_glossary(folder):
    files = (ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*.*")
    texts = [f for f in files if f.suffix in {".py", ".yaml", ".md"} and f.name not in {"GLOSSARY.md", "LOG.md"}]
    found = {f.name: deviations(f.read_text(encoding="utf-8")) for f in texts}
    assert found and {name: words for name, words in found.items() if words} == {}


def test_a_deviating_word_is_found():
    assert deviations('"seconds without a sign of "\n    "life"') == ["sign of life"]


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path, text: str) -> list[str]:
    """Links of a page, with its text, to files or headings of ours that do not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]*[./#][^)\s]*)\)", text):  # not E[X](x)
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        if path in GENERATED:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    assert dead_links(document, document.read_text(encoding="utf-8")) == []


def odd_addresses(text: str) -> list[str]:
    """Addresses of other places that cannot be right, by their form alone: nothing is fetched."""
    found = re.findall(r"\]\((\w+:[^)\s]*)\)|<(\w+://[^>\s]*)>", text)
    good = re.compile(r"https://(?!arxiv)[\w-]+(\.[\w-]+)+(/[\w./#%-]*)?|https://arxiv\.org/abs/\d{4}\.\d{5}")
    return [address for pair in found for address in pair if address and not good.fullmatch(address)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_addresses_of_other_places_have_the_form_of_one(document):
    assert odd_addresses(document.read_text(encoding="utf-8")) == []


def test_an_odd_address_is_found():
    assert odd_addresses("[a](https://arxiv.org/abs/2606.03620) [b](https://example.org/x.y/#z)") == []
    odd = ["http://example.org", "https://example", "https://arxiv.org/abs/2606.3620", "htps://example.org"]
    assert odd_addresses(" ".join(f"[a]({address})" for address in odd)) == odd


# Three screens of a site are about 150 lines of source. What was written before the site is longer.
LONGEST = 150


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "docs"], ids=lambda page: page.stem)
def test_a_page_of_the_site_is_three_screens_at_most(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_a_dead_link_is_found():
    page = ROOT / "docs/METHOD.md"
    good = "[a](DEPARTURES.md) [b](../README.md) [c](#equations) [d](https://example.org/x)"
    assert dead_links(page, good) == []
    assert dead_links(page, "[a](NOWHERE.md) [b](DEPARTURES.md#nowhere)") == ["NOWHERE.md", "DEPARTURES.md#nowhere"]
