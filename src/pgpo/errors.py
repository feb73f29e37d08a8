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


class SentenceParser(ArgumentParser):
    """Argparse without a page of usage after a mistake, and without guessing which flag a shorter one may mean."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message:.400}; see `{self.prog} --help`.")
