r"""What the user of a model sees of a completion: the text outside its thinking. One notion, for graders and teachers.

| form                                       | written by, for example                                           |
|--------------------------------------------|-------------------------------------------------------------------|
| <think>, <thinking>, <thought>, each also  | DeepSeek-R1, Qwen3, GLM-4.5, SmolLM3, Granite 3.3; EXAONE Deep;   |
| with a prefix or suffix as in <seed:think> | Seed-OSS, MiniMax, LongCat                                        |
| [THINK]                                    | Magistral                                                         |
| ◁think▷                                    | Kimi-VL                                                           |
| <|begin_of_thought|>                       | OpenThinker, Sky-T1                                               |
| <|START_THINKING|>                         | Command A Reasoning                                               |
| <|inner_prefix|>                           | Apertus                                                           |
| <|channel>thought, <unused94>thought       | Gemma 4, MedGemma                                                 |
| Here is my thought process:                | Granite 3.2, up to "Here is my response:"                         |
| <|channel|>analysis, and commentary        | gpt-oss, up to <|channel|>final; also without its special tokens, |
|                                            | "analysisWe need ... assistantfinalB"                             |

The tags are those of the models' chat templates, of vLLM's reasoning parsers and of TRL's response templates. Case does
not matter, and a tag is a tag wherever it stands, in code and quotes too: chat templates split at it without looking
further. Not thinking, because a prompt asks for it and the user reads it: <reasoning> (SDPO's science prompt),
<scratchpad>, <reflection>.

Standard library only; usable outside this project as a single file.
"""

from __future__ import annotations

import re

_NAME = r"(?:\w{1,20}[:_|])?(?:think(?:ing)?|thoughts?)(?::\w{1,20})?"
_OPENING = (
    rf"<{_NAME}>",
    r"\[THINK\]",
    "◁think▷",
    r"<\|(?:begin_of_thought|START_THINKING|inner_prefix)\|>",
    r"<\|channel>(?:thought)?",
    r"<unused94>(?:thought)?",
    r"Here(?:'s| is) my thought process:",
    r"<\|channel\|>(?:analysis|commentary)(?:<\|message\|>)?",
    r'\Aanalysis(?=(?-i:[A-Z0-9"(\\]))',
)
_CLOSING = (
    rf"</{_NAME}>",
    r"\[/THINK\]",
    "◁/think▷",
    r"<\|(?:end_of_thought|END_THINKING|inner_suffix)\|>",
    r"<channel\|>",
    "<unused95>",
    # Harmony: any new message ends the last one, and what the "final" one holds is for the user.
    r"<\|start\|>assistant(?:<\|channel\|>final(?:<\|message\|>)?)?",
    r"<\|channel\|>final(?:<\|message\|>)?",
    "assistantfinal",
)
# A plain sentence: without the opening one it is no mark.
_CLOSING_IF_OPEN = r"Here(?:'s| is) my response:"

_TAG = re.compile(
    f"(?P<opening>{'|'.join(_OPENING)})|(?P<closing>{'|'.join(_CLOSING)})|{_CLOSING_IF_OPEN}", re.IGNORECASE
)
_OUR_TAGS = re.compile("|".join([*_OPENING, *_CLOSING]), re.IGNORECASE)
_OPEN_END = re.compile(rf"(?:{'|'.join(_OPENING)})\s*\Z", re.IGNORECASE)
_LONGEST_TAG = 80  # characters, ours: more than any opening has
_BLANK = re.compile(r"\s*")


def visible_text(completion: str, opened: bool = False) -> str:
    """The completion without its thinking and without the blank space behind each block. Linear time.

    opened: the prompt ends inside a thinking block (see `opens_thinking`), so that the completion begins there.

    | completion                                                         | visible                       |
    |--------------------------------------------------------------------|-------------------------------|
    | no thinking                                                        | all of it                     |
    | closed blocks, one or several                                      | what stands outside them      |
    | nested blocks                                                      | what stands outside the outer |
    | a block that is never closed (a truncated text)                    | what stands before it         |
    | a closing tag without an opening one: the prompt had opened it     | what stands after it          |
    | opened, and no closing tag                                         | nothing                       |
    | a second opening tag right behind the first, the prompt's included | as with one                   |
    """
    depth, begin, last_opening = int(opened), 0, 0
    seen: list[str] = []
    for tag in _TAG.finditer(completion):
        if tag["opening"]:
            if depth == 0:
                seen.append(completion[begin : tag.start()])
            if depth == 0 or completion[last_opening : tag.start()].strip():
                depth += 1
            last_opening = tag.end()
        elif depth or tag["closing"]:
            if depth == 0:
                seen.clear()
            depth = max(depth - 1, 0)
            blank = _BLANK.match(completion, tag.end())
            begin = blank.end() if blank else tag.end()
    if depth == 0:
        seen.append(completion[begin:])
    return "".join(seen)


def is_thinking_tag(token: str) -> bool:
    """Whether a token is an opening or closing tag. Where it is a special token, a decoded text does not show it."""
    return _OUR_TAGS.fullmatch(token) is not None


def opens_thinking(prompt: str) -> bool:
    r"""Whether a rendered prompt ends in an opening tag, as `...assistant\n<think>\n` does."""
    return _OPEN_END.search(prompt.rstrip()[-_LONGEST_TAG:]) is not None
