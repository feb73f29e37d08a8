"""The site: `make docs` builds it from this folder and from the docstrings of pgpo, without network."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference_tables
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import pgpo

project = "pgpo"
author = "the pgpo contributors"
version = release = pgpo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "README.draft.md"]
html_theme = "furo"
html_title = f"pgpo {release}"
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 4  # as GitHub makes them: METHOD.md#equations
myst_enable_extensions = ["colon_fence", "deflist"]

default_role = "code"  # `x` in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
highlight_language = "none"
napoleon_google_docstring = True
napoleon_use_rtype = False
autoclass_content = "both"  # an __init__ may have its own text


class Table(SphinxDirective):
    """```{pgpo} NAME``` is a table of reference_tables.py."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in reference_tables.TABLES:
            raise self.error(
                f"there is no table {name!r}; reference_tables.py has {', '.join(reference_tables.TABLES)}"
            )
        self.env.note_dependency(str(HERE / "reference_tables.py"))
        return self.parse_text_to_nodes(reference_tables.TABLES[name](), allow_section_headings=True)


SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:", "Note:", "Example:")  # napoleon's
_LINK = re.compile(r"\[`?([^\]`]+?)`?\s*\]\(((?:\.\./)+[^)\s]+)\)")


def name_files_beside_docs(app: Sphinx, docname: str, source: list[str]) -> None:
    """A link out of docs/, which the site does not hold, becomes the name of its file."""
    folder = HERE / Path(docname).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        return link[0] if target.is_relative_to(HERE) else f"`{target.relative_to(HERE.parent)}`"

    source[0] = _LINK.sub(named, source[0])


def plain_docstring(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text: indented blocks and columns are shown as they are, and | and * are no markup."""
    shown: list[str] = []
    for block in paragraphs(lines):
        if literal(block) and not belongs(shown):
            shown += ["::", "", *(f"    {line}" for line in block), ""]
        else:
            shown += [*map(escaped, block), ""]
    lines[:] = shown


def escaped(line: str) -> str:
    """| and *, and _ at the end of a word, outside of backquotes."""
    text = enumerate(line.split("`"))
    return "`".join(part if number % 2 else re.sub(r"(_(?=\W|$)|[|*])", r"\\\1", part) for number, part in text)


def paragraphs(lines: list[str]) -> list[list[str]]:
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    return [list(group) for filled, group in groups if filled]


def literal(block: list[str]) -> bool:
    """An indented paragraph, or one whose lines have columns."""
    return block[0].startswith("    ") or sum(bool(re.search(r"\S {3,}\S", line)) for line in block) > 1


def belongs(lines: list[str]) -> bool:
    """Whether an indented paragraph goes on with a section or a bullet above it."""
    above = next((line for line in reversed(lines) if line.strip() and not line.startswith("    ")), "")
    return above in SECTIONS or above.startswith(("\\* ", "- "))


def setup(app: Sphinx) -> None:
    app.add_directive("pgpo", Table)
    app.connect("source-read", name_files_beside_docs)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
