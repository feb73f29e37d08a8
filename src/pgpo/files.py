"""Files that survive a crash whole (atomic writes), and standard JSON, one object per line.

JSON has no NaN and no infinity: a non-finite float is written as the string "NaN", "Infinity" or "-Infinity",
which both Python's float() and JavaScript's Number() understand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgpo.errors import UserError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def write_atomically(path: Path, text: str) -> None:
    """Write a temporary file and rename it: a reader or a crash sees the old text or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_line(values: Mapping[str, Any]) -> str:
    """One JSON object and a newline. Scalars of numpy and torch become numbers, non-finite floats strings."""
    return json.dumps(_standard(values), ensure_ascii=False, allow_nan=False) + "\n"


def json_document(values: Mapping[str, Any]) -> str:
    """Indented JSON, converted as by `json_line`; what JSON cannot hold is written as its `str`."""
    return json.dumps(_standard(values), ensure_ascii=False, allow_nan=False, indent=2, default=str) + "\n"


def read_lines(path: Path, unfinished_end: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line. `unfinished_end` drops a broken last line that has no newline.

    Raises UserError with the number of the line that is not a JSON object.
    """
    *lines, end = path.read_bytes().split(b"\n")
    if end:
        lines.append(end)
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError:
            if unfinished_end and end and number == len(lines):
                break
            value = None
        if not isinstance(value, dict):
            raise UserError(f"Line {number} of {path} is not a JSON object; restore the file or remove that line.")
        values.append(value)
    return values


def _standard(value: Any) -> Any:
    """The value in standard JSON: numpy and torch scalars to numbers, non-finite floats to their names."""
    if isinstance(value, Mapping):
        return {str(name): _standard(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_standard(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def with_floats(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with the names of non-finite floats turned back into floats."""
    return {name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in line.items()}
