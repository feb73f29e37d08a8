"""HTML and SVG from Python values: text is escaped unless it is `Html`, so that no text of a run becomes markup."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

# Characters that a browser does not show or that move their neighbours: controls, zero-width and bidirectional marks
# (Unicode 15, chapters 23.1 and 23.2; not the joiners, which scripts and emoji need), and lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
# What may end a script element or open a comment in it; json escapes U+2028 and U+2029, line ends in JavaScript.
_SCRIPT_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


class Html(str):
    """Text that is markup already."""


def visible(text: object) -> str:
    """The text with every character that would not show, or would reorder its neighbours, spelled as ⟨U+202E⟩."""
    return _UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", str(text))


def escape(text: object) -> Html:
    """Safe as the content of an element and inside a quoted attribute."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text)))


def join(parts: Iterable[object]) -> Html:
    """The parts one after another, escaped where they are not markup; None is left out."""
    return Html("".join(escape(part) for part in parts if part is not None))


def el(name: str, *children: object, **attributes: object) -> Html:
    """An element. class_ is class, data_x is data-x; None and False leave an attribute out, True has no value."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{html.escape(visible(value))}"')
    return Html(f"<{name}{''.join(written)}>{join(children)}</{name}>")


def data_block(identifier: str, value: Any) -> Html:
    """The value as JSON in a script element that the browser does not run."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return Html(
        f'<script type="application/json" id="{html.escape(identifier)}">{text.translate(_SCRIPT_ESCAPES)}</script>'
    )
