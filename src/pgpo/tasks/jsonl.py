"""Questions from a JSONL file, each line with its place for sentences about it."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pgpo.errors import UserError

LONGEST_LINE = 2**20  # bytes, ours; the longest line of the published science questions has 1622


class Record(NamedTuple):
    """A JSON object, and where it stands: "questions.jsonl, line 3"."""

    columns: Mapping[str, Any]
    where: str


def read_jsonl(file: Path) -> Iterator[Record]:
    """The JSON objects of a file, blank lines skipped.

    Raises UserError: an unreadable or empty file, a line that is too long, no UTF-8 or no JSON object, a name twice in
    one.
    """
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the path.") from error
    lines = content.splitlines()  # of bytes, because those of a text would end at U+2028 too
    if not any(line.strip() for line in lines):
        raise UserError(f"{file} is empty; restore it from where it came.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{where}: {len(line)} bytes, more than the {LONGEST_LINE} of any question; put each question on a "
                "line of its own."
            )
        try:
            columns = json.loads(line.decode("utf-8"), object_pairs_hook=_columns, parse_constant=_refuse_constant)
            if b"\\ud" in line.lower():
                json.dumps(columns, ensure_ascii=False).encode("utf-8")  # a ValueError for half a character
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line; save the file as UTF-8.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object.") from error
        if not isinstance(columns, dict):
            kind = type(columns).__name__
            raise UserError(f"{where}: a JSON {kind} instead of an object; each line must be one JSON object.")
        yield Record(columns, where)


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a name that stands twice is an error, because JSON would silently keep the last."""
    columns = dict(pairs)
    if len(columns) < len(pairs):
        twice = next(name for name, uses in Counter(name for name, _ in pairs).items() if uses > 1)
        raise ValueError(f"{twice!r} stands twice")
    return columns


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
