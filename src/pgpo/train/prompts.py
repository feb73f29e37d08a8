"""Checks of prompts before training: what a row's prompt must be, and what the model's chat template accepts.

    Prompts.problem(prompt)    the rest of a sentence that begins with the row's name; None if the prompt is in order

Every row is checked. The chat template is rendered once per distinct sequence of roles, and a row is tokenized only if
its number of characters does not already show that it is short enough.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pgpo.errors import UserError, reason
from pgpo.settings.field_types import shown

_FIRST, _SECOND = "Xq1first", "Xq2second"  # stand for a text in a rendered conversation
_CONTROL = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,}\]")  # as templates mark turns: <|user|>, [INST]
_SHAREGPT = {"from", "value"}
_Shape = tuple[Any, ...]


class Prompts:
    """Judges prompts as the trainer will use them.

    Args:
        processing_class: the tokenizer.
        rendering: keyword arguments of every `apply_chat_template` (template, tools, the user's own).
        hinted: whether a teacher's hint is written into the prompts, so that the last turn must be the user's.
        render: whether chat messages are rendered here; not where images or environments complete them later.
        limit: longest prompt in tokens, or None.
        limit_name: where the limit comes from, for the sentence.
    """

    def __init__(
        self,
        processing_class: Any,
        rendering: Mapping[str, Any],
        hinted: bool,
        render: bool = True,
        limit: int | None = None,
        limit_name: str = "",
    ) -> None:
        self.processing_class, self.rendering, self.hinted = processing_class, dict(rendering), hinted
        self.render, self.limit, self.limit_name = render, limit, limit_name
        self.kind: str | None = None  # of the first prompt: TRL treats a batch as one or the other
        self.prefilled = False  # whether a conversation ended in an assistant's message
        self._overhead: dict[_Shape, int] = {}  # characters that the template adds to a conversation of this shape
        self._marks = template_marks(processing_class, rendering) if hinted and render else ((), ())

    def problem(self, prompt: Any) -> str | None:
        """Why this prompt cannot be used, with the remedy: "has ...; do ..."."""
        try:
            if isinstance(prompt, str):
                self._text(prompt)
            else:
                self._messages(prompt)
            kind = "text" if isinstance(prompt, str) else "messages"
            if self.kind not in (None, kind):
                raise UserError("mixes text and chat messages with the rows before it; make all prompts of one kind.")
            self.kind = kind
        except UserError as error:
            return str(error)
        return None

    def _text(self, prompt: str) -> None:
        if not prompt.strip():
            raise UserError(f"has an empty prompt, {prompt!r}; drop the row.")
        if (mark := rendered_mark(prompt, self._marks, self.processing_class)) is not None:
            raise UserError(
                f"has a prompt that the chat template has rendered already (it holds {mark!r}), so that the teacher's "
                'hint would stand in the assistant\'s turn; give the messages, [{"role": "user", "content": ...}], and '
                "let the trainer render them."
            )
        if self._may_exceed(prompt, 0):
            self._check_length(len(self.processing_class(text=prompt)["input_ids"]), prompt)

    def _messages(self, prompt: Any) -> None:
        if isinstance(prompt, Mapping):
            raise UserError("has a single dict as its prompt; make it a list of messages, or a text.")
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise UserError(f"has the prompt {shown(prompt)}; give chat messages or a text.")
        if not prompt:
            raise UserError("has an empty list as its prompt; give at least one message, or drop the row.")
        for message in prompt:
            _check_message(message)
        if self.hinted:
            self._check_hint(prompt)
        elif prompt[-1]["role"] == "assistant":
            self.prefilled = True
        if not self.render:
            return
        if not (getattr(self.processing_class, "chat_template", None) or self.rendering.get("chat_template")):
            raise UserError(
                "has chat messages as its prompt, but the tokenizer has no chat template; set tokenizer.chat_template, "
                "use an instruction-tuned model, or give prompts as plain strings."
            )
        shape = tuple(_shape(message) for message in prompt)
        texts = [text for message in prompt for text in _texts(message)]
        if shape not in self._overhead:
            self._overhead[shape] = len(self._rendered(prompt)) - sum(map(len, texts))
        if self._may_exceed("".join(texts), self._overhead[shape]):
            ids = self.processing_class.apply_chat_template(
                conversation=prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **self.rendering
            )["input_ids"]
            self._check_length(len(ids), next(reversed(texts), ""))

    def _check_hint(self, prompt: Sequence[Mapping[str, Any]]) -> None:
        roles = [message["role"] for message in prompt]
        if roles[-1] == "assistant":
            raise UserError(
                "has a prompt that ends in an assistant's message, which TRL closes instead of going on with it, and "
                "the teacher's hint belongs in the user's last turn; end the prompt with a user's message."
            )
        if "user" not in roles:
            raise UserError(
                f"has a prompt without a user's message (roles: {', '.join(map(str, roles))}), into which the "
                'teacher\'s hint is written; name the role "user".'
            )
        last = next(message for message in reversed(prompt) if message["role"] == "user")
        if not isinstance(last["content"], str) and not list(_texts(last)):
            raise UserError("has a prompt whose last user's message holds no text for the teacher's hint; add one.")

    def _rendered(self, prompt: Any) -> str:
        try:
            rendered = self.processing_class.apply_chat_template(
                conversation=prompt, add_generation_prompt=True, tokenize=False, **self.rendering
            )
        except Exception as error:  # jinja's, or Python's within it
            roles = [str(message["role"]) for message in prompt]
            remedy = "change the row, or set another chat template"
            if "system" in roles:
                remedy = "write the system's text into the first user's message, or set another chat template"
            elif any(a == b for a, b in itertools.pairwise(roles)):
                remedy = "join neighbouring messages of one role, or set another chat template"
            raise UserError(
                f"has a prompt that the chat template refuses (roles: {', '.join(roles)}; it says: {reason(error)}); "
                f"{remedy}."
            ) from error
        if any(not isinstance(message.get("content"), str | None) for message in prompt) and "'type': '" in rendered:
            raise UserError(
                "has a message whose content is a list of parts, which the chat template writes as Python's text; make "
                "the content a text."
            )
        return str(rendered)

    def _may_exceed(self, text: str, overhead: int) -> bool:
        """A token has at least one byte, so short texts need no tokenizer."""
        return self.limit is not None and len(text.encode(errors="replace")) + overhead > self.limit

    def _check_length(self, tokens: int, text: str) -> None:
        if self.limit is not None and tokens > self.limit:
            start = text if len(text) <= 60 else text[:60] + "…"
            raise UserError(
                f"has a prompt with {tokens} tokens, more than {self.limit_name} = {self.limit}: {start!r}; raise the "
                "limit or drop the row."
            )


def _check_message(message: Any) -> None:
    if not isinstance(message, Mapping):
        raise UserError(
            f"has {shown(message)} in its prompt where a message belongs; give a list of "
            '{"role": ..., "content": ...}, or a single text.'
        )
    present = {key for key, value in message.items() if value is not None}  # a dataset fills what is missing with None
    if present >= _SHAREGPT and "role" not in present:
        raise UserError(
            "has messages with ShareGPT's keys, from and value; name them role and content, and the roles human and "
            "gpt user and assistant."
        )
    for key in ("role", "content"):
        if key not in present and not (key == "content" and "tool_calls" in present):
            raise UserError(
                f"has a message without {key} (its keys: {', '.join(sorted(map(str, present))) or 'none'}); give every "
                "message a role and a content."
            )
    if not isinstance(message["role"], str):
        raise UserError(f"has a message with the role {shown(message['role'])}; make it a text, such as user.")
    _check_content(message.get("content"))


def _check_content(content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"has a message with the content {shown(content)}; make it a text, or a list of parts.")
    for part in content:
        if not isinstance(part, Mapping) or (part.get("type") == "text" and not isinstance(part.get("text"), str)):
            raise UserError(
                f"has {shown(part)} among the parts of a message; give each part a type, and a text one its text: "
                '{"type": "text", "text": ...}.'
            )


def _shape(message: Mapping[str, Any]) -> _Shape:
    content = message.get("content")
    kind = type(content).__name__ if content is None or isinstance(content, str) else tuple(map(_part, content))
    return message["role"], kind, bool(message.get("tool_calls"))


def _part(part: Mapping[str, Any]) -> str:
    return str(part.get("type"))


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif content is not None:
        yield from (part["text"] for part in content if part.get("type") == "text")


# Prompts that were rendered beforehand ------------------------------------------------------------------------------


def template_marks(processing_class: Any, rendering: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a conversation rendered by this chat template begins with, and ends with: its own fixed parts.

    Beginnings are marks of turns alone (<|im_start|>, [INST]); an end is all that opens the answer. Both are found by
    rendering made conversations, with the user's template arguments and without.
    """
    if not getattr(processing_class, "chat_template", None) and not rendering.get("chat_template"):
        return (), ()
    user = {"role": "user", "content": _SECOND}
    plain = {key: rendering[key] for key in ("chat_template",) if rendering.get(key)}
    starts: set[str] = set()
    ends: set[str] = set()
    for arguments in (rendering, plain, plain | {"enable_thinking": True}):
        for messages in ([user], [{"role": "system", "content": _FIRST}, user]):
            opened, closed = (_try(processing_class, messages, opening, arguments) for opening in (True, False))
            if opened is None or _SECOND not in opened:
                continue
            before = re.split(f"{_FIRST}|{_SECOND}", opened)[0]
            starts |= set(_control_marks(before, processing_class)[:1])
            if len(messages) == 1:
                starts |= set(_control_marks(before.rstrip().rpartition("\n")[2], processing_class)[:1])
            rest = opened.rpartition(_SECOND)[2]
            opener = opened.removeprefix(closed) if closed else ""
            end = opener if opener != opened and any(c.isalnum() for c in opener) else rest
            if any(c.isalnum() for c in end):
                ends.add(end.strip())
    return tuple(sorted(starts)), tuple(sorted(ends))


def rendered_mark(text: str, marks: tuple[Sequence[str], Sequence[str]], tokenizer: Any) -> str | None:
    """The mark at the beginning or the end of a text that shows that it was rendered; or None."""
    starts, ends = marks
    head, tail = text.lstrip(), text.rstrip()
    if bos := getattr(tokenizer, "bos_token", None):
        head = head.removeprefix(bos).lstrip()
    return next((m for m in starts if head.startswith(m)), None) or next((m for m in ends if tail.endswith(m)), None)


def _try(processing_class: Any, messages: list[Any], opening: bool, arguments: Mapping[str, Any]) -> str | None:
    try:
        text = processing_class.apply_chat_template(
            conversation=messages, add_generation_prompt=opening, tokenize=False, **arguments
        )
    except Exception:  # it takes no system role, or not these arguments
        return None
    return str(text)


def _control_marks(text: str, tokenizer: Any) -> list[str]:
    """Marks of turns in a template's text, in their order, those of the tokenizer's own among them."""
    added = sorted(getattr(tokenizer, "get_added_vocab", dict)(), key=len, reverse=True)
    found = [(text.find(token), token) for token in added if token.strip() and token in text]
    found += [(match.start(), match[0]) for match in _CONTROL.finditer(text)]
    ends_of_text = {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}
    return [mark for _, mark in sorted(found) if mark not in ends_of_text]


class Rendered:
    """Token ids of prompts, each rendered once."""

    def __init__(self, render: Callable[[Any], list[int]]) -> None:
        self.render = render
        self.known: dict[str, list[int]] = {}

    def __call__(self, prompt: Any) -> list[int]:
        key = repr(prompt)
        if key not in self.known:
            self.known[key] = self.render(prompt)
        return self.known[key]
