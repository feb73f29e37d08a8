"""The errors that end a command with one sentence."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake that the user can mend: one sentence with the value, the place and the remedy.

    The command line prints the sentence without a traceback and exits with status 2.
    """


class LostRankError(RuntimeError):
    """Another process of the job has died, failed or fallen silent; the sentence names it. Exit status 1."""


def reason(error: BaseException, characters: int = 300) -> str:
    """What an exception says, on one line, without the full stop; cut behind a sentence, else between words."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        return "no reason given"
    if len(text) > characters:
        cut = text[:characters]
        end = cut.rfind(". ")
        text = cut[:end] if end > 0 else cut.rpartition(" ")[0] + " …"
    return text.rstrip(".")


class SentenceParser(ArgumentParser):
    """Argparse without a page of usage after a mistake, and without guessing which flag a shorter one may mean."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message:.400}; see `{self.prog} --help`.")
