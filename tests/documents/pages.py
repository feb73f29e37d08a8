"""The commands and scripts of README, Start and Tutorials. `python tests/documents/pages.py [PAGE ...]` prints them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted((DOCS / "start").glob("*.md")), *sorted((DOCS / "tutorials").glob("*.md"))]

# A block is a shell script if its first line starts with one of these, or sets a variable.
PROGRAMS = ("pgpo", "python", "make", "pip", "accelerate", "torchrun", "jupyter", "head", "tail")
_START = re.compile(rf"(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})\b|[A-Z]+=")


@dataclass(frozen=True)
class Block:
    """What stands between two fences of a page; `line` is the first one's."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        return self.language in ("", "bash") and _START.match(self.text) is not None

    @property
    def is_listing(self) -> bool:
        """Commands with what they are for beside them: README's list."""
        return self.is_shell and re.search(r"\S {3,}\S", self.text) is not None

    @property
    def file(self) -> str | None:
        """The name that a script has by its first line, `# loop.py`."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, but for directives like {toctree}."""
    fence, start, language, inside = "", 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not fence and (found := re.match(r"(`{3,})(.*)$", line)):
            fence, language, start, inside = found[1], found[2].strip(), number, []
        elif fence and line == fence:
            if not language.startswith("{"):
                yield Block(page, start, language, "\n".join(inside) + "\n")
            fence = ""
        else:
            inside.append(line)


def commands(text: str, variables: dict[str, str]) -> Iterator[str]:
    """The commands of a shell block, one per line, with variables filled in, which `variables` remembers."""
    for line in re.sub(r" *\\\n *", " ", text).splitlines():
        line = re.split(r" {3,}|(?:^|\s)# ", line)[0].rstrip()
        if found := re.fullmatch(r'([A-Z]+)="?([^"]*)"?', line):
            variables[found[1]] = found[2]
        elif line:
            yield re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], line)


def main() -> None:
    for page in [Path(word).resolve() for word in sys.argv[1:]] or PAGES:
        for block in blocks(page):
            if block.is_shell or block.file:
                print(f"# {block}\n{block.text}")


if __name__ == "__main__":
    main()
